"""Prompts for masked language models: templates and verbalizers."""

from ltp_sparse.prompting.inputs import collator
from ltp_sparse.prompting.templates import Template, cloze_template, discrete_template, kind_of, soft_template
from ltp_sparse.prompting.verbalizers import WORDS, Verbalizer
from ltp_sparse.tasks.pairs import CLASSES

__all__ = [
    "CLASSES",
    "WORDS",
    "Template",
    "Verbalizer",
    "cloze_template",
    "collator",
    "discrete_template",
    "kind_of",
    "soft_template",
]
