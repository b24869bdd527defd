"""Names that `--help` shows without importing transformers."""

METHOD_NAMES = ("ltp", "all-active", "random-ticket", "discrete-prompt", "soft-prompt", "mixed-prompt", "prompt-only")
