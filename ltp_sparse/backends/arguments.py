"""What each function of a backend takes: one record. These are the only lists of arguments.

The operators' schemas, the checks and the readers of the compiled modules go by the fields: their names, and what their
annotations say of dtype, shape and whether they are written. A tensor that may be missing is None then.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ltp_sparse.backends.coefficients import HYPER, Coefficient
from ltp_sparse.tickets.tile_table import Column
from ltp_sparse.weights.tensors import DTYPES

RUN = 16
"""Neighbouring entries that are sampled together: a cache line of float32."""


class Spec(NamedTuple):
    """What a tensor must be. shape: numbers, or names of sizes; coded: the dtype of 8-bit moments; None: any.

    internal: no operator takes it.
    """

    dtype: torch.dtype | None = None
    shape: tuple[int | str, ...] = ()
    written: bool = False
    coded: torch.dtype | None = None
    internal: bool = False


_dtype_of = operator.attrgetter("dtype")


class Tensors(list["Tensor | None"]):
    """A list of tensors, or None for one that is not there, that reads each property of them once.

    It is made for one call, or for the calls of one step: what changes under it later is not seen.
    """

    def renew(self, tensors: Iterable[Tensor | None], addresses: tuple[int, ...]) -> None:
        """Takes other tensors that are like these in all but where they are."""
        self[:] = tensors
        vars(self).pop("present", None)
        vars(self)["addresses"] = addresses

    def let_go(self) -> None:
        """Holds no tensors until it is renewed."""
        self.renew((), ())

    @cached_property
    def present(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where the data is; 0: there is none."""
        return self._each(Tensor.data_ptr)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries; 0: the tensor is not there."""
        return self._each(Tensor.numel)

    def _each(self, read: Callable[[Tensor], int]) -> tuple[int, ...]:
        if len(self.present) == len(self):
            return tuple(map(read, self.present))
        return tuple(0 if tensor is None else read(tensor) for tensor in self)

    @cached_property
    def dtypes(self) -> set[torch.dtype]:
        return {*map(_dtype_of, self.present)}

    @cached_property
    def devices(self) -> set[int]:
        """The numbers of the GPUs; -1: the CPU."""
        return {*map(Tensor.get_device, self.present)}

    @cached_property
    def contiguous(self) -> bool:
        return all(map(Tensor.is_contiguous, self.present))

    @property
    def code(self) -> int:
        """The code of their one dtype."""
        return next((DTYPES[dtype] for dtype in self.dtypes), 0)

    @cached_property
    def codes(self) -> list[int]:
        """The codes of all dtypes."""
        return [DTYPES[tensor.dtype] for tensor in self.present]

    def to_contiguous(self) -> Tensors:
        return self if self.contiguous else Tensors(None if t is None else t.contiguous() for t in self)


Parameters = Annotated[Tensors, Spec()]
WrittenParameters = Annotated[Tensors, Spec(written=True)]

# --- masked_adamw_, and what goes with it ---


@dataclass(frozen=True, eq=False)
class Index:
    """The active entries of P tensors; see `TileTable`."""

    tiles: Annotated[Tensor, Spec(torch.int64, ("tiles", len(Column)))]
    words: Annotated[Tensor, Spec(torch.int32, ("words",))]
    ranks: Annotated[Tensor, Spec(torch.int16, ("ranks",))]
    positions: Annotated[Tensor, Spec(torch.int16, ("positions",))]


@dataclass(frozen=True, eq=False)
class Tiles(Index):
    """The active entries of P parameters, and their gradients."""

    grads: Annotated[Tensors, Spec()]


@dataclass(frozen=True, eq=False)
class Pack(Tiles):
    """`masked_pack_`: copies the active entries of `grads` to their slots of `out`, or adds them to what is there."""

    out: Annotated[Tensor, Spec(torch.float32, ("k",), written=True)]
    accumulate: bool


@dataclass(frozen=True, eq=False)
class Norm(Tiles):
    """`masked_sum_squares`: what the gradient of an update is made of.

    packed:   `grads` is one tensor, float32 [K] in slot order; whether a parameter is updated, APPLY alone says
    master:   the exact values of the active entries; None: those of the parameters are exact
    anchor:   the values that the pull draws to, if any
    prepared: what `prepare_step` has written of these parameters and coefficients for kernels on a GPU, the rows
              `Prepared` of csrc/common/adamw.h; None: they are made when they are needed
    """

    params: Parameters
    coefficients: Annotated[Tensor, Spec(torch.float64, ("params", Coefficient.COUNT))]
    packed: bool
    master: Annotated[Tensor | None, Spec(torch.float32, ("k",))]
    anchor: Annotated[Tensor | None, Spec(torch.float32, ("k",))]
    prepared: Annotated[Tensor | None, Spec(torch.int64, ("params", 8), internal=True)] = dataclasses.field(
        default=None, kw_only=True
    )


@dataclass(frozen=True, eq=False)
class Update(Norm):
    """`masked_adamw_`.

    scales: of 8-bit moments, whose codes the other two are then; None: they are float32
    clip:   multiplies GRAD_FACTOR and PULL, in float64; None: 1
    """

    params: WrittenParameters
    master: Annotated[Tensor | None, Spec(torch.float32, ("k",), written=True)]
    exp_avg: Annotated[Tensor, Spec(torch.float32, ("k",), written=True, coded=torch.int8)]
    exp_avg_sq: Annotated[Tensor, Spec(torch.float32, ("k",), written=True, coded=torch.uint8)]
    scales: Annotated[Tensor | None, Spec(torch.float32, ("blocks", 2), written=True)]
    stochastic: bool
    clip: Annotated[Tensor | None, Spec(torch.float64)] = dataclasses.field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Step:
    """`prepare_step`: counts a step of P parameters and computes their coefficients.

    grads:       as in `Norm`, with `packed`
    hyper:       of every parameter group
    group:       of each parameter
    numbers:     tell the parameters apart in random bits
    has_grad:    1 for each parameter that has a gradient, else 0
    steps:       updates that each has taken; goes up with `counts`
    found_inf:   not 0: the step is skipped
    grad_scale:  gradients are too large by this factor
    pull_factor: multiplies the pull
    prepared:    see `Norm`; None: the backend does not need it
    """

    params: Parameters
    grads: Annotated[Tensors, Spec()]
    packed: bool
    hyper: Annotated[Tensor, Spec(torch.float64, ("groups", len(HYPER)))]
    group: Annotated[Tensor, Spec(torch.int64, ("params",))]
    numbers: Annotated[Tensor, Spec(torch.int64, ("params",))]
    has_grad: Annotated[Tensor, Spec(torch.float64, ("params",))]
    steps: Annotated[Tensor, Spec(torch.float64, ("params",), written=True)]
    counts: bool
    found_inf: Annotated[Tensor | None, Spec(torch.float32)]
    grad_scale: Annotated[Tensor | None, Spec(torch.float32)]
    pull_factor: Annotated[Tensor | None, Spec(torch.float64)]
    seed: int
    coefficients: Annotated[Tensor, Spec(torch.float64, ("params", Coefficient.COUNT), written=True)]
    prepared: Annotated[Tensor | None, Spec(torch.int64, ("params", 8), written=True)]


@dataclass(frozen=True, eq=False)
class Total:
    """`gradient_norm`: the norm over all tiles of a step, whose launches come one after the other.

    first, tiles: the tiles of the launches before, and of all
    sums:         what each tile adds, in the backend's own layout
    arrived:      for kernels that count their thread blocks: 0 before and after
    grad_norm:    the norm, written by the last launch; clip: what scales gradients to a norm of at most `max_norm`
    """

    first: int
    tiles: int
    max_norm: float
    sums: Annotated[Tensor, Spec(torch.float64, written=True)]
    arrived: Annotated[Tensor | None, Spec(torch.int32, written=True)]
    grad_norm: Annotated[Tensor, Spec(torch.float64, written=True)]
    clip: Annotated[Tensor, Spec(torch.float64, written=True)]


NORM_GROUP = 64
"""Tiles whose sums a kernel on a GPU adds up first; as in csrc/cuda/masked_adamw.h."""


# --- copies of active entries; tensors and slots are of one dtype, any whose items have 1, 2, 4 or 8 bytes ---


@dataclass(frozen=True, eq=False)
class Gather(Index):
    """`masked_gather_`: copies the active entries of `tensors` to their slots."""

    tensors: Parameters
    slots: Annotated[Tensor, Spec(shape=("k",), written=True)]


@dataclass(frozen=True, eq=False)
class Scatter(Index):
    """`masked_scatter_`: copies the slots to the active entries of `tensors`."""

    tensors: WrittenParameters
    slots: Annotated[Tensor, Spec(shape=("k",))]


@dataclass(frozen=True, eq=False)
class Swap(Index):
    """`masked_swap_`: exchanges the active entries of `tensors` and their slots."""

    tensors: WrittenParameters
    slots: Annotated[Tensor, Spec(shape=("k",), written=True)]


# --- the passes of topk_delta ---

Indices = Annotated[Tensor, Spec(torch.int64, ("groups",))]
WrittenIndices = Annotated[Tensor, Spec(torch.int64, ("groups",), written=True)]
PerTile = Annotated[Tensor, Spec(torch.int64, ("tiles",))]
WrittenPerTile = Annotated[Tensor, Spec(torch.int64, ("tiles",), written=True)]
One = Annotated[Tensor, Spec(torch.int64, (1,), written=True)]
Keys = Annotated[Tensor, Spec(torch.int32, ("capacity",), written=True)]
Positions = Annotated[Tensor, Spec(torch.int16, ("capacity",), written=True)]
Bitmaps = Annotated[Tensor, Spec(torch.int32, ("words",), written=True)]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Tensors before and after; `initial` may be empty: zeros."""

    initial: Parameters
    tuned: Parameters


