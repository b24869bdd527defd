"""Names that `--help` shows without importing transformers."""

METHOD_NAMES = (
    "ltp", "all-active", "random-ticket", "discrete-prompt", "soft-prompt", "mixed-prompt", "prompt-only",
    "deep-prompt", "fine-tuning", "bitfit", "lt-sft", "sc-sft", "rand-sft", "ada-sft", "mad-x", "spt",
)  # fmt: skip
