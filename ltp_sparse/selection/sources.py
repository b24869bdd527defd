"""The inputs of a selection: versions of a model in memory or on disk, and scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ltp_sparse.ops.sources import Reader
from ltp_sparse.tickets.ticket import Pool, in_pool
from ltp_sparse.weights.checkpoints import CheckpointTensor, Readable, pairs_of_pieces
from ltp_sparse.weights.names import Named, is_floating, parameter_order
from ltp_sparse.weights.tensors import DTYPE_NAMES, DTYPES, check_plain_tensor
from ltp_sparse.weights.versions import Missing, Weights, check_sides, open_weights, side_by_side

ScoreFunction = Callable[[str, int, int], Tensor]
"""(name, start, stop) -> the scores of entries start..stop of a parameter's row-major order."""

Score = Mapping[str, Tensor] | ScoreFunction


@dataclass(frozen=True)
class Sides:
    """The two sides of a selection.

    Attributes:
        base: the initial tensors.
        after: the tuned tensors or the scores; for a score function, the initial tensors.
        quantised: the number of quantised tensors, which are left out.
    """

    base: Named[Readable]
    after: Named[Readable]
    quantised: int

    @classmethod
    def of(cls, initial: Weights, tuned: Weights | None, score: Score | None, what: str = "select") -> Sides:
        """Opens both sides.

        Raises:
            ValueError: neither or both of `tuned` and `score` are given.
        """
        if (tuned is None) == (score is None):
            raise ValueError(f"{what}: pass either tuned= or score=")
        for name, tensor in score.items() if isinstance(score, Mapping) else ():
            if not is_floating(tensor):
                raise TypeError(
                    f"{what}: the scores of {name!r} must be {DTYPE_NAMES}, got {tensor.dtype}; convert them"
                )
        base = after = open_weights(initial)
        if not callable(score):
            base, after = side_by_side(base, open_weights(tuned if score is None else score))  # type: ignore[arg-type]
        return cls(base, after, len(base.quantised | after.quantised))


def names_in_pool(
    base: Iterable[str], after: Iterable[str], pool: Pool, allow_missing: Missing, *, what: str, scored: bool
) -> tuple[list[str], dict[str, int]]:
    """The names of the pool that are on both sides.

    Args:
        base, after: the names of each side.
        pool: which names may be selected.
        allow_missing: names that may be on one side only.
        what: the caller, for messages.
        scored: whether the second side has scores instead of tuned weights, for messages.

    Returns:
        The names in canonical order, and side -> number of names on this side only.

    Raises:
        ValueError: the pool is empty, or one of its names is on one side only and `allow_missing` does not cover it.
    """
    inside = set(in_pool(dict.fromkeys([*base, *after]), pool))
    one, other = ([name for name in names if name in inside] for names in (base, after))
    sides = ("initial model", "scores" if scored else "tuned model")
    return parameter_order(set(one) & set(other)), check_sides(one, other, allow_missing, what=what, sides=sides)


def check_dtypes(names: Iterable[str], *sides: Mapping[str, Readable], what: str) -> None:
    """Checks that the entries of parameters can be compared.

    Raises:
        TypeError: a tensor is sharded, has no values or is not float32, bfloat16 or float16.
        ValueError: the same for a dtype in a file.
    """
    for name in names:
        check_has_values(name, *sides, what=what)
        for tensor in (side[name] for side in sides if name in side):
            if is_traceable_wrapper_subclass(tensor):
                raise TypeError(
                    f"{what}: {name!r} is a {type(tensor).__name__}, of which this process can hold a part only; "
                    "call select_sharded, or pass its full_tensor()"
                )
            if tensor.dtype not in DTYPES:
                raise (ValueError if isinstance(tensor, CheckpointTensor) else TypeError)(
                    f"{what}: {name!r} must be {DTYPE_NAMES}, got "
                    f"{getattr(tensor, 'stored', tensor.dtype)}; convert it, or leave it out with pool="
                )


def check_has_values(name: str, *sides: Mapping[str, Readable], what: str) -> None:
    """Raises a TypeError for a parameter without values, as on the meta device."""
    for tensor in (side[name] for side in sides if name in side):
        if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
            check_plain_tensor(tensor, f"{what}: {name!r}")


class MixedDtypes(UserWarning):
    """The two sides of a selection differ in dtype."""


def warn_of_dtypes(names: Iterable[str], base: Mapping[str, Readable], after: Mapping[str, Readable]) -> dict[str, int]:
    """Metadata with the number of parameters that differ in dtype between the sides; empty if none does.

    Warns:
        MixedDtypes: some differ.
    """
    mixed = [name for name in names if base[name].dtype != after[name].dtype]
    if not mixed:
        return {}
    one, other = base[mixed[0]].dtype, after[mixed[0]].dtype
    coarser = max(one, other, key=lambda dtype: torch.finfo(dtype).eps)
    warnings.warn(
        f"select: {len(mixed)} parameters differ in dtype, e.g. {mixed[0]!r} is {one} in the initial model and {other} "
        f"in the tuned one: changes by rounding are ranked like changes by training. Pass compare_in={coarser}, or "
        "a version of the other side that was not rounded",
        MixedDtypes,
        stacklevel=3,
    )
    return {"mixed_dtypes": len(mixed)}


def equal_infinities(before: Readable, after: Readable) -> int:
    """The number of entries that are the same infinity on both sides, which makes their delta NaN."""
    floats = ((one.float(), other.float()) for one, other in pairs_of_pieces(before, after))
    return sum(int((one.isinf() & (one == other)).sum()) for one, other in floats)


def device_of(tensors: Iterable[Readable]) -> torch.device:
    """The device of the first tensor in memory; the CPU if there is none."""
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def score_reader(score: ScoreFunction, name: str, n: int, device: torch.device) -> Reader:
    """A reader of a score function that checks its results."""

    def read(start: int, stop: int) -> Tensor:
        piece = score(name, start, stop)
        if not isinstance(piece, Tensor) or piece.dtype not in DTYPES or piece.numel() != stop - start:
            got = f"{piece.dtype} {list(piece.shape)}" if isinstance(piece, Tensor) else type(piece).__name__
            raise ValueError(
                f"select: score({name!r}, {start}, {stop}) must return a {DTYPE_NAMES} tensor of "
                f"{stop - start} entries, got {got}"
            )
        return piece.detach().reshape(-1).contiguous().to(device)

    return Reader(n, read, device)


def check_shape(name: str, initial: Sequence[int], other: Sequence[int]) -> None:
    """Raises ValueError if the two sides have a parameter in different shapes."""
    if Size(initial) != Size(other):
        raise ValueError(
            f"select: {name!r} has shape {list(initial)} in the initial model and {list(other)} in the other; "
            "they must be versions of one model"
        )
