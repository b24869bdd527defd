"""Selection: which weights moved most between two versions of a model, and how the budget is shared."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from ltp_sparse import backends, ops
from ltp_sparse.checkpoints import CheckpointTensor, Readable, StreamSource, open_checkpoint
from ltp_sparse.encoding import IndexSet
from ltp_sparse.names import canonical_tensors, closest, digest, fingerprint
from ltp_sparse.selection import pools
from ltp_sparse.selection.budgets import Budget, share_out
from ltp_sparse.ticket import Pool, Ticket, in_pool
from ltp_sparse.topk import NonFiniteDelta, select_topk

__all__ = ["ShortTicket", "pools", "select"]

Weights = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A version of a model: a module, name -> tensor, or a safetensors checkpoint (file or folder)."""


class ShortTicket(UserWarning):
    """Fewer entries have moved than were asked for."""


def select(
    initial: Weights,
    tuned: Weights | None = None,
    *,
    density: float | None = None,
    k: int | None = None,
    budget: Budget = "global",
    pool: Pool = None,
    score: Mapping[str, Tensor] | None = None,
    method: str = "delta",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Ticket:
    """The ticket of the entries that moved most from `initial` to `tuned`: exactly k, ties to the earliest.

    Args:
        initial: the base model, as a module, a mapping from names to tensors, or the path of a safetensors checkpoint,
            which is read from disk piece by piece.
        tuned: the tuned model, likewise.
        density: share of the pool, floor(density * entries) in exact decimals; or
        k: number of entries.
        budget: "global"; "layer" or "tensor" at equal density each; or shares of k by regular expression.
        pool: which parameters may be selected: a predicate on names, regular expressions, or None for all common ones.
        score: ranks by |score| instead of by |tuned - initial|; name -> tensor of the parameter's shape.
        method: a word for the metadata.
        metadata: added to the ticket's.
        progress: show a bar while checkpoints are read.

    Returns:
        A ticket over the pool; its metadata hold the requested and the real k and the thresholds (smallest selected
        score by group), its fingerprint the digests of the initial tensors.

    Warns:
        ShortTicket: fewer entries than k have moved at all; those that did are the ticket.

    Raises:
        ValueError: names, shapes or budgets do not fit, or a delta is NaN or infinite (the parameter is named).
    """
    if (tuned is None) == (score is None):
        raise ValueError("select: give either tuned= or score=")
    base = _readable(initial)
    scored = canonical_tensors(score) if score is not None else _readable(tuned)  # type: ignore[arg-type]
    names = in_pool(_common(base, scored), pool)
    shapes = {name: base[name].shape for name in names}
    for name in names:
        if scored[name].shape != shapes[name]:
            raise ValueError(
                f"select: {name!r} has shape {list(shapes[name])} in the initial model and {list(scored[name].shape)} "
                "in the other; they must be versions of one model"
            )
    names, groups, labels, ks = share_out(shapes, budget, density=density, k=k)
    before = {} if score is not None else {name: base[name] for name in names}
    after = {name: scored[name] for name in names}
    try:
        sets, thresholds = _topk(before, after, groups, ks, progress)
    except NonFiniteDelta as error:
        raise NonFiniteDelta(error.tensor, repr(names[error.tensor])) from None

    ticket = Ticket(dict(zip(names, sets, strict=True)), {name: shapes[name] for name in names})
    ticket.fingerprint = _fingerprint({name: base[name] for name in ticket.active_names})
    ticket.metadata = {
        "method": method,
        "density": density if density is not None else sum(ks) / ticket.n,
        "budget": dict(budget) if isinstance(budget, Mapping) else budget,
        "requested_k": sum(ks),
        "k": ticket.k,
        "thresholds": {label: t for label, t in zip(labels, thresholds.tolist(), strict=True) if t != float("inf")},
        **(metadata or {}),
    }
    if ticket.k < sum(ks):
        warnings.warn(
            f"select: {sum(ks):,} entries were asked for, only {ticket.k:,} of {ticket.n:,} have moved; "
            "the ticket holds these. Tune longer, or lower the density",
            ShortTicket,
            stacklevel=2,
        )
    return ticket


def _readable(weights: Weights) -> Mapping[str, Readable]:
    return open_checkpoint(weights) if isinstance(weights, str | os.PathLike) else canonical_tensors(weights)


def _common(base: Mapping[str, Readable], scored: Mapping[str, Readable]) -> list[str]:
    common = [name for name in base if name in scored]
    if not common:
        name = next(iter(scored), "")
        raise ValueError(f"select: the models share no parameter; {name!r} is closest to {closest(name, base)}")
    return common


def _topk(
    before: Mapping[str, Readable], after: Mapping[str, Readable], groups: list[int], ks: list[int], progress: bool
) -> tuple[list[IndexSet], Tensor]:
    """An index set per tensor and the thresholds: in memory by the operation, from disk by streaming."""
    initial = [t for t in before.values() if isinstance(t, Tensor)]
    tuned = [t for t in after.values() if isinstance(t, Tensor)]
    if len(initial) == len(before) and len(tuned) == len(after):
        return ops.topk_delta(initial, tuned, ks, groups=groups)
    source = StreamSource(before, after)
    with progress_bar(2 * source.nbytes, "select") if progress else nullcontext() as source.progress:
        selection = select_topk(backends.resolve(source.device), source, groups, ks, route="histogram")
    return ops.index_sets(selection, source.sizes), selection.thresholds


def progress_bar(nbytes: int, what: str) -> Any:
    """A bar over bytes that are read."""
    from tqdm.auto import tqdm

    return tqdm(total=nbytes, desc=what, unit="B", unit_scale=True)


def _fingerprint(tensors: Mapping[str, Readable]) -> dict[str, str]:
    in_memory = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    on_disk = {
        name: digest(t.dtype, t.shape, t.pieces()) for name, t in tensors.items() if isinstance(t, CheckpointTensor)
    }
    return {**fingerprint(in_memory), **on_disk}
