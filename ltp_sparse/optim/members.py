"""What trains: the parameters that a ticket names in a model, and those that train in full."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ltp_sparse.names import match_names
from ltp_sparse.ticket import Ticket


def active_names(named: Mapping[str, nn.Parameter], ticket: Ticket, *, what: str) -> list[str]:
    """The ticket's names with active entries; ValueError unless each is a parameter of the same shape here."""
    names = match_names(ticket.active_names, named, what=what, where="the model")
    for name in names:
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
    items = list(dense.parameters() if isinstance(dense, nn.Module) else dense)
    if all(isinstance(item, Tensor) for item in items):
        return [{"params": items}] if items else []
    if not all(isinstance(item, dict) for item in items):
        raise TypeError(f"{what}: dense must be a module, parameters, or parameter groups, not a mixture")
    alone = [isinstance(group["params"], Tensor) for group in items]
    return [{**g, "params": [g["params"]] if one else list(g["params"])} for g, one in zip(items, alone, strict=True)]


def dense_parameters(dense: nn.Module | Iterable[Any], *, what: str) -> list[nn.Parameter]:
    """The parameters of `dense_groups`."""
    return [parameter for group in dense_groups(dense, what=what) for parameter in group["params"]]
