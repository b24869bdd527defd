"""Packed gradients: as soon as backward has computed a dense gradient, only its active entries are kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ltp_sparse import ops
from ltp_sparse.deltas.entries import gather
from ltp_sparse.optim.gradient_view import GradientView, PackedTensor
from ltp_sparse.optim.small_gradients import SmallGradients, subtables
from ltp_sparse.tickets.bits import unpack_bits
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import TileTable
from ltp_sparse.weights.sharding import is_same, is_sharded, like, local, own_gradient

# rows of a batch that are packed at a time: bounds the temporaries to a few megabytes
_ROWS_AT_A_TIME = 512

# parameter -> weak reference to what packs its gradient; a second packer would find nothing left
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()

# DDP leaves the parameters named here alone; it has no public name for it.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def check_unpacked(name: str, param: nn.Parameter, *, what: str) -> None:
    """Raises ValueError if the gradient of a parameter is packed already."""
    if _is_packed(param) and not (gc.collect() and not _is_packed(param)):  # an unused one can still await collection
        raise ValueError(
            f"{what}: an earlier MaskedAdamW or PackedParameters already packs the gradient of {name!r}; call its "
            "remove() first"
        )


def _is_packed(param: nn.Parameter) -> bool:
    owner = _packed.get(param)
    return owner is not None and owner() is not None


class _Rows:
    """The active entries of a matrix by rows, to pack gradients that hold some rows only.

    Attributes:
        words: int32 [rows, ceil(columns / 32)], a bitmap per row.
        starts: int64 [rows], slot of the first active entry of the row.
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
            slots = offsets[row].add_(torch.arange(len(row), dtype=torch.int64, device=row.device))
            added = values[row, column].float()
            # each is the operation that adds in the order of the rows on its device; the other is not deterministic
            if out.is_cpu:
                out.index_add_(0, slots, added)
            else:
                out.index_put_((slots,), added, accumulate=True)


class PackedGradient:
    """The packed gradient of one parameter: its slots of the flat buffer, and the packing of dense gradients.

    Args:
        number: the parameter's place in the list of parameters.
        index_set: its active entries.
        slots: float32 [k], its slots of the flat buffer.
        table: its tiles alone.
        small: where small dense gradients wait to be packed together.
        carrier: a parameter [k] whose `.grad` is these slots, too (see `PackedParameters`), or None.

    Attributes:
        shown: whether the `.grad` of the parameter is a view of these slots.
    """

    def __init__(
        self,
        number: int,
        index_set: IndexSet,
        slots: Tensor,
        table: TileTable,
        small: SmallGradients,
        carrier: nn.Parameter | None = None,
    ) -> None:
        self.number, self.index_set, self.table, self.carrier = number, index_set, table, carrier
        self._slots, self._small = slots, small
        self.rows: _Rows | None = None
        self.shown = self._present = False

    @property
    def buffer(self) -> Tensor:
        """float32 [k], the packed gradient."""
        self._small.pack_()
        return self._slots

    @property
    def present(self) -> bool:
        """Whether there is a gradient that no step has consumed."""
        return self._present if self.carrier is None else self.carrier.grad is not None

    @present.setter
    def present(self, there: bool) -> None:
        self._present = there
        if self.carrier is not None:
            self.carrier.grad = self._slots if there else None

    def values(self) -> Tensor:
        """float32 [k], the gradient that the next step uses; zeros if the carrier's optimizer has cleared it."""
        self.settle()
        if self.carrier is not None and not self.present:
            self.buffer.zero_()
        return self.buffer

    def settle(self) -> None:
        """Copies a tensor that others have set as the carrier's gradient."""
        grad = None if self.carrier is None else self.carrier.grad
        if grad is not None and grad.data_ptr() != self._slots.data_ptr():
            self.buffer.copy_(grad)
            self.present = True

    @torch.no_grad()
    def pack_(self, grad: Tensor, *, accumulate: bool) -> None:
        """Packs a gradient.

        Args:
            grad: the gradient in the parameter's shape: dense, sparse by rows, or a view of a packed one.
            accumulate: whether to add it to a gradient that is present, instead of replacing that.
        """
        self.settle()
        fresh = not (accumulate and self.present)
        if isinstance(grad, PackedTensor):
            values = grad.values_now() if grad.index_set is self.index_set else gather(grad.dense(), self.index_set)
            self.buffer.copy_(values if fresh else self.buffer + values)
        elif grad.is_sparse and self.rows is not None:
            if fresh:
                self.buffer.zero_()
            self.rows.pack_(grad, self.buffer)
        elif not self._small.take(self.number, grad, add=not fresh, own=not accumulate):
            ops.masked_pack_([grad], self._slots, self.table, accumulate=not fresh)
        if fresh:
            self.present = True


