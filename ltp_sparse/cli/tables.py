"""Names that `--help` shows and mistakes are held against, without importing torch."""

METHOD_NAMES = (
    "ltp", "all-active", "random-ticket", "discrete-prompt", "soft-prompt", "mixed-prompt", "prompt-only",
    "deep-prompt", "fine-tuning", "bitfit", "head-only", "lt-sft", "sc-sft", "rand-sft", "ada-sft", "mad-x",
    "spt",
)  # fmt: skip

MASKED_METHOD_NAMES = tuple(name for name in METHOD_NAMES if name != "spt")
"""Those that `ltp-sparse train` knows: of XLM-R."""

PROMPT_METHODS = METHOD_NAMES[:7]
"""Those that score classes by words at the mask, and learn `--n-prompt` embeddings through an `--encoder`."""

TICKET_METHODS = ("ltp", "random-ticket")
"""Those that need a ticket."""

TASK_NAMES = (
    "xnli", "xnli-fewshot", "americasnli", "americasnli-first", "multinli", "mnli-9k", "smsa", "smsa-full", "nusax",
    "generated", "sib200",
)  # fmt: skip

METRIC_NAMES = ("accuracy", "macro_f1")

TEST_TASKS = {"xnli-fewshot": "xnli", "multinli": "xnli", "mnli-9k": "xnli", "smsa": "nusax", "smsa-full": "nusax"}
"""Task of training -> task to test on, where it is another one."""
