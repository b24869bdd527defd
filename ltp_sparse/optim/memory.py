"""How much memory training needs, before it starts: weights, gradients, optimizer state, index, activations.

Weights, states and index follow from counts. Activations, logits and gradients are counted on
fake tensors, which have sizes but no memory: a forward and a backward pass run as they would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltp_sparse.backends.coefficients import Coefficient
from ltp_sparse.backends.work_items import WORK_ITEM
from ltp_sparse.optim.launch import PIECE, Precision
from ltp_sparse.optim.members import active_names, dense_parameters, ticket_for
from ltp_sparse.optim.packed_gradients import check_unpacked
from ltp_sparse.optim.small_gradients import WAITING
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.tickets.tile_table import Column
from ltp_sparse.weights.names import canonical_parameters

_TILE_BYTES = 8 * len(Column)
_PARAMETER_BYTES = 8 * (Coefficient.COUNT + 4)  # coefficients, steps, number, group, whether there is a gradient
_WORK_ITEM_BYTES = 16
_PREPARED_BYTES = 64  # a parameter's row for GPU kernels


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a training step needs.

    Attributes:
        weights: all parameters, frozen ones included.
        states: moments, masters and the initial values of a pull.
        index: bitmaps or lists of the ticket, tiles, rows of embeddings, numbers per parameter, work items on a GPU.
        gradients: the gradients that are held between backward and step.
        passing: the peak of activations, logits and gradients in forward and backward.
    """

    weights: int
    states: int
    index: int
    gradients: int
    passing: int = 0

    @property
    def held(self) -> int:
        """Weights, gradients, states and index."""
        return self.weights + self.states + self.index + self.gradients

    @property
    def total(self) -> int:
        """The peak of a training step."""
        return self.weights + self.states + self.index + max(self.passing, self.gradients)

    def __repr__(self) -> str:
        parts = ("weights", "states", "index", "gradients", "held", "passing", "total")
        return f"MemoryReport({', '.join(f'{part} {getattr(self, part) / 1e9:.3f} GB' for part in parts)})"


