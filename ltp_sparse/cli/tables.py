"""Names that `--help` shows without importing transformers."""

METHOD_NAMES = ("ltp", "random-ticket", "soft-prompt", "prompt-only")
