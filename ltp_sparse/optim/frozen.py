"""Proof that training left all entries outside a ticket as they were: their digests, before and after.

before = ls.frozen_digests(model, ticket)
...                                          # train
ls.verify_frozen(before, model, ticket)      # raises if a bit of an inactive entry has changed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ltp_sparse.optim.members import dense_parameters, named_parameters, parts_of
from ltp_sparse.selection.shards import TicketShard
from ltp_sparse.tickets.bits import bitmap_words, unpack_bits
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.digests import fingerprint
from ltp_sparse.weights.sharding import local
from ltp_sparse.weights.tensors import check_plain_tensor, flat_piece


def frozen_digests(
    model: nn.Module,
    ticket: Ticket | TicketShard,
    dense: nn.Module | Iterable[Any] = (),
    *,
    like: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Canonical name -> digest of a parameter's shape, dtype and the bits of its inactive entries.

    It works on pieces of some MiB, on all threads of torch, and makes no copy of the model; parameters on a GPU are
    copied to the host piece by piece. Buffers are not included. For a sharded model, the digests are those of this
    rank's shards.

    Args:
        model: the model that is trained.
        ticket: the active entries.
        dense: a module, parameters or parameter groups that train in full. They are left out, and so are parameters
            without an inactive entry.
        like: digests that the result will be compared with; those of earlier versions used another hash function.

    Raises:
        ValueError: the ticket is not of this model.
    """
    named = named_parameters(model, what="frozen_digests")
    sets = {name: part.index_set for name, part in parts_of(named, ticket, what="frozen_digests").items()}
    trained = set(map(id, dense_parameters(dense, what="frozen_digests")))
    watched: dict[str, Tensor | Inactive] = {}
    for name, parameter in named.items():
        if id(parameter) in trained or (name in sets and sets[name].k == sets[name].n):
            continue
        tensor = local(parameter).detach()
        check_plain_tensor(tensor, f"frozen_digests: {name!r}")
        watched[name] = Inactive(tensor, sets[name]) if name in sets and sets[name].k else tensor
    return fingerprint(watched, like)


def verify_frozen(
    before: Mapping[str, str], model: nn.Module, ticket: Ticket | TicketShard, dense: nn.Module | Iterable[Any] = ()
) -> None:
    """Compares the current `frozen_digests` with earlier ones.

    Args:
        before: the result of `frozen_digests` before training.
        model, ticket, dense: as in that call.

    Raises:
        RuntimeError: the inactive entries of a parameter have changed; the message names the first.
        ValueError: the model has other parameters than before.
    """
    after = frozen_digests(model, ticket, dense, like=before)
    if other := before.keys() ^ after.keys():
        raise ValueError(
            f"verify_frozen: expected the same parameters as before, but {min(other)!r} was added or removed "
            f"({len(other)} in all); pass the same model, ticket and dense"
        )
    check_unchanged(before, after, what="verify_frozen")


def check_unchanged(before: Mapping[str, str], after: Mapping[str, str], *, what: str) -> None:
    """Compares digests of parameters.

    Args:
        before: name -> digest before training.
        after: name -> digest now.
        what: the caller, for messages.

    Raises:
        RuntimeError: digests differ; the message names the first parameter.
    """
    if changed := [name for name, found in after.items() if found != before[name]]:
        raise RuntimeError(
            f"{what}: entries of {changed[0]!r} that must not train have changed ({len(changed)} parameters in all)"
        )


class Inactive:
    """A tensor that is read in pieces (`weights.digests.Pieces`) with its active entries set to zero.

    Args:
        tensor: the tensor, on any device.
        index_set: its active entries.
    """

    def __init__(self, tensor: Tensor, index_set: IndexSet) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._tensor, self._words = tensor, index_set.bitmap()

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the row-major order, on the CPU; `start` is the first of a tile."""
        piece = flat_piece(self._tensor, start, stop).cpu().clone()
        active = unpack_bits(self._words[start // 32 :][: bitmap_words(stop - start)])
        return piece.masked_fill_(active[: stop - start], 0)

    def release(self, start: int, stop: int) -> None:
        """Does nothing: a tensor in memory stays there."""
