"""The architecture of mini-xlmr."""

from __future__ import annotations

import torch
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from ltp_sparse.models.backbone import backbone_from_config


def mini_xlmr(
    vocabulary: int, *, hidden: int = 192, layers: int = 4, positions: int = 128, seed: int = 0
) -> XLMRobertaForMaskedLM:
    """A small XLM-R with random weights. Heads have size 32, the inner size is 4 * `hidden`, and there is no dropout.

    Args:
        vocabulary: number of pieces.
        hidden: hidden size, a multiple of 32.
        layers: number of layers.
        positions: tokens of the longest input.
        seed: seed of the weights. It becomes torch's global seed.
    """
    config = XLMRobertaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden, max_position_embeddings=positions + 2, type_vocab_size=1, layer_norm_eps=1e-5,
        initializer_range=0.04, pad_token_id=1, bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return backbone_from_config(config, decoupled=False)
