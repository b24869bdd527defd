"""The `.grad` of a parameter whose gradient is packed: a view of the packed gradient in the parameter's shape.

Frameworks clip, log and check `p.grad` for `model.parameters()` and know nothing of our optimizer. Through this view
they read and change the values that the next step uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ltp_sparse.deltas.entries import gather, scatter_
from ltp_sparse.tickets.index_set import IndexSet

aten = torch.ops.aten

_ITSELF = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)
_SAME_ORDER = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze")
_COPIES = ("clone", "_to_copy")
_REDUCTIONS = ("sum", "mean", "max", "min", "amax", "amin", "any", "all", "linalg_vector_norm")
_OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("max", "amax"), torch.maximum),
    **dict.fromkeys(("min", "amin"), torch.minimum),
    "any": torch.bitwise_or,
    "all": torch.bitwise_and,
}
"""The reductions of two entries."""


class Source(Protocol):
    """The owner of the packed gradient of one parameter."""

    index_set: IndexSet

    def values(self) -> Tensor:
        """float32 [k], the gradient itself, not a copy."""

    def pack_(self, grad: Tensor, *, accumulate: bool) -> None:
        """Takes the active entries of a dense or row-sparse gradient in the parameter's shape."""


class PackedTensor(Tensor):
    """A tensor that stores k of its n entries; all others have one common value.

    Element-wise operations and reductions work on the k values. Any other operation gets a temporary dense copy; if it
    writes into a view of a packed gradient, the active entries of the result are kept. Operations that return an alias
    of their input are refused, since writes to a dense alias would be lost.

    Attributes:
        index_set: the stored entries.
        packed_values: [k], their values.
        fill: 0-dim, the value of all other entries.
    """

    index_set: IndexSet
    packed_values: Tensor
    fill: Tensor

    @staticmethod
    def __new__(cls, index_set: IndexSet, values: Tensor, fill: Tensor, shape: Any) -> PackedTensor:
        """Makes a tensor of k stored entries.

        Args:
            index_set: the stored entries.
            values: [k], their values, in any dtype.
            fill: 0-dim, the value of all other entries; its dtype is that of the tensor.
            shape: the shape of the tensor.
        """
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=fill.dtype, device=values.device)
        made.index_set, made.packed_values, made.fill = index_set, values, fill
        return made

    def values_now(self) -> Tensor:
        """[k], the values of the stored entries: the tensor itself, not a copy."""
        return self.packed_values

    def dense(self) -> Tensor:
        """An ordinary tensor with the same values."""
        out = torch.empty(self.index_set.n, dtype=self.dtype, device=self.device).copy_(self.fill.expand(self.numel()))
        scatter_(out, self.index_set, self.values_now().to(self.dtype))
        return out.view(self.shape)

    def take_(self, dense: Tensor) -> None:
        """Keeps the active entries of a dense tensor."""
        self.values_now().copy_(gather(dense.contiguous(), self.index_set))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.index_set.k:,} of {list(self.shape)} entries, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, values: Tensor) -> None:
        """Copies the values; torch's own setter would change this object but not the packed gradient."""
        with torch.no_grad():
            self.copy_(values)

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        return self.dense().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.add_.Tensor and isinstance(args[0], PackedTensor) and args[0]._accumulates(args[1], kwargs):
            return args[0]  # checked first, since each further backward does this for every parameter
        name = func._schema.name.removeprefix("aten::")
        self = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PackedTensor))
        if func in _ITSELF:
            return self._again(self.shape)
        if name in _SAME_ORDER:
            other = torch.empty(self.shape, dtype=self.dtype, device="meta")
            return self._again(func(other, *args[1:], **kwargs).shape)
        if name.startswith("_foreach_"):
            return _one_by_one(name.removeprefix("_foreach_"), args, kwargs)
        if name.startswith("_amp_foreach_"):  # a GradScaler unscales
            for grad in args[0]:
                func([_values_of(grad)], *args[1:], **kwargs)
            return None
        if name == "zero_":
            self.values_now().zero_()
            return self
        if name == "equal":
            return torch.equal(*(leaf.dense() if isinstance(leaf, PackedTensor) else leaf for leaf in args))
        if _is_elementwise(func, name) and _have_one_index_set(args, kwargs):
            return self._elementwise(func, args, kwargs)
        if name in _REDUCTIONS and (reduced := self._reduced(func, name, args, kwargs)) is not None:
            return reduced
        return _densely(func, args, kwargs)

    def _again(self, shape: Any) -> PackedTensor:
        return PackedTensor(self.index_set, self.packed_values, self.fill, shape)

    def _accumulates(self, grad: Any, kwargs: dict[str, Any]) -> bool:
        return False

    def _elementwise(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        values = func(*tree_map(_values_of, args), **tree_map(_values_of, kwargs))
        if func._schema.is_mutable:
            return args[0]
        fill = func(*tree_map(_fill_of, args), **tree_map(_fill_of, kwargs))
        return PackedTensor(self.index_set, values, fill, self.shape)

    def _reduced(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The reduction over all entries; None if only some dimensions are reduced."""
        options = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if options.get("dim") or options.get("dim") == 0 or options.get("keepdim"):
            return None
        order = float(options.get("ord", 2)) if name == "linalg_vector_norm" else 1.0
        if order <= 0 or not self.index_set.k or func._overloadname in ("dim", "dims", "names_dim", "other", "out"):
            return None
        values, others = self.values_now(), self.numel() - self.index_set.k
        options = {key: value for key, value in options.items() if key in ("ord", "dtype")}
        kept = (aten.sum.default if name == "mean" else func)(values, **options)
        if others:
            fill = self.fill.to(kept.dtype)
            if name in ("sum", "mean"):
                kept = kept + others * fill
            elif name == "linalg_vector_norm":
                both = torch.stack([kept, others ** (1 / order) * fill.abs()])
                kept = torch.linalg.vector_norm(both, order)
            else:
                kept = _OF_TWO[name](kept, fill)
        return kept / self.numel() if name == "mean" else kept


class GradientView(PackedTensor):
    """The `.grad` of a parameter whose gradient is packed. Its inactive entries are always zero."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source, shape: Any, dtype: torch.dtype, device: torch.device) -> GradientView:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.source, made.index_set = source, source.index_set
        return made

    @cached_property
    def fill(self) -> Tensor:  # type: ignore[override]
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def values_now(self) -> Tensor:
        return self.source.values()

    def take_(self, dense: Tensor) -> None:
        self.source.pack_(dense.contiguous(), accumulate=False)

    def _again(self, shape: Any) -> PackedTensor:
        return GradientView(self.source, shape, self.dtype, self.device)

    def _accumulates(self, grad: Any, kwargs: dict[str, Any]) -> bool:
        """Adds a further gradient of autograd to the packed one; False if this one cannot be added."""
        alike = isinstance(grad, Tensor) and (grad.shape, grad.dtype) == (self.shape, self.dtype)
        if not alike or isinstance(grad, PackedTensor) or kwargs:
            return False
        self.source.pack_(grad, accumulate=True)
        return True


def _values_of(leaf: Any) -> Any:
    return leaf.values_now() if isinstance(leaf, PackedTensor) else leaf


def _fill_of(leaf: Any) -> Any:
    return leaf.fill if isinstance(leaf, PackedTensor) else leaf


def _is_elementwise(func: Any, name: str) -> bool:
    return name in _COPIES or (torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags)


def _have_one_index_set(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether all tensors are scalars or have the same active entries, and stay on one device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    packed = [tensor for tensor in tensors if isinstance(tensor, PackedTensor)]
    first = packed[0]
    return (
        all(tensor.index_set is first.index_set and tensor.shape == first.shape for tensor in packed)
        and all(tensor.dim() == 0 for tensor in tensors if not isinstance(tensor, PackedTensor))
        and kwargs.get("device") in (None, first.device)
        and kwargs.get("layout") in (None, torch.strided)
        and "out" not in kwargs
    )


def _one_by_one(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`torch._foreach_<name>` as a loop, so that there is at most one dense copy at a time."""
    operation = aten.linalg_vector_norm if name == "norm" else getattr(aten, name)
    first, *rest = args
    made = [
        operation(tensor, *(other[i] if isinstance(other, list | tuple) else other for other in rest), **kwargs)
        for i, tensor in enumerate(first)
    ]
    return None if name.endswith("_") else made


def _densely(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on dense copies and keeps the active entries of those that it wrote."""
    schema = func._schema
    aliases = any(made.alias_info is not None and not made.alias_info.is_write for made in schema.returns)
    if func.namespace not in ("aten", "prims") or aliases:
        raise RuntimeError(
            f"{schema.name} would not change the packed gradient behind this .grad; read a copy, `p.grad.clone()` or "
            "`p.grad.dense()`, change it by p.grad.copy_(...) or p.grad.mul_(...), and average packed gradients over "
            "ranks by the optimizer's average_gradients()"
        )
    copies: dict[int, tuple[PackedTensor, Tensor]] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, PackedTensor):
            return leaf
        return copies.setdefault(id(leaf), (leaf, leaf.dense()))[1]

    out = func(*tree_map(copied, args), **tree_map(copied, kwargs))
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for leaf in tree_leaves(given.get(argument.name)):
                if isinstance(leaf, PackedTensor):
                    leaf.take_(copies[id(leaf)][1])
    of_copy = {id(copy): leaf for leaf, copy in copies.values()}
    return tree_map(lambda made: of_copy.get(id(made), made), out)