class Shown:
    """What the views of one gradient show: the buffer, or a copy of it once the buffer holds the next gradient.

    With the copy, a reference to an old gradient (`first = p.grad; opt.zero_grad(); ...`) stays valid after the next
    backward.
    """

    def __init__(self, packed: PackedGradient) -> None:
        self.packed, self.index_set = packed, packed.index_set
        self._kept: Tensor | None = None

    def values(self) -> Tensor:
        """[k], the values to show."""
        return self.packed.values() if self._kept is None else self._kept

    @torch.no_grad()
    def pack_(self, grad: Tensor, *, accumulate: bool) -> None:
        """Writes the active entries of a dense or sparse gradient to the shown values, or adds them."""
        if self._kept is None:
            self.packed.pack_(grad, accumulate=accumulate)
        else:
            values = gather(grad.to_dense() if grad.is_sparse else grad, self.index_set).float()
            self._kept.copy_(self._kept + values if accumulate else values)

    def keep(self) -> None:
        """Makes the views show a copy of the buffer from now on."""
        self._kept = self.packed.buffer.clone()


class PackedGradients:
    """Hooks that replace the gradient of each parameter by its active entries, in float32, and free it.

    The gradients are slices of one flat buffer in slot order. Later micro-batches add to them until a step consumes
    them. The `.grad` of a parameter is a `GradientView` of its slice: code that reads it, changes it, or sets it to
    None or a tensor works on the gradient that the next step uses. After a step it keeps its values until the next
    forward pass. An `nn.Embedding` among the parameters is set to `sparse=True`, so that its gradient holds the rows of
    the batch only and is never a matrix of the vocabulary's size.

    The hooks refer to this object weakly and disappear with it, so the optimizer must hold a reference.

    The reducer of DistributedDataParallel ignores these parameters. Instead, the buffer is averaged over the ranks at
    the end of backward, which takes `density` times the bytes. Inside `no_sync()` it is not.

    Args:
        model: the model that the parameters belong to.
        params: P parameters, all on one device and of one dtype.
        sets: their active entries.
        table: the tile table of `sets`, in which the tiles of a parameter are neighbours.
        carriers: P parameters [k] whose `.grad` is the packed gradient, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        sets: Sequence[IndexSet],
        table: TileTable,
        carriers: Sequence[nn.Parameter] | None = None,
    ) -> None:
        _forget_copied(model)
        self.params, self.table = list(params), table
        own = weakref.ref(self)
        _packed.update(dict.fromkeys(self.params, own))
        self._buffer = torch.zeros(table.k, dtype=torch.float32, device=params[0].device)
        slots = self._buffer.split(table.counts)
        # the directory can be built for the whole table only, not for parts of it
        whole, _ = ops.served(table, params[0].dtype)
        tables = subtables(whole, [range(number, number + 1) for number in range(len(params))])
        # other optimizers read the carriers at any time, so nothing can wait
        self._small = SmallGradients(params if carriers is None else (), self._buffer, whole)
        stand_ins: Sequence[nn.Parameter | None] = carriers or [None] * len(slots)
        self.gradients = [
            PackedGradient(number, index_set, held, part, self._small, carrier)
            for number, (index_set, held, part, carrier) in enumerate(zip(sets, slots, tables, stand_ins, strict=True))
        ]
        self._carried = carriers is not None
        self._shown: list[weakref.ref[Shown] | None] = [None] * len(slots)  # alive while somebody holds a view
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._ending = self._used = self._compared = False

        embeddings: list[Any] = []
        handles: list[Any] = []
        numbers = {param: number for number, param in enumerate(params)}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            # reductions over shards do not support sparse gradients
            if isinstance(module, nn.Embedding) and weight in numbers and not is_sharded(weight):
                if not module.sparse:
                    module.sparse = True
                    embeddings.append(module)
                    handles.append(module.register_forward_pre_hook(WeakHook(None, _CopiedSparse)))
                self.gradients[numbers[weight]].rows = _Rows(sets[numbers[weight]], weight.shape[1], weight.device)
        ignored = [name for name, param in model.named_parameters(remove_duplicate=False) if param in numbers]
        setattr(model, _IGNORED, [*getattr(model, _IGNORED, []), *ignored])
        hook = WeakHook(self._before_forward, _CopiedHook, ignored, embeddings)
        handles.append(model.register_forward_pre_hook(hook))
        for number, param in enumerate(params):
            handles.append(param.register_post_accumulate_grad_hook(self._hook(number)))
        self._embeddings = [weakref.ref(embedding) for embedding in embeddings]
        weak = [*self._embeddings, *map(weakref.ref, self.params)]
        self._undo = weakref.finalize(self, _undo, own, handles, weak, weakref.ref(model), ignored)
        self._undo.atexit = False

    @property
    def buffer(self) -> Tensor:
        """float32 [K], the packed gradients in slot order."""
        self._small.pack_()
        return self._buffer

    def _hook(self, number: int) -> Any:
        own = weakref.ref(self)

        def pack(param: Tensor) -> None:
            packer = own()
            if packer is not None and param.grad is not None:
                packer._pack(number, param)

        return pack

    def _pack(self, number: int, param: Tensor) -> None:
        """Packs a gradient of backward, unless autograd has already added it to the view."""
        packed, grad = self.gradients[number], own_gradient(param)
        assert grad is not None
        self._hide_used()
        if not self._is_shown(number, grad):
            self._let_go(number)
            packed.pack_(grad, accumulate=False)
        self._show(number)
        if torch._C._current_graph_task_id() < 0:  # the hook was called by hand, after a backward
            self._small.pack_()
        elif not self._ending and (self._small.waiting or self._ddp is not None):
            self._ending = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def _is_shown(self, number: int, grad: Tensor | None) -> bool:
        shown, grad = self._shown[number], local(grad)
        return isinstance(grad, GradientView) and shown is not None and grad.source is shown()

    def _show(self, number: int) -> None:
        param, packed = self.params[number], self.gradients[number]
        packed.shown = True
        if not self._is_shown(number, param.grad):
            shown = Shown(packed)
            self._shown[number] = weakref.ref(shown)
            held = local(param)
            param.grad = like(param, GradientView(shown, held.shape, held.dtype, held.device))

    def _let_go(self, number: int) -> None:
        """Gives views of the present gradient a copy of it, before the buffer is overwritten."""
        reference, self._shown[number] = self._shown[number], None
        if reference is not None and (shown := reference()) is not None:
            shown.keep()

    def _hide_used(self) -> None:
        """Sets `.grad` to None where it still shows a gradient that a step has consumed."""
        if self._used:
            self._used = False
            for number, (param, packed) in enumerate(zip(self.params, self.gradients, strict=True)):
                if not packed.present:
                    if self._is_shown(number, param.grad):
                        param.grad = None
                    packed.shown = False

    def settle(self) -> None:
        """Takes over any `.grad` that other code has set: None, or a tensor."""
        for number, (param, packed) in enumerate(zip(self.params, self.gradients, strict=True)):
            grad, shown = param.grad, self._shown[number]
            # in most steps all are as backward left them, which is seen without a call of Python
            as_left = packed.shown and type(grad) is GradientView and shown is not None and grad.source is shown()
            if self._carried or not as_left:
                self._settle(number, param)
        self._small.pack_()

    def having_gradients(self) -> Iterator[nn.Parameter]:
        """The parameters with a gradient; each is settled when its turn comes."""
        for number, (param, packed) in enumerate(zip(self.params, self.gradients, strict=True)):
            self._settle(number, param)
            if packed.present:
                yield param

    def _settle(self, number: int, param: nn.Parameter) -> None:
        packed, grad = self.gradients[number], own_gradient(param)
        if grad is None:
            if packed.shown:
                packed.present = packed.shown = False
        elif not self._is_shown(number, grad):
            self._let_go(number)
            packed.pack_(grad, accumulate=False)
            self.show(number)
        elif not packed.shown:  # somebody has put a view back
            self.show(number)
        packed.settle()

    def show(self, number: int) -> None:
        """Makes the content of the buffer the gradient of a parameter."""
        self.gradients[number].present = True
        self._show(number)

    def _before_forward(self, *_: object) -> None:
        """Notes whether the model runs inside DDP, and checks that DDP ignores the packed parameters."""
        if not torch.is_grad_enabled():
            return
        own = set(map(id, self.params))
        for embedding in (ref() for ref in self._embeddings):
            if embedding is not None and id(embedding.weight) not in own:
                embedding.sparse = False  # its weight has been sharded
        self._used = self._used or any(packed.carrier is not None for packed in self.gradients)
        self._hide_used()
        ddp = DistributedDataParallel._get_active_ddp_module()
        self._ddp = None if ddp is None else weakref.ref(ddp)  # it must not outlive its process group
        self._ending = False  # a backward that failed may have left it set
        if ddp is not None and any(id(param) in own for param in ddp._module_parameters):
            raise ValueError(
                'MaskedAdamW: gradients="packed" must be set up before the model is wrapped in '
                "DistributedDataParallel; make the optimizer first"
            )

    def _end_backward(self) -> None:
        self._ending = False
        self._small.pack_()
        ddp = self._ddp() if self._ddp is not None else None
        if ddp is not None and ddp.require_backward_grad_sync:
            self.average(ddp.process_group)

    @torch.no_grad()
    def average(self, group: ProcessGroup | None = None) -> None:
        """Averages over the ranks of a group. A parameter with a gradient on any rank then has one on all ranks.

        Raises:
            ValueError: on all ranks, in the first call: they have different tickets.
        """
        if not self._compared:
            digests = str([packed.index_set.digest() for packed in self.gradients])
            if not is_same(digests, [group], self._buffer.device):
                raise ValueError(
                    "MaskedAdamW: expected the same ticket on all ranks that average gradients, got others; load "
                    "one file on each, or draw with one seed"
                )
            self._compared = True
        self.settle()
        self._hide_used()
        self.clear_absent()
        present = torch.tensor([packed.present for packed in self.gradients], dtype=torch.int32, device="cpu")
        present = present.to(self.buffer.device)
        torch.distributed.all_reduce(present, torch.distributed.ReduceOp.MAX, group)
        self.buffer.div_(torch.distributed.get_world_size(group))
        torch.distributed.all_reduce(self.buffer, group=group)
        for number, there in enumerate(present.tolist()):
            if there and not self.gradients[number].present:
                self.show(number)

    def clear_absent(self) -> None:
        """Zeros the slots of parameters without a gradient, so that a norm does not count values of earlier steps."""
        for number, packed in enumerate(self.gradients):
            if not packed.present:
                if not self._is_shown(number, self.params[number].grad):
                    self._let_go(number)
                packed.buffer.zero_()

    def index_tensors(self) -> list[Tensor]:
        """The tensors that locate the active entries of embedding rows."""
        return [
            t for packed in self.gradients if packed.rows is not None for t in (packed.rows.words, packed.rows.starts)
        ]

    def consume(self) -> None:
        """Marks the gradients consumed; the next backward starts from zero."""
        self._used = True
        for packed in self.gradients:
            packed.present = False

    def remove(self) -> None:
        """Removes the hooks and makes the embeddings dense again. A second call does nothing."""
        self._undo()


class WeakHook:
    """A hook that calls a method of an object without keeping it alive.

    Args:
        method: the method; None: the hook does nothing.
        copied: makes the hook of a copy of the module. By default that one does nothing.
        arguments: for `copied`; a copy of the module passes its copies of them.
    """

    def __init__(self, method: Any = None, copied: Any = None, *arguments: Any) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)
        self._copied = copied or WeakHook, arguments

    def __call__(self, *args: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> Any:
        return self._copied


class _CopiedHook:
    """The hook on a copy of the model, whose gradients are dense, but which DDP would still ignore."""

    def __init__(self, ignored: list[str], embeddings: list[Any]) -> None:
        self.ignored = ignored
        for module in embeddings:
            module.sparse = False

    def __call__(self, *_: object) -> None:
        if torch.is_grad_enabled() and DistributedDataParallel._get_active_ddp_module() is not None:
            raise ValueError(
                "this model is a copy of one with packed gradients, and DistributedDataParallel would not average its "
                "gradients; copy it before making the optimizer, or after remove()"
            )


class _CopiedSparse:
    """The hook on a copy of an embedding that was set to `sparse=True`, until its first forward.

    Nobody packs the gradient of the copy, so it becomes dense; not earlier, as `sparse` can be copied after the hook.
    """

    def __call__(self, module: nn.Module, *_: object) -> None:
        _forget_copied(module)


def _undo(own: Any, handles: list[Any], things: list[Any], model_ref: Any, ignored: list[str]) -> None:
    """Removes hooks, views and options from a model, or from those of its parts that still exist."""
    for handle in handles:
        handle.remove()
    for thing in (ref() for ref in things):
        if isinstance(thing, nn.Embedding):
            thing.sparse = False
        elif isinstance(thing, Tensor) and _packed.get(thing) is own:
            _packed.pop(thing)
            if isinstance(local(thing.grad), GradientView):
                thing.grad = None
    if (model := model_ref()) is not None:
        _leave_to_ddp(model, ignored)


def _leave_to_ddp(model: nn.Module, ignored: list[str]) -> None:
    setattr(model, _IGNORED, [name for name in getattr(model, _IGNORED) if name not in ignored])


def _forget_copied(model: nn.Module) -> None:
    """Removes the hooks that a model has because it, or a part of it, is a copy of one with packed gradients."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _CopiedHook):
                del module._forward_pre_hooks[key]
                _leave_to_ddp(module, hook.ignored)
            elif isinstance(hook, _CopiedSparse):
                del module._forward_pre_hooks[key]
                setattr(module, "sparse", False)  # noqa: B010 (of an nn.Embedding)
