"""What trains: the parameters that a ticket names in a model, and those that train in full."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import canonical_parameters, is_floating, match_names
from ltp_sparse.weights.tensors import check_plain_tensor

_IN_TRANSFORMERS = (
    'Trainer(..., optimizer_cls_and_kwargs=(MaskedAdamW, {"model": model, "ticket": ticket, "lr": 2e-5}))'
)


def named_parameters(model: Any, *, what: str, mappings: bool = False) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of a module or, if that will do, of a mapping."""
    if isinstance(model, nn.Module):
        return canonical_parameters(model)
    if isinstance(model, Mapping) and mappings:
        return dict(model)
    expected = "the model or a mapping from names to parameters" if mappings else "the model"
    raise TypeError(
        f"{what}: expected {expected}, got {_described(model)}; a ticket names its parameters: give the model itself"
        + (", or dict(model.named_parameters()). In transformers: " + _IN_TRANSFORMERS if mappings else "")
    )


def _described(value: Any) -> str:
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "parameter groups without names"
    return f"a {type(value).__name__}"


def check_ticket(ticket: Any, *, what: str) -> None:
    """Raises TypeError unless it is a ticket."""
    if isinstance(ticket, Ticket):
        return
    if isinstance(ticket, str | PathLike):
        cure = f"load it: Ticket.load({str(ticket)!r})"
    elif isinstance(getattr(ticket, "ticket", None), Ticket):
        cure = "pass its .ticket"
    elif isinstance(ticket, Mapping):
        cure = "make one: Ticket.from_masks(masks) or Ticket.from_indices(...)"
    else:
        cure = "make one by ltp_sparse.select, Ticket.random or Ticket.full"
    raise TypeError(f"{what}: expected a Ticket, got {_described(ticket)}; {cure}")


def check_ordinary(param: Tensor, *, what: str, name: str = "") -> None:
    """Raises TypeError for a tensor whose entries are not an ordinary block of memory, such as a sharded one."""
    called = f"{name!r} is " if name else "got "
    if not isinstance(param, Tensor):
        raise TypeError(f"{what}: expected parameters, {called}a {type(param).__name__}")
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{what}: {called}a {type(param).__name__}, which is not supported yet: expected ordinary parameters. For "
            "sharded models (FSDP2, tensor parallelism) train without sharding, or by DistributedDataParallel"
        )
    check_plain_tensor(param, f"{what}: {name!r}" if name else f"{what}: a parameter")


def check_trainable(named: Mapping[str, nn.Parameter], *, what: str) -> None:
    """Raises ValueError or TypeError if a parameter of the ticket could not train as it is."""
    for name, param in named.items():
        check_ordinary(param, what=what, name=name)
        if not param.requires_grad:
            raise ValueError(
                f"{what}: expected a gradient for each parameter of the ticket, {name!r} takes none; call its "
                "requires_grad_(), or restrict the ticket"
            )
        if not param.is_leaf:
            raise ValueError(f"{what}: {name!r} is computed from other tensors; give the parameters it is made of")


def check_embeddings(model: nn.Module, named: Mapping[str, nn.Parameter], *, what: str) -> None:
    """Raises ValueError for an embedding of the ticket whose own options would change what must not change."""
    names: dict[Tensor, str] = {param: name for name, param in named.items()}
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
                f"{what}: the embedding {names[module.weight]!r} has scale_grad_by_freq=True, which works with "
                "dense gradients of the whole matrix alone; set it to False"
            )


class ParameterHome:
    """Where a model keeps its parameters, to see that they are still the ones that an optimizer has."""

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
        for module_ref, name, known in self._places:
            module = module_ref()
            now = None if module is None else module._parameters.get(name)
            if now is None or now is known():
                continue
            sharded = type(now).__torch_dispatch__ is not Tensor.__torch_dispatch__
            how = (
                f"a {type(now).__name__} (fully_shard of FSDP2 does so), which is not supported yet: train without "
                "sharding, or by DistributedDataParallel"
                if sharded
                else "another one (a model moved, resized, or loaded with assign=True does so): make a new optimizer"
            )
            raise ValueError(
                f"{what}: the parameter {name!r} of a {type(module).__name__} has been replaced since the optimizer "
                f"was made, and a step would train nothing; it is now {how}"
            )


def ticket_for(named: Mapping[str, nn.Parameter], ticket: Ticket, *, what: str) -> Ticket:
    """The ticket under the names of `named_parameters`; TypeError unless it is a ticket."""
    check_ticket(ticket, what=what)
    return ticket.named_as(named)


def active_names(named: Mapping[str, nn.Parameter], ticket: Ticket, *, what: str) -> list[str]:
    """The ticket's names with active entries; an error unless each is an ordinary parameter of the same shape here."""
    names = match_names(ticket.active_names, named, what=what, where="the model")
    for name in names:
        if not is_floating(named[name]):
            raise TypeError(
                f"{what}: {name!r} is quantised in the model ({type(named[name]).__name__} of {named[name].dtype}) and "
                "cannot train; leave it out (ticket.restrict, or pool= in the selection), the others train beside it"
            )
        if named[name].shape != ticket.shapes[name]:
            raise ValueError(
                f"{what}: {name!r} has shape {list(named[name].shape)} in the model and "
                f"{list(ticket.shapes[name])} in the ticket; select the ticket on this model"
            )
    return names


def dense_groups(dense: nn.Module | Iterable[Any], *, what: str) -> list[dict[str, Any]]:
    """Parameter groups from a module, parameters, or parameter groups."""
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
