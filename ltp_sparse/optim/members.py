"""The parameters that train: those that a ticket names in a model, and those that train in full."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from ltp_sparse.selection.shards import Part, TicketShard
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import Named, canonical_parameters, is_floating, match_names
from ltp_sparse.weights.sharding import Cut, is_sharded, local, reshard
from ltp_sparse.weights.tensors import check_plain_tensor

_IN_TRANSFORMERS = (
    'Trainer(..., optimizer_cls_and_kwargs=(MaskedAdamW, {"model": model, "ticket": ticket, "lr": 2e-5}))'
)


def named_parameters(model: Any, *, what: str, mappings: bool = False) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, of a module or, with `mappings`, of a mapping. `what`: the caller, for messages."""
    if isinstance(model, nn.Module):
        reshard(model)
        return canonical_parameters(model)
    if isinstance(model, Mapping) and mappings:
        return dict(model)
    expected = "the model or a mapping from names to parameters" if mappings else "the model"
    raise TypeError(
        f"{what}: expected {expected}, got {_described(model)}; a ticket goes by names, so pass the model itself"
        + (", or dict(model.named_parameters()). In transformers: " + _IN_TRANSFORMERS if mappings else "")
    )


def _described(value: Any) -> str:
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "parameter groups without names"
    return f"a {type(value).__name__}"


def check_ordinary(param: Tensor, *, what: str, name: str = "") -> None:
    """Raises TypeError unless a parameter is an ordinary tensor in memory; a sharded one is not."""
    called = f"{name!r} is " if name else "got "
    if not isinstance(param, Tensor):
        raise TypeError(f"{what}: expected parameters, {called}a {type(param).__name__}")
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{what}: {called}a {type(param).__name__}, a tensor with operations of its own; expected an ordinary "
            "parameter, or one that FSDP2 or tensor parallelism has sharded. If it is quantised, leave it out or "
            "dequantise it"
        )
    check_plain_tensor(param, f"{what}: {name!r}" if name else f"{what}: a parameter")


