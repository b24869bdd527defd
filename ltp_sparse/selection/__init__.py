"""Selection: which weights moved most between two versions of a model, and how the budget is shared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltp_sparse import backends, files, ops
from ltp_sparse.checkpoints import Readable, Reader, StreamSource
from ltp_sparse.encoding import IndexSet, bitmap_words
from ltp_sparse.selection import pools, scores
from ltp_sparse.selection.budgets import Budget, share_out
from ltp_sparse.selection.by_tensor import PASSES, Spool, select_by_tensor
from ltp_sparse.selection.distributed import Shard, TicketShard, select_sharded
from ltp_sparse.selection.outcome import ShortTicket, describe
from ltp_sparse.selection.sources import (
    Score,
    Weights,
    check_shape,
    common_names,
    device_of,
    fingerprint,
    open_weights,
    score_reader,
)
from ltp_sparse.ticket import Pool, Ticket, in_pool
from ltp_sparse.topk import NonFiniteDelta, sampling_pays, select_topk

__all__ = ["Shard", "ShortTicket", "TicketShard", "Weights", "pools", "scores", "select", "select_sharded"]

LARGE = 512_000_000
"""Bytes: a bitmap of more is made tensor by tensor when the weights are streamed, a ticket of more kept on disk."""


def select(
    initial: Weights,
    tuned: Weights | None = None,
    *,
    density: float | None = None,
    k: int | None = None,
    budget: Budget = "global",
    pool: Pool = None,
    score: Score | None = None,
    method: str = "delta",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
    output: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
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
        score: ranks by |score| instead of by |tuned - initial|. A mapping from names to tensors of the parameters'
            shapes; or a function of (name, start, stop) that gives the scores of entries start..stop of a parameter's
            row-major order as a float32, bfloat16 or float16 tensor, the same ones whenever it is asked, so that no
            tensor of the model's size is needed. `selection.scores` has some.
        method: a word for the metadata.
        metadata: added to the ticket's.
        progress: show a bar while checkpoints are read.
        output: a file that the ticket is saved to. When checkpoints are read, a ticket over 512 MB is then kept on disk
            instead of in memory: its index sets are written to that folder as they are made, and read from there when
            they are looked at.
        device: where checkpoints are selected, which gives a ticket on the CPU anyway; None: on a GPU if there is one,
            to which the next piece is read and copied while it works on one. Tensors in memory are selected where they
            are.

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
    if output is not None:
        files.check_writable(output)
    base = open_weights(initial)
    if callable(score):
        after = base
    else:
        after = open_weights(tuned if score is None else score)  # type: ignore[arg-type]
    names = in_pool(common_names(base, after), pool)
    for name in names:
        check_shape(name, base[name].shape, after[name].shape)
    names, groups, labels, ks = share_out({name: base[name].shape for name in names}, budget, density=density, k=k)
    before = [base[name] for name in names] if score is None else []
    folder = None if output is None else Path(output).parent
    try:
        if callable(score):
            device = device_of(base)
            scored = [score_reader(score, name, base[name].numel(), device) for name in names]
            sets, thresholds = _streamed(StreamSource([], scored, device), groups, ks, progress, folder)
        else:
            sets, thresholds = _topk(before, [after[name] for name in names], groups, ks, progress, folder, device)
    except NonFiniteDelta as error:
        raise NonFiniteDelta(error.tensor, repr(names[error.tensor])) from None

    ticket = Ticket(dict(zip(names, sets, strict=True)), {name: base[name].shape for name in names})
    ticket.fingerprint = fingerprint({name: base[name] for name in ticket.active_names})
    ticket.metadata = describe(
        ks,
        labels,
        thresholds,
        found=ticket.k,
        pool=ticket.n,
        density=density,
        budget=budget,
        method=method,
        metadata=metadata,
    )
    if output is not None:
        ticket.save(output)
    return ticket


def _topk(
    initial: list[Readable],
    tuned: list[Readable],
    groups: list[int],
    ks: list[int],
    progress: bool,
    folder: Path | None,
    device: torch.device | str | None,
) -> tuple[list[IndexSet], Tensor]:
    """An index set per tensor and the thresholds: in memory by the operation, from disk by streaming."""
    before = [t for t in initial if isinstance(t, Tensor)]
    after = [t for t in tuned if isinstance(t, Tensor)]
    if len(before) == len(initial) and len(after) == len(tuned):
        return ops.topk_delta(before, after, ks, groups=groups)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = StreamSource([Reader.of(t) for t in initial], [Reader.of(t) for t in tuned], device)
    sets, thresholds = _streamed(source, groups, ks, progress, folder)
    return [index_set.to("cpu") for index_set in sets], thresholds


@torch.no_grad()
def _streamed(
    source: StreamSource, groups: list[int], ks: list[int], progress: bool, folder: Path | None
) -> tuple[list[IndexSet], Tensor]:
    """As `_topk`; folder: where index sets that are too large for memory may be kept, if anywhere."""
    passes, bitmap = backends.resolve(source.device, "topk_delta"), 4 * sum(map(bitmap_words, source.sizes))
    by_tensor = bitmap > LARGE
    times = PASSES if by_tensor else 1 if sampling_pays(source) else 2
    with readings_bar(source.nbytes, times) if progress else nullcontext() as source.progress:
        if by_tensor:
            spooled = folder if min(bitmap, 2 * sum(ks)) > LARGE else None
            with nullcontext() if spooled is None else Spool(spooled) as spool:
                return select_by_tensor(passes, source, groups, ks, spool)
        selection = select_topk(passes, source, groups, ks)
    return ops.index_sets(selection, source.sizes), selection.thresholds


def readings_bar(nbytes: int, times: int) -> Any:
    """A bar over readings of so many bytes; it grows by one where one more is necessary, as among many equal deltas."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            total = self.total or 0
            if self.n + (n or 0) > total:
                self.total = total + nbytes
            return super().update(n)

    return Bar(total=times * nbytes, desc="select", unit="B", unit_scale=True)
