"""Ada-SFT's learned masks: every linear weight W of the encoder becomes W * sigmoid(S)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltp_sparse.models.attachment import Attachment, encoder_of
from ltp_sparse.ops import topk_delta


class SoftMasks(Attachment):
    """A float32 score S for every entry of the encoder's linear weights (72 in XLM-R-base); M = sigmoid(S).

    While attached, the forward pass uses W * M. Both W and S can be trained: the method trains S (the parameters of
    this module) with W frozen, then W (the parameters in `names`) with S frozen.

    Args:
        model: an XLM-R.
        init: initial score; 4 gives M = 0.982 (0 would halve every weight and destroy the encoder).
    """

    key = "soft_masks"

    def __init__(self, model: nn.Module, *, init: float = 4.0) -> None:
        super().__init__()
        linears = _linears(encoder_of(model))
        self.names = tuple(linears)
        self.scores = nn.ParameterList(
            torch.full(linear.weight.shape, init, device=linear.weight.device) for linear in linears.values()
        )

    def masks(self) -> Iterator[Tensor]:
        """M of every weight, in the order of `names`; differentiable."""
        return (torch.sigmoid(score) for score in self.scores)

    @torch.no_grad()
    def mean(self) -> float:
        """The mean of M over all entries."""
        return sum(float(mask.double().sum()) for mask in self.masks()) / self._entries()

    @torch.no_grad()
    def share_below(self, threshold: float = 0.5) -> float:
        """The share of entries with M < threshold."""
        return sum(int((mask < threshold).sum()) for mask in self.masks()) / self._entries()

    @torch.no_grad()
    def keep(self, k: int) -> None:
        """Sets M to 0 outside its k largest entries, in place and for good; ties go to the earliest.

        Raises:
            ValueError: k exceeds the number of entries.
        """
        kept, _ = topk_delta([], list(self.masks()), k)
        for score, entries in zip(self.scores, kept, strict=True):
            score.masked_fill_(~entries.mask().view_as(score), -torch.inf)

    @torch.no_grad()
    def fold(self) -> None:
        """Writes W * M into the weights and removes itself; the model computes the same bits as before."""
        if not self._host:
            raise ValueError("SoftMasks.fold: expected attached masks; attach() them first")
        for linear, mask in zip(_linears(encoder_of(self._host[0])).values(), self.masks(), strict=True):
            linear.weight.mul_(mask.to(linear.weight.dtype))
        self.remove()

    def _entries(self) -> int:
        return sum(score.numel() for score in self.scores)

    def _check(self, roberta: Any) -> None:
        shapes = {name: linear.weight.shape for name, linear in _linears(roberta).items()}
        own = dict(zip(self.names, (score.shape for score in self.scores), strict=True))
        if shapes != own:
            raise ValueError(
                f"SoftMasks: expected a model with the {len(own)} linear weights that the masks were made for, got one "
                f"with {len(shapes)}, or of other shapes; make them from this model"
            )

    def _connect(self, model: nn.Module, roberta: Any) -> None:
        for index, linear in enumerate(_linears(roberta).values()):
            self._override(linear, partial(self._linear, linear, index))

    def _linear(self, linear: nn.Linear, index: int, x: Tensor) -> Tensor:
        mask = torch.sigmoid(self.scores[index])
        return F.linear(x, linear.weight * mask.to(linear.weight.dtype), linear.bias)


def _linears(roberta: Any) -> dict[str, nn.Linear]:
    """Canonical name of the weight -> linear module, of the encoder's layers."""
    return {
        f"roberta.encoder.{name}.weight": module
        for name, module in roberta.encoder.named_modules()
        if isinstance(module, nn.Linear)
    }
