"""Prompt-learning on the tiny model, in one process or as one of several ranks."""

from __future__ import annotations

import torch

import ltp_sparse as ls
from helpers.ranks import tell
from helpers.tiny_nli import ticket_of, tiny_language_model, tiny_tokenizer, toy_pairs
from ltp_sparse.methods import LTP, PromptSettings, SoftPrompt
from ltp_sparse.training.method import train_method

SHORT = PromptSettings(learning_rate=3e-3, epochs=6, max_length=64)


def run(tokenizer, method=None, *, dropout=0.0, model=None, train=None, dev=None, **options):
    """LTP for 6 epochs on 24 pairs, one step each."""
    method = method or LTP(settings=SHORT)
    model = model or tiny_language_model(len(tokenizer), decoupled=not isinstance(method, SoftPrompt), dropout=dropout)
    if method.needs_ticket:
        options.setdefault("ticket", ticket_of(model))
    train, dev = train or toy_pairs(24), dev or toy_pairs(15, seed=1)
    return train_method(method, model, tokenizer, train, dev, **{"progress": False, **options})


def delta_bits(delta: ls.SparseDelta) -> dict[str, torch.Tensor]:
    return {f"{part}/{n}": t for part in ("values", "dense") for n, t in getattr(delta, part).items()}


def rank(number: int, size: int, port: int, path: str) -> None:
    """Trains as one process of several; the first one saves the result."""
    torch.set_num_threads(1)
    tell(number, size, port)
    result = run(tiny_tokenizer(), train=toy_pairs(32))
    if number == 0:
        torch.save({**delta_bits(result.delta), "dev": torch.tensor(result.dev_scores)}, path)
