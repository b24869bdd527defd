"""Names that `--help` shows without importing transformers."""

METHOD_NAMES = (
    "ltp", "all-active", "random-ticket", "discrete-prompt", "soft-prompt", "mixed-prompt", "prompt-only",
    "deep-prompt", "fine-tuning", "bitfit", "lt-sft", "sc-sft", "rand-sft", "ada-sft", "mad-x", "spt",
)  # fmt: skip

PAIR_METHOD_NAMES = tuple(name for name in METHOD_NAMES if name != "spt")
"""Those that `ltp-sparse train` knows: of XLM-R, on labelled pairs."""
