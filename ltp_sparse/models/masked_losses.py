"""Losses of a masked language model at masked positions only, with a limited number of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.weights.names import unwrapped

_LOGITS = 1 << 26  # logits that exist at a time


def masked_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Sum of cross-entropies over the masked tokens, divided by their number in the whole update (or in this batch).

    Args:
        outputs: computed within `token_losses`.
        labels: int64 [B, L], -100 where not masked.
        num_items_in_batch: masked tokens in the whole update; None: in this batch.
    """
    losses: Tensor = outputs.logits
    count = torch.as_tensor(len(losses) if num_items_in_batch is None else num_items_in_batch)
    return losses.sum() / count.clamp(min=1).to(losses.device)


def token_losses(model: nn.Module, labels: Tensor) -> AbstractContextManager[None]:
    """Within this context `model(...).logits` is the cross-entropy of every masked token, float32 [masked tokens].

    Args:
        model: a masked-LM model, possibly wrapped (DDP): call the wrapper.
        labels: int64 [B, L], -100 where not masked; losses are in row-major order.

    The LM head runs at masked positions only, and its decoder in parts whose logits stay below 256 MiB; backward
    recomputes them. For a 32 x 256 batch of XLM-R all logits would take 8.2 GB, those of the masked positions 1.2 GB,
    and their gradients the same again.
    """
    flat = labels.reshape(-1)
    positions = (flat != IGNORED_LABEL).nonzero()[:, 0]
    return losses_at(model, positions, flat[positions])


@contextmanager
def losses_at(model: nn.Module, positions: Tensor, targets: Tensor) -> Iterator[None]:
    """`token_losses` at given positions of the flattened batch, with the tokens there; both int64 [m]."""
    head: Any = unwrapped(model).lm_head
    decoder = head.decoder
    rows = max(1, _LOGITS // decoder.weight.shape[0])

    def losses_of(features: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(features, decoder.weight, decoder.bias)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def losses(features: Tensor) -> Tensor:
        if len(features) <= rows:
            return losses_of(features, targets)
        pieces = zip(features.split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(losses_of, *piece, use_reentrant=False) for piece in pieces])

    handle = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].flatten(0, 1)[positions], *inputs[1:]))
    decoder.forward = losses  # of this instance only; its hooks still run
    try:
        yield
    finally:
        handle.remove()
        del decoder.forward