@dataclass(frozen=True, eq=False)
class Histogram(Pairs):
    """`delta_histogram`: counts digits of the non-zero keys of each group.

    groups:    the group of each pair
    prefixes:  None: counted are the upper 15 bits of all keys; else the lower 16, of the keys with this upper part
    histogram: added to
    nonfinite: set to 1 if an infinity or a NaN was seen
    """

    groups: list[int]
    prefixes: Annotated[Tensor | None, Spec(torch.int64, ("groups",))]
    histogram: Annotated[Tensor, Spec(torch.int64, ("groups", "bins"), written=True)]
    nonfinite: One


@dataclass(frozen=True, eq=False)
class Sample(Pairs):
    """`sample_keys`: the keys of some runs of `RUN` neighbouring entries.

    tensors, runs: run number r of a tensor has its entries RUN * r and on, in row-major order;
                   0 <= r < max(1, n // RUN)
    keys:          at most the largest finite key, 0 beyond the end of a tensor
    """

    tensors: Annotated[Tensor, Spec(torch.int64, ("count",))]
    runs: Annotated[Tensor, Spec(torch.int64, ("count",))]
    keys: Annotated[Tensor, Spec(torch.int32, ("count", RUN), written=True)]


TileDigests = Annotated[Tensor | None, Spec(torch.int64, ("tiles", 2), written=True)]
Budgets = Annotated[Tensor, Spec(torch.int64, ("groups", 8))]
"""What is wanted of every group, and where its samples lie: the rows `Budget` of csrc/cuda/topk_delta.h."""