def memory_report(
    model: nn.Module,
    ticket: Ticket | float,
    *,
    dense: nn.Module | Iterable[Any] = (),
    loss: Callable[[], Tensor] | None = None,
    states: str = "float32",
    gradients: str = "packed",
    master: bool | None = None,
    pull_on: str | None = None,
    device: str = "cpu",
    ranks: int = 1,
) -> MemoryReport:
    """Computes how much memory a training step with `MaskedAdamW` needs.

    Args:
        model: in memory, on the meta device, or made under torch's `FakeTensorMode`.
        ticket: the active entries, or the density of a uniform ticket over all parameters that are neither frozen nor
            in `dense`.
        dense: a module, parameters or parameter groups that train in full.
        loss: runs the forward pass and returns the loss; under a `FakeTensorMode` this takes no memory. With None,
            `passing` counts the gradients only.
        states, gradients, master: as in `MaskedAdamW`.
        pull_on: as in `MaskedAdamW`, or None for an optimizer without a pull. "host" is for a model on a GPU, which
            then holds one piece of the initial values.
        device: "cpu" or "cuda", where the step will run; `model` can be elsewhere. On "cuda", bitmaps have a directory
            (n/32 bytes), attention keeps no probabilities, and dropout keeps a byte per value.
        ranks: the number of processes over which FSDP2 shards the model by rows. The report is for the rank that holds
            most. The parameters that FSDP2 gathers for a pass, one group at a time, are not included.

    Returns:
        The bytes by kind.

    Raises:
        ValueError: the ticket is not of this model, an option is out of range, or, with `loss`, an optimizer already
            packs gradients of the model and would take those of this trial for its own.
    """
    if gradients not in ("dense", "packed"):
        raise ValueError(f'memory_report: gradients must be "dense" or "packed", got {gradients!r}')
    if pull_on not in (None, "device", "host"):
        raise ValueError(f'memory_report: pull_on must be "device", "host" or None, got {pull_on!r}')
    if device not in ("cpu", "cuda"):
        raise ValueError(f'memory_report: device must be "cpu" or "cuda", got {device!r}')
    if ranks < 1:
        raise ValueError(f"memory_report: ranks must be at least 1, got {ranks}")
    if ranks > 1 and loss is not None:
        raise ValueError("memory_report: activations of a sharded model cannot be counted; leave loss= out with ranks=")
    named, precision = canonical_parameters(model), Precision(states, master)
    full = set(map(id, dense_parameters(dense, what="memory_report")))
    sizes = {name: _entries_of_rank(p.shape, ranks) for name, p in named.items()}
    active = _active_entries(named, sizes, ticket, full, ranks)
    trained = {name: sizes[name] if id(p) in full else active.get(name, 0) for name, p in named.items()}
    trained = {name: k for name, k in trained.items() if k}
    packed = {name for name in trained if gradients == "packed" and id(named[name]) not in full}

    state = sum(k * precision.bytes_per_entry(named[name].dtype) for name, k in trained.items())
    if pull_on is not None:
        entries = sum(trained.values())
        state += 4 * (entries if pull_on == "device" else min(entries, PIECE))
    whole = {name: size * named[name].element_size() for name, size in sizes.items()}
    held = sum(4 * k if name in packed else whole[name] for name, k in trained.items())
    index = sum(_index_bytes(k, sizes[name], device, packed=name in packed) for name, k in trained.items())
    index += len(trained) * (_PARAMETER_BYTES + (_PREPARED_BYTES if device == "cuda" else 0))
    if ranks == 1:  # FSDP2 takes gradients of whole embeddings
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        index += sum(_bytes_of_rows(*named[name].shape) for name in packed if id(named[name]) in embeddings)

    passing = held
    if loss is not None:
        for name, parameter in named.items():
            check_unpacked(name, parameter, what="memory_report")
        takes_gradient = {id(named[name]) for name in trained} | full
        with nullcontext() if device == "cpu" else _AsOnGPU():
            passing = passing_bytes(model, loss, takes_gradient, [named[name] for name in named if name in packed])
        passing += sum(4 * trained[name] for name in packed)
        passing += min(WAITING, sum(whole[name] for name in packed if whole[name] <= WAITING))
    return MemoryReport(sum(whole.values()), round(state), index, held, passing)


