"""Pre-training of small multilingual masked language models: tokenizer, sources of text, training loop."""

from ltp_sparse.pretraining.embeddings import parallel_embeddings, start_from
from ltp_sparse.pretraining.model import mini_xlmr
from ltp_sparse.pretraining.pretrain import PretrainSettings, held_out_losses, pretrain
from ltp_sparse.pretraining.sources import Batch, Documents, Sentences, Source, Translations
from ltp_sparse.pretraining.tokenizer import train_tokenizer

__all__ = [
    "Batch",
    "Documents",
    "PretrainSettings",
    "Sentences",
    "Source",
    "Translations",
    "held_out_losses",
    "mini_xlmr",
    "parallel_embeddings",
    "pretrain",
    "start_from",
    "train_tokenizer",
]
