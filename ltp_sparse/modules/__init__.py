"""Model parts that methods put around, into or onto a language model; they know nothing of trainers."""

from ltp_sparse.modules.classifier import SequenceClassifier, encode_pairs, encode_texts
from ltp_sparse.modules.inputs import collator

__all__ = ["SequenceClassifier", "collator", "encode_pairs", "encode_texts"]