def check_engine(model: nn.Module, *, what: str) -> None:
    """Raises ValueError for a model whose parameters FSDP1 or DeepSpeed's ZeRO-3 has flattened."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    inside = fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
    if inside or any(hasattr(param, "_fsdp_flattened") for param in model.parameters()):  # also if it is around us
        by = "FullyShardedDataParallel (FSDP1)"
    elif any(hasattr(param, "ds_id") for param in model.parameters()):
        by = "DeepSpeed's ZeRO-3"
    else:
        return
    raise ValueError(
        f"{what}: expected parameters of the ticket's shapes, but {by} has flattened those of this model; shard it by "
        "torch.distributed.fsdp.fully_shard (FSDP2) instead"
    )


def trainable_parts(
    model: Any, ticket: Ticket | TicketShard, *, what: str, mappings: bool = False
) -> tuple[dict[str, nn.Parameter], dict[str, Part]]:
    """(`named_parameters`, `parts_of` the ticket), after checks that these can be trained.

    Raises:
        ValueError, TypeError: as in `named_parameters` and `parts_of`, or a parameter of the ticket cannot be trained.
    """
    if isinstance(model, nn.Module):
        check_engine(model, what=what)
    named = named_parameters(model, what=what, mappings=mappings)
    parts = parts_of(named, ticket, what=what)
    for name in parts:
        check_ordinary(local(named[name]), what=what, name=name)
        if not named[name].requires_grad:
            raise ValueError(
                f"{what}: expected parameters with gradients, but {name!r} of the ticket has requires_grad=False; call "
                "its requires_grad_(), or restrict the ticket"
            )
        if not named[name].is_leaf:
            raise ValueError(f"{what}: {name!r} is computed from other tensors; pass the parameters it is made of")
    if isinstance(model, nn.Module):
        _check_embeddings(model, {named[name]: name for name in parts}, what=what)
    return named, parts


def _check_embeddings(model: nn.Module, names: Mapping[Tensor, str], *, what: str) -> None:
    """Raises ValueError for an embedding of the ticket whose options need or change inactive entries."""
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.weight not in names:
            continue
        if module.max_norm is not None:
            raise ValueError(
                f"{what}: the embedding {names[module.weight]!r} has max_norm={module.max_norm}, which moves entries "
                "outside the ticket in every forward pass; set its max_norm to None"
            )
        if module.scale_grad_by_freq:
            raise ValueError(
                f"{what}: the embedding {names[module.weight]!r} has scale_grad_by_freq=True, which needs "
                "dense gradients of the whole matrix; set it to False"
            )


class ParameterHome:
    """Notices when parameters of a model are replaced, since an optimizer would go on with the old ones."""

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
        known = set(map(id, named.values()))
        self._places = [
            (weakref.ref(module), name, weakref.ref(param))
            for module in model.modules()
            for name, param in module._parameters.items()
            if param is not None and id(param) in known
        ]

    def check(self, *, what: str) -> None:
        """Raises ValueError if a parameter of the model was replaced by another."""
        for module, name, _, _ in self._replaced():
            raise ValueError(
                f"{what}: the parameter {name!r} of a {type(module).__name__} has been replaced since the optimizer "
                "was made, so a step would not change the model (moving, resizing, sharding, or loading with "
                "assign=True can replace parameters); make a new optimizer"
            )

    def awaits_sharded(self) -> bool:
        """Whether an ordinary parameter was replaced, which `fully_shard` does."""
        return any(known is not None and not is_sharded(known) for _, _, known, _ in self._replaced())

    def sharded(self, model: nn.Module, *, what: str) -> dict[nn.Parameter, nn.Parameter]:
        """Old parameter -> the sharded parameter that has replaced it.

        Raises:
            ValueError: a parameter was replaced by anything other than its own sharded form.
        """
        if next(self._replaced(), None) is None:
            return {}
        reshard(model)
        moved: dict[nn.Parameter, nn.Parameter] = {}
        for _, _, known, now in self._replaced():
            if known is None or is_sharded(known) or not is_sharded(now) or now.shape != known.shape:
                self.check(what=what)
            moved[known] = now
        return moved

    def _replaced(self) -> Iterator[tuple[nn.Module, str, Any, nn.Parameter]]:
        """(module, name, parameter at construction, present parameter), for each that was replaced."""
        for module_ref, name, known in self._places:
            module = module_ref()
            now = None if module is None else module._parameters.get(name)
            if module is not None and now is not None and now is not known():
                yield module, name, known(), now


def ticket_for(named: Mapping[str, nn.Parameter], ticket: Ticket, *, what: str) -> Ticket:
    """The ticket under the names of `named_parameters`.

    Raises:
        TypeError: it is no `Ticket`; the message says how to get one.
    """
    if isinstance(ticket, Ticket):
        return ticket.named_as(named)
    if isinstance(ticket, str | PathLike):
        cure = f"load it: Ticket.load({str(ticket)!r})"
    elif isinstance(getattr(ticket, "ticket", None), Ticket):
        cure = "pass its .ticket"
    elif isinstance(ticket, Mapping):
        cure = "make one: Ticket.from_masks(masks) or Ticket.from_indices(...)"
    else:
        cure = "make one by ltp_sparse.select, Ticket.random or Ticket.full"
    raise TypeError(f"{what}: expected a Ticket, got {_described(ticket)}; {cure}")


def active_names(named: Mapping[str, nn.Parameter], ticket: Ticket, *, what: str) -> list[str]:
    """The names of the ticket's parameters with active entries.

    Raises:
        ValueError: a name is not in the model, or its shape differs.
        TypeError: a parameter is quantised.
    """
    names = match_names(ticket.active_names, named, what=what, where="the model")
    for name in names:
        if not is_floating(named[name]):
            raise TypeError(
                f"{what}: {name!r} is quantised in the model ({type(named[name]).__name__} of {named[name].dtype}) and "
                "cannot train; leave it out (ticket.restrict, or pool= in the selection) and train the others"
            )
        if named[name].shape != ticket.shapes[name]:
            raise ValueError(
                f"{what}: {name!r} has shape {list(named[name].shape)} in the model and "
                f"{list(ticket.shapes[name])} in the ticket; select the ticket on this model"
            )
    return names


def parts_of(named: Mapping[str, nn.Parameter], ticket: Ticket | TicketShard, *, what: str) -> dict[str, Part]:
    """Name -> this rank's part of its active entries, for parameters with active entries on any rank.

    Raises:
        ValueError: as `active_names`, or a part of a `TicketShard` covers other entries than this rank holds.
    """
    if isinstance(ticket, TicketShard):
        return _parts_of_shard(named, ticket, what=what)
    ticket = ticket_for(named, ticket, what=what)
    cuts = {name: Cut.of(named[name], f"{what}: {name!r}") for name in active_names(named, ticket, what=what)}
    return {name: Part.of(ticket.sets[name], cut) for name, cut in cuts.items()}


def _parts_of_shard(named: Mapping[str, nn.Parameter], ticket: TicketShard, *, what: str) -> dict[str, Part]:
    called = {name: named.called(name) or name if isinstance(named, Named) else name for name in ticket.parts}
    parts = {called[name]: part for name, part in ticket.parts.items() if part.k}
    match_names(list(parts), named, what=what, where="the model")
    for name, canonical in called.items():
        if canonical not in parts:
            continue
        shard, param = ticket.shards[name], named[canonical]
        cut = Cut.of(param, f"{what}: {canonical!r}")
        if tuple(shard.shape) != cut.shape or not cut.by_rows or cut.entries != (shard.start, shard.stop):
            holds = f"entries {cut.entries[0]} to {cut.entries[1]}" if cut.by_rows else "some columns"
            raise ValueError(
                f"{what}: this rank's part of the ticket has the entries {shard.start} to {shard.stop} of "
                f"{canonical!r} with shape {list(shard.shape)}, and the model {holds} of {list(cut.shape)}; call "
                "select_sharded on the model sharded as it trains, or pass the whole ticket"
            )
    return parts


def check_not_in_both(ticketed: Mapping[str, nn.Parameter], dense: Iterable[nn.Parameter], *, what: str) -> None:
    """Raises ValueError if a parameter of the ticket is also in `dense`, as with tied embeddings."""
    in_full = set(map(id, dense))
    for name, param in ticketed.items():
        if id(param) in in_full:
            raise ValueError(
                f"{what}: {name!r} is both in the ticket and in dense, in more than one parameter group; leave it, or "
                "what is tied to it, out of one of them"
            )


def dense_groups(dense: nn.Module | Iterable[Any], *, what: str) -> list[dict[str, Any]]:
    """Parameter groups from a module, parameters, or parameter groups.

    Raises:
        TypeError: `dense` is anything else, or a mixture.
    """
    if isinstance(dense, Tensor):
        dense = [dense]
    if isinstance(dense, str | Mapping) or not isinstance(dense, Iterable | nn.Module):
        raise TypeError(
            f"{what}: dense must be a module, parameters, or a list of parameter groups, got {_described(dense)}; for "
            "a head: dense=model.classifier"
        )
    items = list(dense.parameters() if isinstance(dense, nn.Module) else dense)
    if all(isinstance(item, Tensor) for item in items):
        return [{"params": items}] if items else []
    if not all(isinstance(item, dict) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise TypeError(f"{what}: dense must be a module, parameters, or parameter groups, not a mixture; got {kinds}")
    alone = [isinstance(group["params"], Tensor) for group in items]
    return [{**g, "params": [g["params"]] if one else list(g["params"])} for g, one in zip(items, alone, strict=True)]


def dense_parameters(dense: nn.Module | Iterable[Any], *, what: str) -> list[nn.Parameter]:
    """The parameters of `dense_groups`."""
    return [parameter for group in dense_groups(dense, what=what) for parameter in group["params"]]
