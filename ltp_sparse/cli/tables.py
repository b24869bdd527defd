"""Names for `--help` and for checks of options, without importing torch."""

from ltp_sparse.tasks import TASKS

PROMPT_METHODS = (
    "ltp", "all-active", "random-ticket", "discrete-prompt", "soft-prompt", "mixed-prompt", "prompt-only",
)  # fmt: skip
"""Methods that score classes by words at the mask, with `--n-prompt` embeddings from an `--encoder`."""

METHOD_NAMES = (
    *PROMPT_METHODS, "deep-prompt", "fine-tuning", "bitfit", "head-only", "lt-sft", "sc-sft", "rand-sft", "ada-sft",
    "mad-x", "spt",
)  # fmt: skip

MASKED_METHOD_NAMES = tuple(name for name in METHOD_NAMES if name != "spt")
"""Methods of `ltp-sparse train`, for XLM-R."""

TICKET_METHODS = ("ltp", "random-ticket")
"""Methods that need a ticket."""

TASK_NAMES = tuple(TASKS)

METRIC_NAMES = ("accuracy", "macro_f1")

TEST_TASKS = {"xnli-fewshot": "xnli", "multinli": "xnli", "mnli-9k": "xnli", "smsa": "nusax", "smsa-full": "nusax"}
"""Task of training -> task to test on, if it is another one."""
