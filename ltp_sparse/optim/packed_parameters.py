"""`PackedParameters`: a ticket's entries as ordinary parameters, for any optimizer of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from ltp_sparse.delta import gather, scatter_
from ltp_sparse.encoding import TileTable
from ltp_sparse.names import canonical_parameters, match_names
from ltp_sparse.optim.packed_gradients import PackedGradients
from ltp_sparse.ticket import Ticket

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


class PackedParameters:
    """The active entries of every tensor as one float32 parameter [k], with packed gradients.

    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1, momentum=0.9))
    loss.backward(); opt.step(); opt.zero_grad()

    Optimizers that work entry by entry (SGD, Adam, RMSprop, schedule-free, 8-bit ones, ...) train the entries as they
    would train a tensor under a mask. Those that look at a matrix's shape (Muon, Shampoo, Adafactor's factored
    moments) see vectors here. The float32 values are masters: a model in bfloat16 holds their rounding. For AdamW,
    `MaskedAdamW` does the same in one pass and without a copy of the values.

    Args:
        model: the module whose weights train, all of them on one device.
        ticket: the active entries.

    Raises:
        ValueError: no name of the ticket is in the model, a shape differs, or the ticket has no active entry.
    """

    def __init__(self, model: nn.Module, ticket: Ticket) -> None:
        named = canonical_parameters(model)
        names = match_names(ticket.active_names, named, what="PackedParameters", where="the model")
        if not names:
            raise ValueError("PackedParameters: expected a ticket with active entries, this one has none")
        for name in names:
            if named[name].shape != ticket.shapes[name]:
                raise ValueError(
                    f"PackedParameters: {name!r} has shape {list(named[name].shape)} in the model and "
                    f"{list(ticket.shapes[name])} in the ticket; select the ticket on this model"
                )
        devices = {named[name].device for name in names}
        if len(devices) > 1:
            raise ValueError(f"PackedParameters: expected the model on one device, got {', '.join(map(str, devices))}")
        device = devices.pop()
        self._params = {name: named[name] for name in names}
        self._sets = {name: ticket.sets[name].to(device) for name in names}
        self._packed = {name: nn.Parameter(gather(named[name], self._sets[name]).float()) for name in names}
        table = TileTable.build(list(self._sets.values()), device=device, ranks=device.type != "cpu")
        members = list(self._params.values()), list(self._packed.values()), list(self._sets.values())
        self._gradients = PackedGradients(model, *members, table)

    def __repr__(self) -> str:
        k = sum(packed.numel() for packed in self._packed.values())
        return f"PackedParameters({k:,} entries of {len(self._packed)} parameters)"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(canonical name, parameter [k] of the active entries in slot order)"""
        yield from self._packed.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The packed parameters; their `.grad` is packed, too."""
        yield from self._packed.values()

    @torch.no_grad()
    def scatter_(self) -> None:
        """Writes the packed values into the model; every other entry keeps its bits."""
        for name, packed in self._packed.items():
            target = self._params[name]
            scatter_(target.detach(), self._sets[name], packed.detach().to(target.dtype))

    @torch.no_grad()
    def gather_(self) -> None:
        """Reads the values from the model, which others have changed."""
        for name, packed in self._packed.items():
            packed.copy_(gather(self._params[name], self._sets[name]))

    def attach(self, optimizer: _Optimizer) -> _Optimizer:
        """Writes the values into the model after every step of an optimizer, which it returns."""
        mine, theirs = set(map(id, self.parameters())), optimizer.param_groups
        if not any(id(param) in mine for group in theirs for param in group["params"]):
            raise ValueError(
                "PackedParameters.attach: this optimizer has none of the packed parameters; pass them to it"
            )
        optimizer.register_step_post_hook(lambda *_: self.scatter_())
        return optimizer

    def remove(self) -> None:
        """Takes the hooks off the model; its gradients are dense again."""
        self._gradients.remove()
