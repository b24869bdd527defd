"""Names that `--help` shows without importing transformers."""

METHOD_NAMES = (
    "ltp", "all-active", "random-ticket", "discrete-prompt", "soft-prompt", "mixed-prompt", "prompt-only",
    "fine-tuning", "bitfit", "lt-sft", "sc-sft", "rand-sft",
)  # fmt: skip
