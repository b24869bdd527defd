"""Selection: which weights moved most between two versions of a model, and how the budget is divided."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltp_sparse import backends, ops
from ltp_sparse.ops.routes import NonFiniteDelta, sampling_pays, select_topk
from ltp_sparse.ops.sources import Reader, StreamSource, TensorSource
from ltp_sparse.selection import pools, scores, sources
from ltp_sparse.selection.budgets import Budget, share_out
from ltp_sparse.selection.by_tensor import PASSES, Spool, select_by_tensor
from ltp_sparse.selection.distributed import select_sharded
from ltp_sparse.selection.outcome import ShortTicket, describe
from ltp_sparse.selection.shards import Shard, TicketShard
from ltp_sparse.selection.sources import MixedDtypes, Score, Sides
from ltp_sparse.tickets.bits import bitmap_words, tiles_of
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Pool, Ticket
from ltp_sparse.weights import files
from ltp_sparse.weights.checkpoints import CheckpointTensor, Readable
from ltp_sparse.weights.digests import fingerprint, of_tiles
from ltp_sparse.weights.versions import Missing, Weights

__all__ = [
    "MixedDtypes",
    "Shard",
    "ShortTicket",
    "TicketShard",
    "Weights",
    "pools",
    "scores",
    "select",
    "select_sharded",
]

LARGE = 512_000_000
"""Bytes. Larger bitmaps of streamed weights are made tensor by tensor, larger tickets kept on disk."""


def select(
    initial: Weights,
    tuned: Weights | None = None,
    *,
    density: float | None = None,
    k: int | None = None,
    budget: Budget = "global",
    pool: Pool = None,
    allow_missing: Missing = False,
    compare_in: torch.dtype | None = None,
    score: Score | None = None,
    method: str = "delta",
    metadata: Mapping[str, Any] | None = None,
    progress: bool = False,
    output: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> Ticket:
    """Selects the k entries that moved most from `initial` to `tuned`. Of equal ones, the earliest are taken.

    Args:
        initial: the base model, as a module, a mapping from names to tensors, or the path of a safetensors checkpoint,
            which is streamed from disk. Names do not depend on the form or on wrappers. Tied parameters count once;
            buffers, integers and quantised tensors are left out (`weights.versions.open_weights`).
        tuned: the tuned model, in any of these forms.
        density: share of the pool to select: floor(density * entries), computed in exact decimals.
        k: the number of entries to select, instead of `density`.
        budget: "global" ranks all entries together. "layer" and "tensor" give each layer or tensor the same density. A
            mapping gives shares of k to regular expressions over names.
        pool: which parameters may be selected: a predicate on names, regular expressions, or None for all.
        allow_missing: which parameters of the pool are left out if they are on one side only, instead of raising an
            error: True for any, or regular expressions, e.g. "^lm_head" if one side has no head.
        compare_in: round both sides to this dtype before the comparison. Pass the coarser of the two dtypes if one side
            was saved in another dtype than it was trained in.
        score: rank by |score| instead of |tuned - initial|. Either a mapping from names to tensors in the parameters'
            shapes, or a function of (name, start, stop) that returns the scores of entries start..stop of a parameter's
            row-major order as a float32, bfloat16 or float16 tensor, the same ones in every call. Such a function needs
            no tensor of the model's size; `selection.scores` has some.
        method: the name of the method, for the metadata.
        metadata: further entries for the ticket's metadata.
        progress: show a progress bar while checkpoints are read.
        output: a file to save the ticket to. The index sets of a ticket over 512 MB that is selected from checkpoints
            are then kept in a file in the same folder, not in memory.
        device: the device on which checkpoints are compared; None: a GPU if there is one, which works on one piece
            while the next is read and copied. The ticket is always on the CPU. Tensors in memory are compared where
            they are.

    Returns:
        A ticket over the pool. Its metadata has the requested and the actual k, the thresholds (the smallest selected
        score of each group) and, if there are any, the numbers of parameters that were left out ("left_out") or
        differed in dtype ("mixed_dtypes"). Its fingerprint has the digests of the initial tensors.

    Warns:
        ShortTicket: fewer than k entries moved; the ticket has all of these.
        MixedDtypes: parameters differ in dtype between the sides, so rounding counts as a change.
        UserWarning: quantised tensors are left out.

    Raises:
        ValueError: names, shapes or budgets do not fit, a parameter is on one side only, or a delta is NaN or infinite;
            the message names the parameter. The delta of two equal infinities is NaN.
        TypeError: a parameter of the pool is not float32, bfloat16 or float16 (in a file: ValueError).
    """
    if output is not None:
        files.check_writable(output)
    sides = Sides.of(initial, tuned, score)
    base, after = sides.base, sides.after
    read = [tensor for tensor in (*base.values(), *after.values()) if isinstance(tensor, CheckpointTensor)]
    if output is not None and any(tensor.is_in(output) for tensor in read):
        raise ValueError(f"select: output={str(output)!r} is a file that is read; choose another name")
    names, alone = sources.names_in_pool(base, after, pool, allow_missing, what="select", scored=score is not None)
    for name in names:
        sources.check_shape(name, base[name].shape, after[name].shape)
        if score is not None:
            sources.check_has_values(name, base, what="select")  # needed for its digest
    names, groups, labels, ks = share_out({name: base[name].shape for name in names}, budget, density=density, k=k)
    sources.check_dtypes(names, after, *([base] if score is None else []), what="select")
    noted = sources.warn_of_dtypes(names, base, after) if score is None and compare_in is None else {}
    before = [base[name] for name in names] if score is None else []
    folder = None if output is None else Path(output).parent
    try:
        if callable(score):
            device = sources.device_of(base.values())
            scored = [sources.score_reader(score, name, base[name].numel(), device) for name in names]
            sets, thresholds = _streamed(StreamSource([], scored, device), groups, ks, progress, folder)
            digests = None
        else:
            sets, thresholds, digests = _topk(
                before, [after[name] for name in names], groups, ks, progress, folder, device, compare_in
            )
    except NonFiniteDelta as error:
        name = names[error.tensor]
        alike = sources.equal_infinities(base[name], after[name]) if score is None else 0
        raise NonFiniteDelta(error.tensor, repr(name), alike) from None
    ticket = Ticket(dict(zip(names, sets, strict=True)), {name: base[name].shape for name in names})
    if digests is None:
        ticket.fingerprint = fingerprint({name: base[name] for name in ticket.active_names})
    else:
        found = of_tiles({name: base[name] for name in names}, digests)
        ticket.fingerprint = {name: found[name] for name in ticket.active_names}
    for name in names:
        for tensor in (base[name], after[name]):
            if isinstance(tensor, CheckpointTensor):
                tensor.check()
    ticket.metadata = describe(
        ks,
        labels,
        thresholds,
        found=ticket.k,
        pool=ticket.n,
        density=density,
        budget=budget,
        method=method,
        left_out={**alone, "quantised": sides.quantised},
        metadata={**noted, **({} if compare_in is None else {"compared_in": str(compare_in)}), **(metadata or {})},
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
    compare_in: torch.dtype | None,
) -> tuple[list[IndexSet], Tensor, Tensor | None]:
    """(index set per tensor, thresholds, digests), selected in memory or from streams.

    The digests are those of the tiles of the initial tensors, int64 [T, 2]. They are None if the initial tensors are
    not read, or are rounded first.
    """
    before, after = ([tensor for tensor in side if isinstance(tensor, Tensor)] for side in (initial, tuned))
    in_memory = compare_in is None and (len(before), len(after)) == (len(initial), len(tuned))
    if in_memory or (device is None and after and compare_in is not None):
        device = after[0].device
    elif device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    digests = None
    if initial and compare_in is None:
        tiles = sum(tiles_of(tensor.numel()) for tensor in initial)
        digests = torch.empty(tiles, 2, dtype=torch.int64, device=device)
    if in_memory:
        selection = ops.select_from(TensorSource(before, after, digests), groups, ks)
        return ops.index_sets(selection, [tensor.numel() for tensor in after]), selection.thresholds, digests
    sides = [[Reader.of(tensor).rounded(compare_in) for tensor in side] for side in (initial, tuned)]
    source = StreamSource(sides[0], sides[1], device, digests=digests)
    sets, thresholds = _streamed(source, groups, ks, progress, folder)
    return [index_set.to("cpu") for index_set in sets], thresholds, digests


@torch.no_grad()
def _streamed(
    source: StreamSource, groups: list[int], ks: list[int], progress: bool, folder: Path | None
) -> tuple[list[IndexSet], Tensor]:
    """(index set per tensor, thresholds) of a source. `folder`: for large index sets; None: keep them in memory."""
    passes, bitmap = backends.resolve(source.device, "topk_delta"), 4 * sum(map(bitmap_words, source.sizes))
    by_tensor = bitmap > LARGE
    with ExitStack() as stack:
        if progress:
            reads = PASSES if by_tensor else 1 if sampling_pays(source) else 2
            source.progress = stack.enter_context(reading_bar(source.nbytes, reads))
        if by_tensor:
            large = min(bitmap, 2 * sum(ks)) > LARGE
            spool = stack.enter_context(Spool(folder)) if large and folder is not None else None
            return select_by_tensor(passes, source, groups, ks, spool)
        selection = select_topk(passes, source, groups, ks)
    return ops.index_sets(selection, source.sizes), selection.thresholds


def reading_bar(nbytes: int, times: int) -> Any:
    """A progress bar over `times` reads of `nbytes`. It grows if more reads are needed, as with many equal deltas."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            total = self.total or 0
            if self.n + (n or 0) > total:
                self.total = total + nbytes
            return super().update(n)

    return Bar(total=times * nbytes, desc="select", unit="B", unit_scale=True)