@dataclass(frozen=True, eq=False)
class Sampled(Pairs):
    """`select_sampled`: a selection by samples whose route is decided on the device, so that the host waits once.

    groups:          the group of each pair
    samples:         scratch, the sampled keys; may lie where `words` are written later
    low, high:       scratch, the band of keys of each group in which its k-th largest is looked for
    words, counts:   the bitmaps of the pairs, one after the other, and the entries selected in each tile
    thresholds:      the smallest selected |delta| of each group; infinite: none was selected
    keys, positions: room for candidates
    digests:         as of `Band`
    """

    groups: list[int]
    budgets: Budgets
    samples: Annotated[Tensor, Spec(torch.int32, ("count", RUN), written=True)]
    low: WrittenIndices
    high: WrittenIndices
    words: Bitmaps
    counts: WrittenPerTile
    thresholds: Annotated[Tensor, Spec(torch.float32, ("groups",), written=True)]
    keys: Keys
    positions: Positions
    digests: TileDigests = None


@dataclass(frozen=True, eq=False)
class Band(Pairs):
    """`delta_band`: marks the entries above a band of keys, counts, and stores the candidates inside the band.

    groups:          the group of each pair
    low, high:       1 <= low <= high, of each group
    words:           every word of every pair is written: the bits of keys >= high
    word_offsets:    the first word of each pair
    above, inside:   the number of keys >= high of each tile, and of low <= key < high
    take:            also set the bits of each tile's first `take` entries inside the band, if given
    keys, positions: the candidates (uint16 bits), each tile's contiguous and ascending
    offsets:         where a tile's candidates start; -1: not stored, no room
    cursor:          candidates stored so far, or wanted where it exceeds their room
    nonfinite:       set to 1 if an infinity or a NaN was seen
    digests:         also those of the tiles of `initial`, if given (`weights.digests.tile_digests`)
    """

    groups: list[int]
    low: Indices
    high: Indices
    words: Bitmaps
    word_offsets: list[int]
    above: WrittenPerTile
    inside: WrittenPerTile
    take: Annotated[Tensor | None, Spec(torch.int64, ("tiles",))]
    keys: Keys
    positions: Positions
    offsets: WrittenPerTile
    cursor: One
    nonfinite: One
    digests: TileDigests = None


