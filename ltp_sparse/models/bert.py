"""BERT as XLM-R: the same network with other names, whose positions are counted from 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BertConfig, XLMRobertaConfig

_NAMES = (
    ("bert.", "roberta."),
    ("cls.predictions.transform.dense.", "lm_head.dense."),
    ("cls.predictions.transform.LayerNorm.", "lm_head.layer_norm."),
    ("cls.predictions.decoder.", "lm_head.decoder."),
    ("cls.predictions.", "lm_head."),
)
_POSITIONS = "roberta.embeddings.position_embeddings.weight"
_TYPES = "roberta.embeddings.token_type_embeddings.weight"


def xlm_roberta_config(config: BertConfig) -> XLMRobertaConfig:
    """The configuration of the XLM-R that computes what a BERT computes of a single segment.

    An XLM-R counts positions from `pad_token_id + 1` on, so its table has that many rows more.

    Raises:
        ValueError: positions that are not absolute, or another activation than GELU, which an XLM-R cannot have.
    """
    from transformers import XLMRobertaConfig

    for key, only in (("position_embedding_type", "absolute"), ("hidden_act", "gelu")):
        if (found := getattr(config, key, only)) != only:
            raise ValueError(f"load_backbone: expected a BERT with {key} {only!r}, got {found!r}")
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "pad_token_id",
        "tie_word_embeddings",
    )  # fmt: skip
    return XLMRobertaConfig(
        **{key: getattr(config, key) for key in kept},
        max_position_embeddings=config.max_position_embeddings + config.pad_token_id + 1,
        type_vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
    )


def xlm_roberta_tensors(tensors: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """The weights of a BERT (names of `BertForMaskedLM`) under XLM-R's names.

    The position table begins with `pad_token_id + 1` rows of zeros, which are never read. Of the segment types only the
    first is kept, as this package has no second segment.
    """
    renamed = {_renamed(name): tensor for name, tensor in tensors.items()}
    positions = renamed[_POSITIONS]
    renamed[_POSITIONS] = torch.cat([positions.new_zeros(pad_token_id + 1, positions.shape[1]), positions])
    renamed[_TYPES] = renamed[_TYPES][:1]
    return renamed


def _renamed(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in _NAMES if name.startswith(old)), name)
