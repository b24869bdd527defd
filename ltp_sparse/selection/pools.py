"""Pools: which parameters of an XLM-R-like model may be selected, as predicates on canonical names."""

from __future__ import annotations

from collections.abc import Callable

from ltp_sparse.weights.names import in_base_model, is_layer_norm, layer_of


def maskable(name: str) -> bool:
    """The base model without its LayerNorms. Heads are never selected, nor is a decoupled output embedding."""
    return in_base_model(name) and not is_layer_norm(name)


def without_embeddings(name: str) -> bool:
    """`maskable` without the embedding module."""
    return maskable(name) and layer_of(name) != "embeddings"


def layers(first: int, last: int) -> Callable[[str], bool]:
    """`maskable` inside encoder layers first..last, counted from 0, both included."""
    wanted = {f"layer {i}" for i in range(first, last + 1)}
    return lambda name: maskable(name) and layer_of(name) in wanted


def segment(which: str, num_layers: int) -> Callable[[str], bool]:
    """The "lower", "middle" or "upper" third of the encoder's layers (LTP: layers 1-4, 5-8, 9-12 of 12)."""
    parts = ("lower", "middle", "upper")
    if which not in parts:
        raise ValueError(f"segment must be one of {', '.join(parts)}, got {which!r}")
    at = parts.index(which)
    return layers(at * num_layers // 3, (at + 1) * num_layers // 3 - 1)
