"""Writes an XLM-R of random weights with a real tokenizer, to try everything without downloading a model.

python examples/random_xlmr.py --tokenizer DATA/tokenizers/xlm_roberta_base --size small --output small-xlmr
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, XLMRobertaConfig

from ltp_sparse.models.backbone import backbone_from_config

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


def random_xlmr(size: str, vocabulary: int, seed: int = 0):  # type: ignore[no-untyped-def]
    """An `XLMRobertaForMaskedLM` with XLM-R's configuration and random weights."""
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        **SIZES[size],
    )
    return backbone_from_config(config, decoupled=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = random_xlmr(options.size, len(tokenizer))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters of random weights in {options.output}")
