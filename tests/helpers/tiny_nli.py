"""A tiny XLM-R, a tiny tokenizer and a toy inference task, for tests of prompts, methods and training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ltp_sparse as ls
from helpers.bits import weights
from ltp_sparse.selection import pools

WORDS = [f"word{i}" for i in range(60)]
CLUES = {"contradiction": "never", "entailment": "surely", "neutral": "perhaps"}


@dataclass(frozen=True)
class TinyPair:
    premise: str
    hypothesis: str
    label: str | None
    language: str = "en"


def tiny_tokenizer():
    """XLM-R's special tokens and ids, and one word-initial piece per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["right", "wrong", "maybe", *CLUES.values(), *WORDS]
    marks = "<s> <pad> </s> <unk> \u2581 . ? ! off \u2581?"
    pieces = [*marks.split(" "), *("\u2581" + word for word in words), "<mask>"]
    vocabulary = [(piece, 0.0 if piece.startswith("<") else -10.0) for piece in pieces]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", padding_side="right",
    )  # fmt: skip


def tiny_language_model(vocabulary: int, *, decoupled: bool = True, seed: int = 0, dropout: float = 0.0):
    """A random XLM-R with hidden size 32, 2 layers and 64 positions, deterministic in `seed`."""
    from transformers import XLMRobertaConfig

    from ltp_sparse.models.backbone import backbone_from_config

    config = XLMRobertaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = backbone_from_config(config, decoupled=decoupled)
        with torch.no_grad():  # initial biases of 0 and norms of 1 would hide mistakes
            for parameter in {id(p): p for p in model.parameters() if p.dim() == 1}.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def toy_pairs(count: int, seed: int = 0, language: str = "en") -> list[TinyPair]:
    """Pairs whose class follows from one word of the hypothesis; classes alternate."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for i in range(count):
        label = list(CLUES)[i % 3]
        picks = [WORDS[j] for j in torch.randint(len(WORDS), (8,), generator=generator)]
        length = 2 + i % 3
        pairs.append(TinyPair(" ".join(picks[:length]) + ".", " ".join([CLUES[label], *picks[5:7]]), label, language))
    return pairs


def ticket_of(model, density: float = 0.3) -> ls.Ticket:
    """A ticket as from stage 1: with the fingerprint of the weights of `model`."""
    generator = torch.Generator().manual_seed(0)
    initial = weights(model)
    tuned = {name: t + torch.randn(t.shape, generator=generator) for name, t in initial.items()}
    return ls.select(initial, tuned, density=density, pool=pools.maskable)