@dataclass(frozen=True, eq=False)
class Candidates:
    """What `delta_band` has stored, none left out. tile_groups: the group of each tile."""

    keys: Annotated[Tensor, Spec(torch.int32, ("capacity",))]
    positions: Annotated[Tensor, Spec(torch.int16, ("capacity",))]
    offsets: PerTile
    inside: PerTile
    tile_groups: PerTile


@dataclass(frozen=True, eq=False)
class CandidateBins(Candidates):
    """`candidate_histogram`: counts the candidates low <= key < high of each group, by (key - low) >> shift.

    histogram: added to; what is beyond the bins is left out
    """

    low: Indices
    high: Indices
    shift: Indices
    histogram: Annotated[Tensor, Spec(torch.int64, ("groups", "bins"), written=True)]


@dataclass(frozen=True, eq=False)
class Marks(Candidates):
    """Where candidates are marked: those above the cut of their group, or at it.

    words:      bitmaps as `delta_band` writes them
    tile_words: the first word of each tile
    """

    cut: Indices
    words: Bitmaps
    tile_words: PerTile


@dataclass(frozen=True, eq=False)
class Above(Marks):
    """`take_above`: sets the bits of the candidates above the cut.

    taken, ties: how many these are in each tile, and how many lie at the cut
    """

    taken: WrittenPerTile
    ties: WrittenPerTile


@dataclass(frozen=True, eq=False)
class Ties(Marks):
    """`take_ties`: sets the bits of each tile's first `take` candidates at the cut."""

    take: PerTile


RECORDS: dict[str, type] = {
    "masked_adamw_": Update,
    "masked_sum_squares": Norm,
    "masked_pack_": Pack,
    "masked_gather_": Gather,
    "masked_scatter_": Scatter,
    "masked_swap_": Swap,
    "delta_histogram": Histogram,
    "sample_keys": Sample,
    "delta_band": Band,
    "candidate_histogram": CandidateBins,
    "take_above": Above,
    "take_ties": Ties,
}
"""The functions of a backend that are checked, and what each takes. Two more are the optimizer's own: `prepare_step`
takes a `Step`, `gradient_norm` a `Norm` and a `Total`."""


class Field(NamedTuple):
    """A field of a record. kind: Tensor, Tensors, bool or list."""

    kind: type
    optional: bool
    spec: Spec


@cache
def fields_of(record: Any) -> dict[str, Field]:
    """Name -> field of a class of records, in the order of its constructor."""
    found = {}
    for name, hint in get_type_hints(record, include_extras=True).items():
        spec = Spec()
        if get_origin(hint) is Annotated:
            hint, spec = get_args(hint)
        optional = type(None) in get_args(hint)
        found[name] = Field(get_args(hint)[0] if optional else get_origin(hint) or hint, optional, spec)
    order = sorted(record.__dataclass_fields__.values(), key=lambda field: field.kw_only)
    return {field.name: found[field.name] for field in order}


_ORDER = (
    *("params", "grads", "out", "exp_avg", "exp_avg_sq", "scales", "master", "tiles", "words", "ranks", "positions"),
    *("coefficients", "anchor", "stochastic", "packed", "accumulate"),
)
"""Of an operator's arguments, since programs pass them by position. What is new goes to the end."""


@cache
def arguments_of(record: type) -> dict[str, Field]:
    """The fields of a record in the order of the operator's arguments."""
    places = {name: place for place, name in enumerate(_ORDER)}
    fields = {name: field for name, field in fields_of(record).items() if not field.spec.internal}
    return dict(sorted(fields.items(), key=lambda item: places.get(item[0], len(places))))


def schema(op: str, record: type, *more: str, returns: str) -> str:
    """What torch.library is told of an operator with the fields of a record as its arguments."""
    letters, arguments = iter("abcdefghijklmnopqrstuvwxyz"), []
    for name, field in arguments_of(record).items():
        kind = {bool: "bool", list: "int[]"}.get(field.kind, "Tensor")
        if field.spec.written:
            kind += f"({next(letters)}!)"
        if field.kind is Tensors:
            kind += "?[]" if name == "grads" else "[]"
        default = "=None" if field.optional and name not in _ORDER else ""
        arguments.append(f"{kind}{'?' if field.optional else ''} {name}{default}")
    return f"{op}({', '.join([*arguments, *more])}) -> {returns}"


def tensors_of(record: Any) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of all fields that are one tensor and there."""
    for name, field in fields_of(record.__class__).items():
        if field.kind is Tensor and (value := getattr(record, name)) is not None:
            yield name, value
