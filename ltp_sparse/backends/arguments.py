"""The records that the functions of a backend take. Their fields are the only lists of arguments.

The schemas of the operators, the checks of arguments and the compiled modules all read the fields: their names, and the
dtype, the shape and whether they are written, from the annotations. An optional tensor that is absent is None.
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
"""Neighbouring entries that are sampled together: one cache line of float32."""


class Spec(NamedTuple):
    """What a tensor must be.

    Attributes:
        dtype: None allows any.
        shape: sizes as numbers, or as names that stand for one size in the whole record.
        written: the function writes into it.
        coded: the dtype where moments have 8 bits.
        internal: it is not an argument of the operator.
    """

    dtype: torch.dtype | None = None
    shape: tuple[int | str, ...] = ()
    written: bool = False
    coded: torch.dtype | None = None
    internal: bool = False


_dtype_of = operator.attrgetter("dtype")


class Tensors(list["Tensor | None"]):
    """A list of tensors, with None for an absent one. Each property of the tensors is read once and kept.

    It lives for one call, or for the calls of one step. It does not see later changes of its tensors.
    """

    origins: tuple[int, ...] = ()
    """The first entry of each tensor in a larger, whole tensor that it is a part of. Empty: the tensors are whole.

    For parts, tiles, addresses and sizes are those of the whole tensors, so that the random bits of an entry do not
    depend on how its tensor is cut.
    """

    @classmethod
    def of_parts(cls, tensors: Iterable[Tensor | None], origins: tuple[int, ...]) -> Tensors:
        """A list of tensors that begin at these entries of whole tensors; no origins: they are whole."""
        made = cls(tensors)
        made.origins = origins
        return made

    def renew(self, tensors: Iterable[Tensor | None], addresses: tuple[int, ...]) -> None:
        """Takes other tensors, which differ from the present ones in their addresses only, or none for a while."""
        self[:] = tensors
        vars(self).pop("present", None)
        vars(self)["addresses"] = self._from_origins(addresses, -1)

    @cached_property
    def present(self) -> list[Tensor]:
        """The tensors that are there."""
        return [tensor for tensor in self if tensor is not None]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The address of each tensor's data, 0 where there is none."""
        return self._from_origins(self._each(Tensor.data_ptr), -1)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of entries of each tensor, 0 for an absent one."""
        return self._from_origins(self._each(Tensor.numel))

    def _from_origins(self, numbers: tuple[int, ...], sign: int = 1) -> tuple[int, ...]:
        """Turns sizes (or addresses, with sign -1) of parts into those of the wholes. Empty parts keep theirs."""
        if not self.origins or not self:
            return numbers
        units = [0 if t is None or not t.numel() else 1 if sign > 0 else -t.element_size() for t in self]
        return tuple(number + unit * at for number, unit, at in zip(numbers, units, self.origins, strict=True))

    def memory(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Addresses and numbers of entries of the parts themselves, for checks of overlap."""
        if not self.origins:
            return self.addresses, self.sizes
        return self._each(Tensor.data_ptr), self._each(Tensor.numel)

    def inside(self, number: int, indices: Tensor) -> Tensor:
        """Indices into the whole tensor `number` as indices into its part."""
        return indices - self.origins[number] if self.origins else indices

    def _each(self, read: Callable[[Tensor], int]) -> tuple[int, ...]:
        if len(self.present) == len(self):
            return tuple(map(read, self.present))
        return tuple(0 if tensor is None else read(tensor) for tensor in self)

    @cached_property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that occur."""
        return {*map(_dtype_of, self.present)}

    @cached_property
    def devices(self) -> set[int]:
        """The numbers of the GPUs they are on; -1 is the CPU."""
        return {*map(Tensor.get_device, self.present)}

    @cached_property
    def contiguous(self) -> bool:
        """Whether all are contiguous."""
        return all(map(Tensor.is_contiguous, self.present))

    @property
    def code(self) -> int:
        """The code of the dtype that they all have."""
        return next((DTYPES[dtype] for dtype in self.dtypes), 0)

    @cached_property
    def codes(self) -> list[int]:
        """The code of each tensor's dtype."""
        return [DTYPES[tensor.dtype] for tensor in self.present]

    def to_contiguous(self) -> Tensors:
        """This list, or a new one with contiguous copies of the tensors that are not."""
        if self.contiguous:
            return self
        return Tensors.of_parts((None if t is None else t.contiguous() for t in self), self.origins)