def _entries_of_rank(shape: Size, ranks: int) -> int:
    """Entries of a parameter that FSDP2 keeps on each rank: the same number of rows, padded on the last ranks."""
    return shape.numel() if ranks == 1 or not shape else -(-shape[0] // ranks) * shape[1:].numel()


def _active_entries(
    named: Mapping[str, nn.Parameter], sizes: Mapping[str, int], ticket: Ticket | float, full: set[int], ranks: int
) -> dict[str, int]:
    """Name -> active entries, on the rank that has most.

    Args:
        named: name -> parameter.
        sizes: name -> entries of a rank.
        ticket: a ticket, or the density of a uniform one.
        full: ids of parameters that train in full, to which the density does not apply.
        ranks: the number of ranks.
    """
    if isinstance(ticket, Ticket):
        with unset_fake_temporarily():  # the ticket is real, also where the model is not
            ticket = ticket_for(named, ticket, what="memory_report")
            names = active_names(named, ticket, what="memory_report")
            if ranks == 1:
                return {name: ticket.sets[name].k for name in names}
            of_ranks = ({name: _active_rows(ticket, name, rank, ranks) for name in names} for rank in range(ranks))
            return max(of_ranks, key=lambda counts: sum(counts.values()))
    if not 0 <= ticket <= 1:
        raise ValueError(f"memory_report: the density must be in [0, 1], got {ticket}")
    return {name: int(ticket * sizes[name]) for name, p in named.items() if p.requires_grad and id(p) not in full}


def _active_rows(ticket: Ticket, name: str, rank: int, ranks: int) -> int:
    rows = ticket.shapes[name][:1].numel()
    each = -(-rows // ranks)
    row = ticket.shapes[name][1:].numel()
    bounds = torch.tensor([min(at * each, rows) * row for at in (rank, rank + 1)], dtype=torch.int64, device="cpu")
    return int(ticket.sets[name].slots_at(bounds).diff())


def passing_bytes(
    model: nn.Module, loss: Callable[[], Tensor], trained: set[int], packed: Iterable[nn.Parameter] = ()
) -> int:
    """The peak of the bytes that forward and backward allocate.

    Args:
        model: its parameters get their gradients and options back afterwards.
        loss: runs the forward pass and returns the loss.
        trained: ids of the parameters that have gradients.
        packed: parameters whose gradient is freed at once; embeddings among them have row-sparse gradients.
    """
    packed = list(packed)
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    lookups = [m for m in model.modules() if isinstance(m, nn.Embedding) and any(m.weight is p for p in packed)]
    options = [(m.sparse, m.padding_idx) for m in lookups]
    hooks: list[Any] = []
    try:
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in trained)
        hooks += [p.register_post_accumulate_grad_hook(_free) for p in packed]
        for module in lookups:  # a padding row would make the size of the gradient depend on the tokens
            module.sparse, module.padding_idx = True, None
        with LiveBytes() as live:
            loss().backward()
        return live.peak
    finally:
        for hook in hooks:
            hook.remove()
        for module, option in zip(lookups, options, strict=True):
            module.sparse, module.padding_idx = option
        for parameter, (flag, grad) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors that operations have made in this mode.

    Attributes:
        peak: the largest sum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {s._cdata for leaf in tree_leaves((args, kwargs)) for s in _storages(leaf)}
        for storage in (s for leaf in tree_leaves(result) for s in _storages(leaf)):
            if storage._cdata not in before and storage._cdata not in self._live:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._now += storage.nbytes()
        if self._now > self.peak:  # only then does it matter which tensors have been freed
            for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
                self._now -= self._live.pop(key)[1]
            self.peak = max(self.peak, self._now)
        return result


class _AsOnGPU(TorchFunctionMode):
    """Makes operations on a CPU save the tensors for backward that operations on a GPU save."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0  # with dropout, every CPU kernel saves the probabilities
        elif func is F.dropout and kwargs["training"] and kwargs["p"] and not kwargs["inplace"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


def _storages(value: Any) -> list[Any]:
    if not isinstance(value, Tensor):
        return []
    if value.layout == torch.strided:
        return [value.untyped_storage()]
    return [value._indices().untyped_storage(), value._values().untyped_storage()]


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes_of_rows(rows: int, columns: int) -> int:
    """Bytes to locate rows of an embedding with a row-sparse gradient: a bitmap and the first slot of every row."""
    return rows * (4 * -(-columns // 32) + 8)


def _index_bytes(k: int, n: int, device: str, *, packed: bool) -> int:
    """Bytes of the index of a uniform set: its tiles, and a list, a bitmap from a density of 1/16 on, or nothing.

    Gradients are packed one by one or, small ones, together: each has a table of tiles of its own. On a GPU the update
    and the packing have work items.
    """
    n_tiles, bitmap, listed = -(-n // TILE), 8 * -(-n // 64), 2 * k
    tiles = n_tiles * _TILE_BYTES * (3 if packed else 1)
    if device == "cuda":
        tiles += n_tiles * _WORK_ITEM_BYTES * -(-k // (n_tiles * WORK_ITEM)) * (2 if packed else 1)
    if k == n:
        return tiles
    if listed < bitmap:
        return tiles + listed
    return tiles + bitmap + (bitmap // 4 if device == "cuda" else 0)
