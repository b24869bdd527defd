"""Adam with coupled L2 over all weights of a model: the optimizer of Zhao & Schütze's systems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltp_sparse.weights.names import is_layer_norm


class AdamL2(torch.optim.Adam):
    """`torch.optim.Adam` that clips the norm of all gradients before the step.

    Args:
        parameters: canonical name -> parameter; biases and LayerNorms have no L2 term.
        l2: l2 * weight is added to the gradient.
        max_grad_norm: the largest norm of all gradients, with that term left out; None: they are not clipped.
        options: as for `torch.optim.Adam`.

    Attributes:
        grad_norm: 0-dim tensor, the latest norm before clipping.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, l2: float, max_grad_norm: float | None, **options: Any
    ) -> None:
        plain = [p for name, p in parameters.items() if is_layer_norm(name) or name.endswith("bias")]
        decayed = [p for name, p in parameters.items() if not (is_layer_norm(name) or name.endswith("bias"))]
        groups = [{"params": decayed, "weight_decay": l2}, {"params": plain, "weight_decay": 0.0}]
        super().__init__([group for group in groups if group["params"]], **options)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.register_step_pre_hook(_clip)

    def state_bytes(self) -> int:
        """Bytes of both moments."""
        return sum(t.nbytes for state in self.state.values() for name, t in state.items() if name != "step")


def _clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, AdamL2)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    bound = float("inf") if optimizer.max_grad_norm is None else optimizer.max_grad_norm
    optimizer.grad_norm = nn.utils.clip_grad_norm_(parameters, bound)
