"""Prompts for masked language models: templates, verbalizers, prompt encoders and the prompted model."""

from ltp_sparse.prompting.model import PromptedMaskedLM
from ltp_sparse.prompting.prompt_encoder import PromptEncoder, vocabulary_rows
from ltp_sparse.prompting.templates import (
    Template,
    cloze_template,
    collator,
    discrete_template,
    kind_of,
    soft_template,
)
from ltp_sparse.prompting.verbalizers import WORDS, Verbalizer
from ltp_sparse.tasks.pairs import CLASSES

__all__ = [
    "CLASSES",
    "WORDS",
    "PromptEncoder",
    "PromptedMaskedLM",
    "Template",
    "Verbalizer",
    "cloze_template",
    "collator",
    "discrete_template",
    "kind_of",
    "soft_template",
    "vocabulary_rows",
]
