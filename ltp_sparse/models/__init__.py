"""Parts of models that methods add to a language model. Nothing here depends on trainers."""

from ltp_sparse.models.adapters import Adapter, AdapterStack, InvertibleAdapter
from ltp_sparse.models.causal_prompt import (
    TOPIC_WORDS,
    TOPICS,
    CausalPrompt,
    PromptedCausalLM,
    encode_prompted,
    vocabulary_loss,
    word_tokens,
)
from ltp_sparse.models.classifier import SequenceClassifier, encode_pairs, encode_texts
from ltp_sparse.models.prefix import DeepPrompt
from ltp_sparse.models.soft_masks import SoftMasks
from ltp_sparse.prompting.inputs import collator

__all__ = [
    "TOPICS",
    "TOPIC_WORDS",
    "Adapter",
    "AdapterStack",
    "CausalPrompt",
    "DeepPrompt",
    "InvertibleAdapter",
    "PromptedCausalLM",
    "SequenceClassifier",
    "SoftMasks",
    "collator",
    "encode_pairs",
    "encode_prompted",
    "encode_texts",
    "vocabulary_loss",
    "word_tokens",
]
