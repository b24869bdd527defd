"""The parts of a follower's model that are not published: names, dtypes, shapes, and bits outside the ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ltp_sparse.optim.frozen import Inactive
from ltp_sparse.sync.local import Local
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.digests import fingerprint
from ltp_sparse.weights.names import Named
from ltp_sparse.weights.reading import closest


def inactive_digests(weights: Sequence[Local], ticket: Ticket) -> dict[tuple[str, int], str]:
    """(name, first entry) of each part of a weight -> digest of its entries outside the ticket, if it has any."""
    pieces: dict[str, Tensor | Inactive] = {}
    keys = []
    for local in weights:
        index_set = ticket.sets.get(local.name)
        if index_set is not None and index_set.k == index_set.n:
            continue
        flat = local.tensor.reshape(-1)
        has_active = index_set is not None and index_set.k > 0
        piece = Inactive(flat, ticket.entries(local.name, local.start, local.stop)) if has_active else flat
        keys.append((local.name, local.start))
        pieces[f"{local.name} from {local.start}"] = piece
    return dict(zip(keys, fingerprint(pieces).values(), strict=True))


def described(weights: Sequence[Local], inactive: Mapping[tuple[str, int], str]) -> tuple[dict[str, Any], list[str]]:
    """(description of this process's weights in JSON, digests of their entries outside the ticket)."""
    everything = [[x.name, str(x.tensor.dtype).removeprefix("torch."), list(x.shape)] for x in weights]
    pieces = [[x.name, x.start, x.stop] for x in weights if (x.name, x.start) in inactive]
    return {"weights": everything, "inactive": pieces}, list(inactive.values())


def check_base(tensors: Named[Tensor], base: Mapping[str, Any], digests: Sequence[str], ticket: Ticket) -> None:
    """Compares a model with the result of `described`.

    Args:
        tensors: name -> weight of the model.
        base: the description.
        digests: the digests.
        ticket: the ticket, under the names of the publisher.

    Raises:
        ValueError: a weight is missing or has another dtype or shape, or other bits outside the ticket.
    """
    for name, dtype, shape in base["weights"]:
        if tensors.called(name) is None:
            raise ValueError(f"Follower: the model has no weight {name!r}; closest: {closest(name, tensors)}")
        tensor = tensors[name]
        if (str(tensor.dtype), list(tensor.shape)) != (f"torch.{dtype}", shape):
            raise ValueError(
                f"Follower: {name!r} is {tensor.dtype} {list(tensor.shape)} in the model, but torch.{dtype} {shape} in "
                "the published one; load the trainer's initial model, in its dtype"
            )
    pieces = [
        Local(name, tensors[name].detach().reshape(-1)[start:stop], start, tensors[name].shape)
        for name, start, stop in base["inactive"]
    ]
    found = inactive_digests(pieces, ticket)
    for piece, digest in zip(pieces, digests, strict=True):
        if found.get((piece.name, piece.start)) != digest:
            raise ValueError(
                f"Follower: {piece.name!r} differs from the published model outside the ticket, where nothing is "
                "published; load the trainer's initial model"
            )
