"""Tiny causal language models, XGLM and BLOOM, and their tokenizer."""

from __future__ import annotations

import torch

HIDDEN = 32


def causal_tokenizer(words=tuple(f"w{i}" for i in range(40))):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in words), "\u2581", *"aeginrthuovmt"]
    core = Tokenizer(models.Unigram([(p, 0.0 if p[0] == "<" else -float(5 + len(p) == 1)) for p in pieces], unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def causal_model(kind: str):
    """A random model of 2 layers and hidden size 32; XGLM's embeddings are scaled by sqrt(32)."""
    from transformers import BloomConfig, BloomForCausalLM, XGLMConfig, XGLMForCausalLM

    torch.manual_seed(0)
    if kind == "xglm":
        config = XGLMConfig(
            vocab_size=60, d_model=HIDDEN, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64,
            dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        model = XGLMForCausalLM(config)
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=HIDDEN, n_layer=2, n_head=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