Parameters = Annotated[Tensors, Spec()]
WrittenParameters = Annotated[Tensors, Spec(written=True)]

# --- masked_adamw_ and the functions around it ---


@dataclass(frozen=True, eq=False)
class Index:
    """The active entries of P tensors, as the tensors of a `TileTable`."""

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
    """`masked_pack_`: copies the active entries of `grads` to their slots in `out`, or adds them to the slots."""

    out: Annotated[Tensor, Spec(torch.float32, ("k",), written=True)]
    accumulate: bool


@dataclass(frozen=True, eq=False)
class Norm(Tiles):
    """`masked_sum_squares`: everything that the gradient of an update depends on.

    Attributes:
        packed: `grads` is one tensor, float32 [k] in slot order. Only APPLY says then whether a parameter is updated.
        master: float32 values of the active entries; None where the parameters themselves are exact.
        anchor: the values that the pull draws to; None without a pull.
        prepared: the rows `Prepared` of csrc/common/adamw.h, which `prepare_step` has written for kernels on a GPU.
            None: the backend makes them when it needs them.
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

    Attributes:
        exp_avg, exp_avg_sq: float32 moments, or their codes if there are scales.
        scales: the two scales of each block of 8-bit moments.
        clip: a float64 factor for GRAD_FACTOR and PULL; None stands for 1.
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

    Attributes:
        grads, packed: as in `Norm`.
        hyper: hyperparameters of every parameter group.
        group: the group of each parameter.
        numbers: distinguish the parameters in random bits.
        has_grad: 1 for each parameter with a gradient, else 0.
        steps: updates that each parameter has taken, this one included if `counts`.
        found_inf: if it is not 0, the step is skipped.
        grad_scale: the loss scale that the gradients contain.
        pull_factor: multiplies the pull.
        prepared: see `Norm`; None if the backend does not read it.
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
    """`gradient_norm`: the norm over all tiles of a step, which its launches sum up one after the other.

    Attributes:
        first: tiles of the earlier launches.
        tiles: tiles of all launches.
        max_norm: the largest norm that is not clipped.
        sums: the sum of squares of each tile, in the backend's own layout.
        arrived: a counter for kernels that count their thread blocks; 0 before and after a launch.
        grad_norm: the norm, written by the last launch.
        clip: the factor that makes the norm at most `max_norm`, written with it.
    """

    first: int
    tiles: int
    max_norm: float
    sums: Annotated[Tensor, Spec(torch.float64, written=True)]
    arrived: Annotated[Tensor | None, Spec(torch.int32, written=True)]
    grad_norm: Annotated[Tensor, Spec(torch.float64, written=True)]
    clip: Annotated[Tensor, Spec(torch.float64, written=True)]


NORM_GROUP = 64
"""The number of tiles whose sums a GPU kernel adds up to one number, as in csrc/cuda/masked_adamw.h."""


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
    """Tensors before and after tuning. An empty `initial` stands for zeros."""

    initial: Parameters
    tuned: Parameters


@dataclass(frozen=True, eq=False)
class Histogram(Pairs):
    """`delta_histogram`: counts digits of the non-zero keys of each group.

    Attributes:
        groups: the group of each pair.
        prefixes: None counts the upper 15 bits of all keys. Otherwise the lower 16 bits are counted, of the keys whose
            upper bits equal the prefix of their group.
        histogram: the counts are added to it.
        nonfinite: set to 1 if an infinity or a NaN was seen.
    """

    groups: list[int]
    prefixes: Annotated[Tensor | None, Spec(torch.int64, ("groups",))]
    histogram: Annotated[Tensor, Spec(torch.int64, ("groups", "bins"), written=True)]
    nonfinite: One


@dataclass(frozen=True, eq=False)
class Sample(Pairs):
    """`sample_keys`: the keys of some runs of `RUN` neighbouring entries.

    Attributes:
        tensors: the tensor of each run.
        runs: the number of each run in its tensor, 0 <= r < max(1, n // RUN). It starts at the row-major index RUN * r.
        keys: the keys, with the largest finite key in place of infinity and NaN, and 0 beyond the end of a tensor.
    """

    tensors: Annotated[Tensor, Spec(torch.int64, ("count",))]
    runs: Annotated[Tensor, Spec(torch.int64, ("count",))]
    keys: Annotated[Tensor, Spec(torch.int32, ("count", RUN), written=True)]


TileDigests = Annotated[Tensor | None, Spec(torch.int64, ("tiles", 2), written=True)]
Budgets = Annotated[Tensor, Spec(torch.int64, ("groups", 8))]
"""The budget of every group and the place of its samples: the rows `Budget` of csrc/cuda/topk_delta.h."""


@dataclass(frozen=True, eq=False)
class Sampled(Pairs):
    """`select_sampled`: a selection by samples whose route the device decides, so that the host waits once.

    Attributes:
        groups: the group of each pair.
        budgets: see `Budgets`.
        samples: scratch for the sampled keys. It may share memory with `words`, which are written later.
        low, high: scratch for the band of keys of each group in which its k-th largest key is looked for.
        words: the bitmaps of the pairs, one after the other.
        counts: the number of entries selected in each tile.
        thresholds: the smallest selected |delta| of each group; infinite where nothing was selected.
        keys, positions: room for candidates.
        digests: as in `Band`.
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
    """`delta_band`: marks and counts the entries above a band of keys, and stores the candidates inside the band.

    Attributes:
        groups: the group of each pair.
        low, high: the band of each group, low <= key < high, with 1 <= low <= high.
        words: the bitmaps; every word of every pair is written. A bit is set where key >= high.
        word_offsets: the first word of each pair.
        above: the number of keys >= high in each tile.
        inside: the number of keys inside the band in each tile.
        take: if given, the bits of each tile's first `take` entries inside the band are set too.
        keys, positions: the candidates, with their place in the tile as uint16 bits. Those of a tile stand together, in
            ascending order.
        offsets: where the candidates of each tile start, or -1 if there was no room for them.
        cursor: the number of candidates stored, or the number there would be if it exceeds their room.
        nonfinite: set to 1 if an infinity or a NaN was seen.
        digests: if given, the digests of the tiles of `initial` (`weights.digests.tile_digests`).
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
    """The candidates of a `delta_band` that had room for all of them.

    Attributes:
        keys, positions, offsets, inside: as in `Band`.
        tile_groups: the group of each tile.
    """

    keys: Annotated[Tensor, Spec(torch.int32, ("capacity",))]
    positions: Annotated[Tensor, Spec(torch.int16, ("capacity",))]
    offsets: PerTile
    inside: PerTile
    tile_groups: PerTile


@dataclass(frozen=True, eq=False)
class CandidateBins(Candidates):
    """`candidate_histogram`: counts the candidates low <= key < high of each group, by (key - low) >> shift.

    The counts are added to the histogram. Candidates beyond its last bin are not counted.
    """

    low: Indices
    high: Indices
    shift: Indices
    histogram: Annotated[Tensor, Spec(torch.int64, ("groups", "bins"), written=True)]


@dataclass(frozen=True, eq=False)
class Marks(Candidates):
    """Candidates and the bitmaps in which some of them are to be marked.

    Attributes:
        cut: the threshold of each group.
        words: bitmaps as `delta_band` writes them.
        tile_words: the first word of each tile.
    """

    cut: Indices
    words: Bitmaps
    tile_words: PerTile


@dataclass(frozen=True, eq=False)
class Above(Marks):
    """`take_above`: sets the bits of the candidates above the cut.

    Attributes:
        taken: the number of these in each tile.
        ties: the number of candidates at the cut in each tile.
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
"""The functions of a backend whose arguments are checked. The optimizer calls two more: `prepare_step` with a `Step`,
`gradient_norm` with a `Norm` and a `Total`."""


class Field(NamedTuple):
    """A field of a record.

    Attributes:
        kind: Tensor, Tensors, bool, int, float or list.
        optional: whether it can be None.
        spec: what its tensors must be.
    """

    kind: type
    optional: bool
    spec: Spec


@cache
def fields_of(record: Any) -> dict[str, Field]:
    """Name -> field of a record class, in the order of its constructor."""
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
"""The order of an operator's arguments, which programs pass by position. New ones go to the end."""


@cache
def arguments_of(record: type) -> dict[str, Field]:
    """The fields of a record in the order of the operator's arguments."""
    places = {name: place for place, name in enumerate(_ORDER)}
    fields = {name: field for name, field in fields_of(record).items() if not field.spec.internal}
    return dict(sorted(fields.items(), key=lambda item: places.get(item[0], len(places))))


def schema(op: str, record: type, *more: str, returns: str) -> str:
    """The schema, for torch.library, of an operator whose arguments are the fields of a record."""
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
    """(name, tensor) of all fields that hold one tensor."""
    for name, field in fields_of(record.__class__).items():
        if field.kind is Tensor and (value := getattr(record, name)) is not None:
            yield name, value
