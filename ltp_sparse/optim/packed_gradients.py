"""Packed gradients: of a dense gradient only the active entries are kept, from the moment backward has made it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ltp_sparse import backends, ops
from ltp_sparse.encoding import Column, IndexSet, TileTable, unpack_bits

# rows of a batch that are packed at a time: bounds the temporaries to a few megabytes
_ROWS_AT_A_TIME = 512

# parameters whose gradients are packed; a second packer would find nothing left
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()

# DDP leaves the parameters named here alone; it has no public name for it.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def carrier_of(param: nn.Parameter, k: int) -> nn.Parameter:
    """A parameter [k] that stands for the active entries of `param` in an optimizer: `.grad` is the packed gradient.

    It has no values of its own: all its entries are one zero.
    """
    return nn.Parameter(torch.zeros(1, device=param.device).expand(k))


def check_packable(named: Mapping[str, nn.Parameter], dense: Iterable[nn.Parameter], *, what: str) -> None:
    """Raises ValueError if a parameter takes no gradient, is in `dense`, too, or has its gradient packed already."""
    in_full = set(map(id, dense))
    for name, param in named.items():
        if id(param) in in_full:
            raise ValueError(f"{what}: {name!r} is in the ticket and in dense; leave it out of one of them")
        if not param.requires_grad:
            raise ValueError(
                f"{what}: expected a gradient for each parameter of the ticket, {name!r} takes none; call its "
                "requires_grad_(), or restrict the ticket"
            )
        check_unpacked(name, param, what=what)


def check_unpacked(name: str, param: nn.Parameter, *, what: str) -> None:
    """Raises ValueError if the gradient of a parameter is packed already."""
    if param in _packed:
        raise ValueError(
            f"{what}: the gradient of {name!r} goes to an earlier MaskedAdamW or PackedParameters; call remove() on "
            "that one first"
        )


class _Rows:
    """Where the active entries of each row of a matrix are, to pack gradients that hold some rows only.

    words:  int32 [rows, ceil(columns / 32)], a bitmap that starts anew with every row
    starts: int64 [rows], slot of the first active entry
    """

    def __init__(self, index_set: IndexSet, columns: int, device: torch.device) -> None:
        self.columns = columns
        rows, width = index_set.n // columns, -(-columns // 32)
        if columns % 32 == 0:
            words = index_set.bitmap()[: rows * width]
        else:
            words = torch.zeros(rows * width, dtype=torch.int32, device=index_set.data.device)
            for _, indices in index_set.chunks():
                row, column = indices // columns, indices % columns
                bits = torch.ones_like(row, dtype=torch.int32) << (column % 32).int()
                words.index_add_(0, row * width + column // 32, bits)
        self.words = words.to(device).view(rows, width)
        counts = torch.cat([self._bits(rows).sum(1) for rows in self.words.split(_ROWS_AT_A_TIME)])
        self.starts = counts.cumsum(0) - counts

    def _bits(self, words: Tensor) -> Tensor:
        """int32 [R, width] -> bool [R, columns]"""
        return unpack_bits(words.reshape(-1)).view(len(words), 32 * words.shape[1])[:, : self.columns]

    def pack_(self, grad: Tensor, out: Tensor) -> None:
        """Adds the active entries of a sparse gradient, in which a row may occur several times, to `out`."""
        rows = grad._indices()[0].split(_ROWS_AT_A_TIME)
        for some, values in zip(rows, grad._values().split(_ROWS_AT_A_TIME), strict=True):
            bits = self._bits(self.words[some])
            counts = bits.sum(1)
            row, column = bits.nonzero(as_tuple=True)
            # slot of a row's first active entry, less the place of that entry in the list
            offsets = self.starts[some] - (counts.cumsum(0) - counts)
            slots = offsets[row].add_(torch.arange(len(row), device=row.device))
            added = values[row, column].float()
            # both add in the order of the rows; the other operation of either device is not deterministic
            if out.is_cpu:
                out.index_add_(0, slots, added)
            else:
                out.index_put_((slots,), added, accumulate=True)


class PackedGradients:
    """Hooks that replace the gradient of each parameter by its active entries, in float32, and free it.

    The gradients of the parameters are views of one flat buffer in slot order, and the `.grad` of the carriers. Until a
    step consumes them, later micro-batches add to them. An `nn.Embedding` among the parameters is set to `sparse=True`,
    so that its gradient holds the rows of the batch only and is never a matrix of the vocabulary's size.

    Inside DistributedDataParallel its reducer leaves these parameters alone; instead the buffer is averaged over the
    ranks at the end of backward: `density` times the bytes. `no_sync()` is heeded.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        carriers: Sequence[nn.Parameter],
        sets: Sequence[IndexSet],
        table: TileTable,
    ) -> None:
        """table: lays `sets` out, a parameter's tiles together."""
        _forget_copied(model)
        self.params, self.carriers, self.table = list(params), list(carriers), table
        _packed.update(dict.fromkeys(self.params, True))
        self.buffer = torch.zeros(table.k, device=params[0].device)
        ends = torch.tensor(table.counts).cumsum(0).tolist()
        self.views = [self.buffer[end - count : end] for end, count in zip(ends, table.counts, strict=True)]
        # of a part of the tiles the rank directory could not be built any more
        ranked = backends.resolve(table.tiles.device, dtype=params[0].dtype, density=table.density).needs_ranks
        self._tables = _single_tables(table.with_ranks() if ranked else table)
        self._rows: dict[int, _Rows] = {}
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._averaging = self._is_copy = False
        self._handles: list[Any] = [model.register_forward_pre_hook(self._before_forward)]
        self._model, self._embeddings = model, []

        numbers = {param: number for number, param in enumerate(params)}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding) and weight in numbers:
                if not module.sparse:
                    module.sparse = True
                    self._embeddings.append(module)
                self._rows[numbers[weight]] = _Rows(sets[numbers[weight]], weight.shape[1], weight.device)
        named = model.named_parameters(remove_duplicate=False)
        self._ignored = [name for name, param in named if param in numbers]
        setattr(model, _IGNORED, [*getattr(model, _IGNORED, []), *self._ignored])
        for number, param in enumerate(params):
            self._handles.append(param.register_post_accumulate_grad_hook(self._hook(number)))

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedGradients:
        """What a copy of the model carries: its gradients are its own, but DDP would still leave them alone."""
        copied = PackedGradients.__new__(PackedGradients)
        copied._is_copy, copied._handles, copied._ignored = True, [], list(self._ignored)
        copied._embeddings = copy.deepcopy(self._embeddings, memo)
        return copied

    def _hook(self, number: int) -> Any:
        def pack(param: Tensor) -> None:
            self._pack(number, param)

        return pack

    @torch.no_grad()
    def _pack(self, number: int, param: Tensor) -> None:
        grad, out, carrier = param.grad, self.views[number], self.carriers[number]
        if grad is None:
            return
        fresh = carrier.grad is None
        if grad.is_sparse and number in self._rows:
            if fresh:
                out.zero_()
            self._rows[number].pack_(grad, out)
        else:
            ops.masked_pack_([grad], out, self._tables[number], accumulate=not fresh)
        if fresh:
            carrier.grad = out
        param.grad = None
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is not None and ddp.require_backward_grad_sync and not self._averaging:
            self._averaging = True
            Variable._execution_engine.queue_callback(lambda: self._end_backward(ddp.process_group))

    def _before_forward(self, *_: object) -> None:
        """Notes whether the model runs inside DDP, and that DDP leaves its parameters to us."""
        if not torch.is_grad_enabled():
            return
        ddp = DistributedDataParallel._get_active_ddp_module()
        if self._is_copy:
            if ddp is not None:
                raise ValueError(
                    "this model is a copy of one with packed gradients, and DistributedDataParallel would not average "
                    "its own; copy before making the optimizer, or after its remove()"
                )
            return
        self._ddp = None if ddp is None else weakref.ref(ddp)  # it must not outlive its process group
        self._averaging = False  # a backward that failed may have left it set
        if ddp is not None:
            own = set(map(id, self.params))
            if any(id(param) in own for param in ddp._module_parameters):
                raise ValueError(
                    'MaskedAdamW: gradients="packed" must be set up before the model is wrapped in '
                    "DistributedDataParallel; make the optimizer first"
                )

    def _end_backward(self, group: ProcessGroup) -> None:
        self._averaging = False
        self.average(group)

    @torch.no_grad()
    def average(self, group: ProcessGroup | None = None) -> None:
        """Averages over the ranks of a group. A parameter that has a gradient on some rank has one on all then."""
        present = torch.tensor([carrier.grad is not None for carrier in self.carriers], dtype=torch.int32)
        for here, view in zip(present.tolist(), self.views, strict=True):
            if not here:
                view.zero_()
        present = present.to(self.buffer.device)
        torch.distributed.all_reduce(present, torch.distributed.ReduceOp.MAX, group)
        self.buffer /= torch.distributed.get_world_size(group)
        torch.distributed.all_reduce(self.buffer, group=group)
        for there, carrier, view in zip(present.tolist(), self.carriers, self.views, strict=True):
            if there and carrier.grad is None:
                carrier.grad = view

    def clear_absent(self) -> None:
        """Zeros where no gradient has come, so that a norm does not count what an earlier step left."""
        for carrier, view in zip(self.carriers, self.views, strict=True):
            if carrier.grad is None:
                view.zero_()

    def index_tensors(self) -> list[Tensor]:
        """What is held to find the active entries of embedding rows."""
        return [tensor for rows in self._rows.values() for tensor in (rows.words, rows.starts)]

    def consume(self) -> None:
        """The next backward overwrites."""
        for carrier in self.carriers:
            carrier.grad = None

    def remove(self) -> None:
        """Takes the hooks away and makes the embeddings dense again. Once more, it does nothing."""
        if not self._handles:  # else it would undo those of a later packer
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._embeddings:
            module.sparse = False
        for param in self.params:
            _packed.pop(param, None)
        setattr(self._model, _IGNORED, [name for name in getattr(self._model, _IGNORED) if name not in self._ignored])


def _forget_copied(model: nn.Module) -> None:
    """Undoes what a copy of a model with packed gradients has of them."""
    for key, hook in list(model._forward_pre_hooks.items()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, PackedGradients) and owner._is_copy:
            del model._forward_pre_hooks[key]
            setattr(model, _IGNORED, [name for name in getattr(model, _IGNORED) if name not in owner._ignored])
            for module in owner._embeddings:
                module.sparse = False


def _single_tables(table: TileTable) -> list[TileTable]:
    """A table for each parameter alone, over the shared index; slots count from the parameter's first."""
    of = table.tiles[:, Column.PARAM].contiguous().cpu()
    tables, slot = [], 0
    for number, (count, size) in enumerate(zip(table.counts, table.sizes, strict=True)):
        low, high = torch.searchsorted(of, torch.tensor([number, number + 1])).tolist()
        tiles = table.tiles[low:high].clone()
        tiles[:, Column.PARAM] = 0
        tiles[:, Column.SLOT] -= slot
        tables.append(replace(table, tiles=tiles, counts=(count,), sizes=(size,)))
        slot += count
    return tables
