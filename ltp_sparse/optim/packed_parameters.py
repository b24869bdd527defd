"""`PackedParameters`: the entries of a ticket as ordinary parameters, for any torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.entries import entries_of, gathered
from ltp_sparse.optim.members import ParameterHome, check_not_in_both, dense_parameters, trainable_parts
from ltp_sparse.optim.packed_gradients import PackedGradients, WeakHook, check_unpacked
from ltp_sparse.selection.shards import TicketShard
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.tickets.tile_table import TileTable
from ltp_sparse.weights.sharding import is_sharded, local, reshard
from ltp_sparse.weights.tensors import edits_of

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


class PackedParameters:
    """The active entries of every tensor as one float32 parameter [k], with packed gradients.

    packed = ls.PackedParameters(model, ticket)
    opt = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1, momentum=0.9))
    loss.backward(); opt.step(); opt.zero_grad()

    Optimizers that work entry by entry (SGD, Adam, RMSprop, schedule-free, 8-bit ones, ...) give the active entries
    the values that they would give them in a masked dense tensor. Optimizers that use the shape of a matrix see vectors
    here: Muon, which needs matrices, refuses them, and Adafactor does not factor its moments. The float32 values are
    masters, which are rounded into a model in bfloat16; its checkpoints need them besides the optimizer's state, so
    save `dict(packed.named_parameters())` and copy them back. For AdamW, `MaskedAdamW` does the same in one pass and
    without a copy of the values.

    The values are written into the model after every step of an attached optimizer. They are also written before a
    forward pass if they have changed, e.g. in a closure that is called several times (LBFGS) or by the `eval()` of a
    schedule-free optimizer. Call `scatter_()` if the weights are read in any other situation. If other code changes the
    weights, e.g. by loading a checkpoint, the next step of an attached optimizer starts from its values; edits in place
    of their `.data`, which torch does not count, need a `gather_()`. Embeddings of the ticket become `sparse=True`
    until `remove()`.

    If the model is sharded by FSDP2 or tensor parallelism, each rank has the k entries of its shards, and a norm of
    their gradients is that of this rank alone. Shard the model first.

    Args:
        model: the module whose weights train, all of them on one device.
        ticket: the active entries; for a sharded model, the whole ticket or this rank's part.
        dense: parameters that train in full, such as a head: a module, parameters or parameter groups. `parameters()`
            yields them after the packed ones.

    Raises:
        ValueError: no name of the ticket is in the model, a shape differs, the ticket has no active entry, one of its
            parameters has no gradient or is also in `dense`, or another optimizer already packs the gradients. Nothing
            has changed then.
    """

    def __init__(
        self, model: nn.Module, ticket: Ticket | TicketShard, *, dense: nn.Module | Iterable[Any] = ()
    ) -> None:
        named, parts = trainable_parts(model, ticket, what="PackedParameters")
        if not parts:
            raise ValueError("PackedParameters: expected a ticket with active entries, but this one has none")
        self._params = {name: named[name] for name in parts}
        self._dense = dense_parameters(dense, what="PackedParameters")
        check_not_in_both(self._params, self._dense, what="PackedParameters")
        for name, param in self._params.items():
            check_unpacked(name, param, what="PackedParameters")
        devices = {param.device for param in self._params.values()}
        if len(devices) > 1:
            raise ValueError(f"PackedParameters: expected the model on one device, got {', '.join(map(str, devices))}")
        device = devices.pop()
        self._model = weakref.ref(model)
        self._sets = {name: part.index_set.to(device) for name, part in parts.items()}
        self._entries = entries_of(self._held(), self._sets)
        held = gathered(self._entries, self._held())
        self._packed = {name: nn.Parameter(held[name].to(torch.float32, copy=True)) for name in parts}
        table = TileTable.build(list(self._sets.values()), device=device, ranks=device.type != "cpu")
        members = list(self._params.values()), list(self._sets.values()), table, list(self._packed.values())
        self._gradients = PackedGradients(model, *members)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(WeakHook(self._before_forward), prepend=True)  # before FSDP2 gathers
        ]
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._note()
        self._home = ParameterHome(model, self._params)

    def __repr__(self) -> str:
        k = sum(packed.numel() for packed in self._packed.values())
        return f"PackedParameters({k:,} entries of {len(self._packed)} parameters)"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (canonical name, parameter [k] of the active entries in slot order)."""
        yield from self._packed.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the packed parameters, whose `.grad` is packed as well, and then the dense ones."""
        yield from self._packed.values()
        yield from self._dense

    def _held(self) -> dict[str, Tensor]:
        """Name -> the parameter, or this rank's shard of it."""
        return {name: local(param) for name, param in self._params.items()}

    @torch.no_grad()
    def scatter_(self) -> None:
        """Writes the packed values into the model. All other entries keep their bits."""
        self._reshard()
        held = self._held()
        for entries in self._entries:
            entries.scatter_(held, entries.join(self._packed))
        self._note()

    @torch.no_grad()
    def gather_(self) -> None:
        """Reads the values that other code has changed in the model. A packed value that rounds to its weight stays."""
        for name, weights in gathered(self._entries, self._held()).items():
            packed = self._packed[name]
            packed.copy_(torch.where(packed.to(weights.dtype) == weights, packed, weights.float()))
        self._note()

    def _note(self) -> None:
        """Notes that packed values and weights agree."""
        self._written, self._read = (edits_of(of.values()) for of in (self._packed, self._held()))

    def _before_forward(self, *_: object) -> None:
        if edits_of(self._packed.values()) != self._written:
            self.scatter_()

    def attach(self, optimizer: _Optimizer) -> _Optimizer:
        """Makes every step of an optimizer write the values into the model.

        A step also uses changes that other code has made to the `.grad` of the model's parameters. The optimizer keeps
        this object alive. Without an attached optimizer keep a reference yourself, or the hooks disappear.

        Args:
            optimizer: one that has packed parameters.

        Returns:
            The optimizer.

        Raises:
            ValueError: it has none.
        """
        mine, theirs = set(map(id, self._packed.values())), optimizer.param_groups
        if not any(id(param) in mine for group in theirs for param in group["params"]):
            raise ValueError(
                "PackedParameters.attach: this optimizer has none of the packed parameters; pass them to it"
            )
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._before_step()))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.scatter_()))
        return optimizer

    def _reshard(self) -> None:
        model = self._model()
        if model is not None and any(map(is_sharded, self._params.values())):
            reshard(model)

    def _before_step(self) -> None:
        self._reshard()
        self._home.check(what="PackedParameters")
        if edits_of(self._held().values()) != self._read and edits_of(self._packed.values()) == self._written:
            self.gather_()
        self._gradients.settle()

    def __getstate__(self) -> Any:
        raise TypeError(
            "PackedParameters hooks into its model and optimizer and cannot be copied; make another for the copy of "
            "the model, and load the optimizer's state_dict"
        )

    def remove(self) -> None:
        """Removes all hooks. Gradients are dense again, and steps no longer change the model."""
        _remove(self._handles)
        self._gradients.remove()


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
