"""What one launch of `masked_adamw_` updates: parameters of one device and dtype, and their packed state."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ltp_sparse import backends, ops
from ltp_sparse.backends import Backend
from ltp_sparse.backends.arguments import Step, Tensors, Update
from ltp_sparse.backends.coefficients import HYPER, Coefficient
from ltp_sparse.backends.compiled import describe
from ltp_sparse.backends.quantization import dequantize_tiles, quantize_tiles
from ltp_sparse.backends.reference import adamw_update, prepare_step
from ltp_sparse.deltas.entries import gather
from ltp_sparse.optim.packed_gradients import PackedGradients
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable, state_blocks
from ltp_sparse.weights.sharding import is_sharded, local, own_gradient, spread
from ltp_sparse.weights.tensors import check_plain_tensor

_version = operator.attrgetter("_version")

PIECE = 1 << 24
"""Slots whose pull values are on a GPU at a time if they are kept on the host: 64 MiB."""


@dataclass(frozen=True)
class Precision:
    """How parameters are rounded and moments are stored; see `MaskedAdamW`."""

    states: str = "float32"
    master: bool | None = None
    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.states not in ("float32", "8bit"):
            raise ValueError(f'MaskedAdamW: states must be "float32" or "8bit", got {self.states!r}')
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f'MaskedAdamW: rounding must be "nearest" or "stochastic", got {self.rounding!r}')
        if self.rounding == "stochastic" and self.master:
            raise ValueError('MaskedAdamW: a master is exact; rounding="stochastic" is for weights without one')
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"MaskedAdamW: seed must be in [0, 2^63), got {self.seed}")

    def keeps_master(self, dtype: torch.dtype) -> bool:
        if dtype == torch.float32:
            return False
        return self.rounding == "nearest" if self.master is None else self.master

    def is_stochastic(self, dtype: torch.dtype) -> bool:
        if self.rounding == "stochastic" and dtype == torch.float16:
            raise TypeError(
                "MaskedAdamW: stochastic rounding is for bfloat16 parameters, got float16; use master=True for these"
            )
        return self.rounding == "stochastic" and dtype == torch.bfloat16


@dataclass(frozen=True)
class Piece:
    """Consecutive tiles of a launch, with the slots and the blocks of 8-bit moments that are theirs.

    Attributes:
        table: these tiles alone, over all parameters of the launch; slots and blocks count from the first of the piece
    """

    table: TileTable
    slots: slice
    blocks: slice


_MOST_STEPS = 2**53
_UNDERFLOW = 1e-15
"""Of a first moment whose second one may have become 0 in float32."""


class Launch:
    """The parameters of one device, dtype and sharding, in the order of the parameter groups.

    Of sharded parameters it is this rank's tensors that are updated; P and K count what they hold.

    spread:       over which dimensions of which mesh their entries are spread, as `weights.sharding.spread` says
    table:        their active entries
    exp_avg:      [K], first moments in slot order: float32, or int8 codes; exp_avg_sq: the second ones, or uint8 codes
    scales:       float32 [B, 2], of the 8-bit moments, or None
    master:       float32 [K], the exact values of the active entries, or None
    anchor:       float32 [K], initial values for the pull, or None; on the device, or pinned on the host
    room:         float32 [at most PIECE], where pieces of an anchor on the host come to lie on the device, or None
    steps:        float64 [P], updates each parameter has taken
    hyper:        float64 [G, 7], the hyperparameters of every parameter group; group: int64 [P], that of each parameter
    coefficients: float64 [P, 11], those of the step being taken
    backend:      what serves the step, decided by `look`
    clip:         0-dim float64, what scales the gradients of the step being taken, or None; where `ClippedNorm` puts it
    """

    backend: Backend
    updates: list[tuple[Update, Backend]]
    looks: tuple[Any, ...]

    def __init__(
        self,
        params: list[nn.Parameter],
        numbers: list[int],
        group: list[int],
        sets: list[IndexSet],
        groups: int,
        precision: Precision,
        origins: tuple[int, ...] = (),
    ) -> None:
        """numbers: tell the parameters apart in random bits; group: the parameter group of each; origins: see
        `Tensors.origins`, for parameters whose random bits go by the entry of the whole."""
        self.params, self.sets = params, sets
        self.spread = spread(params[0])
        self._sharded = any(map(is_sharded, params))
        self.packed: PackedGradients | None = None
        self.device, self.dtype = params[0].device, params[0].dtype
        self.table = TileTable.build(sets, device=self.device, ranks=self.device.type != "cpu")
        self.exp_avg, self.exp_avg_sq, self.scales = self._zero_moments(precision.states == "8bit")
        self.stochastic = precision.is_stochastic(self.dtype)
        self.seed = precision.seed
        self.master = self.values() if precision.keeps_master(self.dtype) else None
        self.master_of = self._places()
        self.anchor: Tensor | None = None
        self.room: Tensor | None = None
        self.origins = origins
        self.pieces = [Piece(self._of_wholes(), slice(None), slice(None))]
        self.steps = torch.zeros(len(params), dtype=torch.float64, device=self.device)
        self.numbers = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        self.group = torch.tensor(group, dtype=torch.int64, device=self.device)
        self.hyper = torch.zeros(groups, len(HYPER), dtype=torch.float64, device=self.device)
        self.has_grad = torch.zeros(len(params), dtype=torch.float64, device=self.device)
        self.known_grads: list[bool] | None = None
        self.coefficients = torch.zeros(len(params), Coefficient.COUNT, dtype=torch.float64, device=self.device)
        self.prepared: Tensor | None = None
        self.clip: Tensor | None = None
        self._look_anew()

        starts = list(itertools.accumulate(self.table.counts, initial=0))
        self.slots = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        tiles = self.table.tiles[:, [Column.PARAM, Column.ACTIVE]].tolist()
        self.active: list[list[int]] = [[] for _ in params]  # of every tile of each parameter
        for position, active in tiles:
            self.active[position].append(active)
        ends = list(itertools.accumulate((sum(map(state_blocks, active)) for active in self.active), initial=0))
        self.blocks = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def _held(self) -> list[Any]:
        """The tensors whose memory is updated."""
        return [local(param) for param in self.params] if self._sharded else self.params

    def _zero_moments(self, coded: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        k = self.table.k
        if coded:
            scales = zeros(torch.float32, self.table.blocks, 2)
            return zeros(torch.int8, k), zeros(torch.uint8, k), scales
        return zeros(torch.float32, k), zeros(torch.float32, k), None

    def values(self) -> Tensor:
        """float32 [K], the active entries of the parameters."""
        return ops.masked_gather(self._held(), self.table).float()

    def _gradients(self) -> list[Tensor | None]:
        return list(map(own_gradient, self.params)) if self._sharded else [param.grad for param in self.params]

    def _of_wholes(self) -> TileTable:
        """The table, with the tiles where they are in the whole parameters if random bits go by these."""
        if not self.origins:
            return self.table
        tiles = self.table.tiles.clone()
        tiles[:, Column.START] += torch.tensor(self.origins, dtype=torch.int64, device=self.device)[
            tiles[:, Column.PARAM]
        ]
        sizes = tuple(n and n + at for n, at in zip(self.table.sizes, self.origins, strict=True))
        return replace(self.table, tiles=tiles, sizes=sizes)

    def keep_anchor(self, place: str) -> None:
        """Keeps the values as they are now for the pull, on the "device" or on the "host"."""
        if place == "device" or _is_host(self.device) or not self.table.k:
            self.anchor = self.values()
            return
        pinned = torch.empty(self.table.k, dtype=torch.float32, device="cpu", pin_memory=torch.cuda.is_available())
        for param, index_set, slots in zip(self._held(), self.sets, self.slots, strict=True):
            pinned[slots] = gather(param, index_set)
        self.anchor = pinned
        self.pieces = list(pieces_of(self._of_wholes().with_ranks(), PIECE))
        largest = max(piece.slots.stop - piece.slots.start for piece in self.pieces)
        self.room = torch.empty(largest, dtype=torch.float32, device=self.device)

    def look(self) -> bool:
        """Takes note of parameters and gradients as they are now: those of the step to come.

        Returns:
            False: all is as in the step before, but for the addresses of gradients, and known to be good.
        """
        params = self._held()
        grads = None if self.packed is not None else self._gradients()
        found, of_grads = describe(params), describe(grads or [])
        asked = backends.chosen()
        if found is None or of_grads is None or not self.updates or self.looks != (found, of_grads[0], asked):
            self._look_anew()
            self.looks = found, of_grads and of_grads[0], asked
            self.seen, self.seen_grads = (Tensors.of_parts(t, self.origins) for t in (params, grads or []))
            _, self.backend = ops.served(self.table, self.dtype)
            return True
        self.seen_grads.renew(grads or [], of_grads[1])
        self.changed = False
        return False

    def _look_anew(self) -> None:
        """Forgets all that `look` has taken note of."""
        self.changed = True
        self.looks = ()
        self.seen, self.seen_grads = Tensors(), Tensors()
        self.updates = []

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry: they look anew."""
        copied = object.__new__(Launch)
        vars(copied).update(vars(self))
        copied._look_anew()
        return vars(copied)

    def runs(self) -> Iterator[tuple[Update, Backend]]:
        """What is launched, one after the other, by the norm and by the update of a step, and what serves it.

        The copies of an anchor on the host go to the stream of the launches, so that each waits for the launch that
        reads the one before.
        """
        for piece, (update, backend) in zip(self.pieces, self._updates(), strict=True):
            if self.room is not None and self.anchor is not None and update.anchor is not None:
                update.anchor.copy_(self.anchor[piece.slots], non_blocking=True)
            yield update, backend

    def clip_by(self, factor: Tensor | None) -> None:
        """factor: 0-dim float64, where what scales the gradients of a step stands, or None."""
        self.clip = factor
        self._look_anew()

    def _updates(self) -> list[tuple[Update, Backend]]:
        if not self.updates:
            self.updates = [(self._update_of(piece, self.backend), self.backend) for piece in self.pieces]
        return self.updates

    def _update_of(self, piece: Piece, backend: Backend) -> Update:
        slots, anchor = piece.slots, self.anchor
        if anchor is not None:
            anchor = anchor[slots] if self.room is None else self.room[: slots.stop - slots.start]
        fields = ops.norm_fields(
            "masked_adamw_", self.seen, self.seen_grads if self.packed is None else self.packed.buffer[slots],
            piece.table.with_ranks() if backend.needs_ranks else piece.table, self.coefficients, anchor,
            None if self.master is None else self.master[slots],
            exp_avg=self.exp_avg[slots], exp_avg_sq=self.exp_avg_sq[slots],
            scales=None if self.scales is None else self.scales[piece.blocks],
        )  # fmt: skip
        whole = self.packed is None or len(self.pieces) == 1  # else its packed gradients start somewhere else
        prepared = self.prepared if backend.needs_prepared and whole else None
        return Update(**fields, stochastic=self.stochastic, prepared=prepared, clip=self.clip)

    def state(self, position: int) -> dict[str, Tensor]:
        """The state of one parameter, as views of the packed buffers."""
        slots = self.slots[position]
        state = {"step": self.steps[position], "exp_avg": self.exp_avg[slots], "exp_avg_sq": self.exp_avg_sq[slots]}
        if self.scales is not None:
            state["scales"] = self.scales[self.blocks[position]]
        if self.master is not None:
            state["master"] = self.master[slots]
        if self.anchor is not None:
            state["anchor"] = self.anchor[slots]
        return state

    def check(self, position: int, saved: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> None:
        """Raises ValueError, naming key and parameter, unless `load` can take the state. group: its hyperparameters."""
        if not isinstance(saved, Mapping):
            raise ValueError(f"MaskedAdamW: the state of {name!r} must be a mapping, got {type(saved).__name__}")
        k, blocks = self.table.counts[position], self.blocks[position]
        packed = dict.fromkeys(("exp_avg", "exp_avg_sq", "master", "anchor"), (k,))
        shapes = {"step": (), "scales": (blocks.stop - blocks.start, 2), **packed}
        coded = "scales" in saved or getattr(saved.get("exp_avg"), "dtype", None) == torch.int8
        floats: tuple[torch.dtype, ...] = (torch.float32,)
        dtypes = dict.fromkeys(("exp_avg", "exp_avg_sq", "master", "anchor"), floats)
        dtypes["scales"] = (torch.float32, torch.bfloat16)
        if coded:
            dtypes |= {"exp_avg": (torch.int8,), "exp_avg_sq": (torch.uint8,)}

        def refuse(key: str, problem: str) -> None:
            raise ValueError(f"MaskedAdamW: the state of {name!r}: {key!r} {problem}; nothing was loaded")

        pulled = ["anchor"] if group["pull"] and self.anchor is not None else []
        for key in ("step", "exp_avg", "exp_avg_sq", *(["scales"] if coded else []), *pulled):
            if key not in saved:
                refuse(key, "is missing")
        for key, value in saved.items():
            if key not in shapes:
                refuse(key, "is unknown here")
            if key == "anchor" and self.anchor is None:
                refuse(key, "belongs to a pull, which this optimizer was made without")
            if key == "step" and isinstance(value, int | float) and not isinstance(value, bool):
                value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
            if not isinstance(value, Tensor):
                refuse(key, f"must be a tensor, got {type(value).__name__}")
            try:
                check_plain_tensor(value, "it")
            except TypeError as error:
                refuse(key, f"cannot be read: {error}")
            if tuple(value.shape) != shapes[key]:
                refuse(key, f"of shape {list(value.shape)} does not fit the packed state, {list(shapes[key])} here")
            if key in dtypes and value.dtype not in dtypes[key]:
                refuse(key, f"must be {' or '.join(map(str, dtypes[key]))}, got {value.dtype}")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                refuse(key, "must be finite")
            if key == "step" and (value.dtype == torch.bool or value.is_complex()):
                refuse(key, f"must be a whole number, got {value.dtype}")
            if key == "step" and (not 0 <= float(value) <= _MOST_STEPS or float(value) != int(value)):
                refuse(key, f"must be a whole number, at least 0, got {float(value)}")
            if key in ("exp_avg_sq", "scales") and bool((value < 0).any()):
                refuse(key, "must not be negative")
        if not coded:
            first, second = saved["exp_avg"].abs(), saved["exp_avg_sq"]
            if not float(saved["step"]) and bool((first + second).any()):
                refuse("step", "is 0, but the moments are not")
            # While beta1^2 < beta2 the second moment outlasts the first: beside zero the first is next to nothing, too.
            beta1, beta2 = group["betas"]
            if beta1**2 < beta2 < 1 and bool(((second == 0) & (first > _UNDERFLOW)).any()):
                refuse("exp_avg_sq", "is 0 where 'exp_avg' is not")

    def check_gradient(self, position: int, grad: Tensor | None, name: str) -> None:
        """Raises ValueError unless `put_gradient` can take the gradient."""
        packed = self.packed is not None
        shape = (self.sets[position].k,) if packed else tuple(self.params[position].shape)
        if grad is not None and tuple(grad.shape) != shape:
            raise ValueError(
                f"MaskedAdamW: the saved gradients were packed and those of this optimizer are dense, or the reverse "
                f"({name!r}: expected {list(shape)}, got {list(grad.shape)}); make it with the `gradients` of that run"
            )

    def fresh(self, position: int) -> dict[str, Tensor]:
        """The state of a parameter that has not been updated."""
        state = {key: torch.zeros_like(value) for key, value in self.state(position).items() if key != "anchor"}
        if self.master is not None:
            state["master"] = gather(local(self.params[position]), self.sets[position]).float()
        return state

    def load(self, position: int, saved: Mapping[str, Tensor]) -> None:
        """Takes the state of one parameter, saved in whatever precision of moments."""
        saved = dict(saved)
        if saved:
            saved |= self._converted(saved, self.active[position])
        own = self.state(position)
        for key in saved.keys() & own.keys():
            own[key].copy_(torch.as_tensor(saved[key], dtype=own[key].dtype, device=own[key].device))

    def put_gradient(self, position: int, grad: Tensor | None) -> None:
        """Takes what `gradient` gave."""
        param = self.params[position]
        if grad is None or self.packed is None:
            param.grad = None if grad is None else grad.to(param.device, copy=True)
        else:
            self.packed.shares[position].buffer.copy_(grad)
            self.packed.show(position)

    def gradient(self, position: int) -> Tensor | None:
        """The gradient that one parameter has accumulated, packed where gradients are."""
        if not self.present()[position]:
            return None
        return self.params[position].grad if self.packed is None else self.packed.shares[position].buffer

    def _converted(self, saved: Mapping[str, Tensor], active: Sequence[int]) -> dict[str, Tensor]:
        """The moments of a saved state in this launch's precision, where they are not; older codes are converted."""
        scales = saved.get("scales")
        if not active or (None if scales is None else scales.dtype) == (None if self.scales is None else torch.float32):
            return {}
        moments = saved["exp_avg"], saved["exp_avg_sq"]
        if scales is not None:
            moments = dequantize_tiles(*moments, scales, active)
        if self.scales is None:
            return dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        return dict(zip(("exp_avg", "exp_avg_sq", "scales"), quantize_tiles(*moments, active), strict=True))

    def stalled(self) -> int:
        """Active entries that an update with the moments as they are would round back to what they are now."""
        if self.dtype == torch.float32 or self.master is not None or self.stochastic:
            return 0
        rows = torch.empty_like(self.coefficients)
        prepare_step(self._step(torch.ones_like(self.steps), rows, counts=False))
        rows = rows.float()
        rows[:, [Coefficient.ONE_MINUS_BETA1, Coefficient.ONE_MINUS_BETA2]] = 0  # the moments stay
        rows[:, Coefficient.BETA2] = 1
        count = 0
        for position, (param, index_set) in enumerate(zip(self._held(), self.sets, strict=True)):
            state, c = self.state(position), rows[position]
            if self.scales is not None and self.active[position]:
                moments = state["exp_avg"], state["exp_avg_sq"]
                decoded = dequantize_tiles(*moments, state["scales"], self.active[position])
                state |= dict(zip(("exp_avg", "exp_avg_sq"), decoded, strict=True))
            if c[Coefficient.STEP_SIZE] == 0:  # before a warm-up and after a decay nothing is to move
                continue
            flat = param.detach().reshape(-1)
            for slot, indices in index_set.to(self.device).chunks():
                here = slice(slot, slot + indices.numel())
                first, second, values = state["exp_avg"][here], state["exp_avg_sq"][here], flat[indices]
                exact, _, _ = adamw_update(values.float(), first, first, second, c)
                count += int(((exact.to(self.dtype) == values) & (first != 0)).sum())
        return count

    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Copies them to the device."""
        if self.anchor is None and any(group["pull"] for group in groups):
            raise ValueError("MaskedAdamW: pull must be set at construction, which keeps the values it draws to")
        rows = []
        for group in groups:
            lr = 0.0 if isinstance(group["lr"], Tensor) else float(group["lr"])
            sign = -1.0 if group["maximize"] else 1.0
            rows.append([lr, *group["betas"], group["eps"], group["weight_decay"], sign, group["pull"]])
        self.hyper.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        for index, group in enumerate(groups):
            if isinstance(group["lr"], Tensor):
                self.hyper[index, HYPER.index("lr")].copy_(group["lr"])

    def has_moved(self) -> bool:
        """Whether a parameter is on another device now."""
        return self.seen.devices != {-1 if self.device.type == "cpu" else self.device.index}

    def check_dtypes(self) -> None:
        if other := self.seen.dtypes - {self.dtype}:
            raise TypeError(
                f"MaskedAdamW: a parameter of {self.dtype} has become {other.pop()}; "
                "cast the model before making the optimizer"
            )

    def present(self) -> list[bool]:
        """Whether each parameter has a gradient."""
        if self.packed is None:
            return [param.grad is not None for param in self.params]
        self.packed.settle()
        return [share.present for share in self.packed.shares]

    def having_gradients(self) -> Iterator[nn.Parameter]:
        if self.packed is None:  # without a list: the first one does
            return (param for param in self.params if param.grad is not None)
        return self.packed.having_gradients()

    def _find_gradients(self) -> Tensor:
        """float64 [P], 1 for each parameter that has a gradient."""
        if self.packed is None:
            if not self.changed:
                return self.has_grad
            present = [grad is not None for grad in self.seen_grads]
        else:
            present = self.present()
            if not all(present):
                self.packed.clear_absent()
        if present != self.known_grads:
            self.has_grad.copy_(torch.tensor(present, dtype=torch.float64, device="cpu"))
            self.known_grads = present
        return self.has_grad

    def begin_step(
        self, found_inf: Tensor | None, grad_scale: Tensor | None, pull_factor: Tensor | None, counts: bool = True
    ) -> None:
        """Counts the step, unless it is only looked at, and computes its coefficients; all on the device."""
        if self.backend.needs_prepared and self.prepared is None:
            self.prepared = torch.empty(len(self.params), 8, dtype=torch.int64, device=self.device)
        scalars = found_inf, grad_scale, pull_factor
        step = self._step(self._find_gradients(), self.coefficients, *scalars, counts=counts)
        ops.prepare_step(step, self.backend)

    def _step(
        self,
        has_grad: Tensor,
        coefficients: Tensor,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        pull_factor: Tensor | None = None,
        *,
        counts: bool,
    ) -> Step:
        return Step(
            self.seen, self.seen_grads if self.packed is None else Tensors([self.packed.buffer]),
            self.packed is not None, self.hyper, self.group, self.numbers, has_grad, self.steps, counts,
            None if found_inf is None else found_inf.to(self.device, torch.float32),
            None if grad_scale is None else grad_scale.to(self.device, torch.float32),
            None if pull_factor is None else pull_factor.to(self.device),
            self.seed, coefficients, self.prepared,
        )  # fmt: skip

    def scale_gradients(self, factor: Tensor) -> None:
        if self.packed is not None:
            self.packed.buffer.mul_(factor)
            return
        for grad in self._gradients():
            if grad is not None:
                grad *= factor

    def update(self) -> None:
        for update, backend in self.runs():
            ops.run("masked_adamw_", update, backend)
        self.forget()
        if self.master is not None:
            self.master_of = self._places()
        if self.packed is not None:
            self.packed.consume()

    def forget(self) -> None:
        """Lets go of gradients that `look` has taken note of: they would live as long."""
        self.seen_grads.let_go()

    def refresh_masters(self) -> None:
        """Takes over what others wrote into the weights since the last update (torch counts in-place edits).

        An entry whose weight is still the rounding of its master keeps the master: loading a checkpoint writes weights
        that the loaded masters know more exactly.
        """
        if self.master is None or (places := self._places()) == self.master_of:
            return
        for position, param in enumerate(self._held()):
            if places[position] != self.master_of[position]:
                masters = self.master[self.slots[position]]
                weights = gather(param, self.sets[position]).to(masters.device)  # it may have moved since
                masters.copy_(torch.where(masters.to(self.dtype) == weights, masters, weights.float()))

    def _places(self) -> list[tuple[int, int]]:
        """Where the parameters are, and how often they were edited."""
        held = self._held()
        return list(zip(map(Tensor.data_ptr, held), map(_version, held), strict=True))

    def tensors(self) -> list[Tensor]:
        """All that the device holds on top of weights and gradients, but for a few numbers per parameter and tile."""
        table = self.table
        optional = (self.scales, self.master, self.anchor if self.room is None else self.room)
        state = [self.exp_avg, self.exp_avg_sq, *(tensor for tensor in optional if tensor is not None)]
        if self.packed is not None:
            state += self.packed.index_tensors()
        return [*state, table.tiles, table.words, table.ranks, table.positions]


def pieces_of(table: TileTable, most: int) -> Iterator[Piece]:
    """The tiles of a table in order, so many at a time that they have at most `most` slots, but at least one."""
    first_slots = table.tiles[:, Column.SLOT].cpu()
    ends = first_slots + table.tiles[:, Column.ACTIVE].cpu()
    first_blocks = table.tiles[:, Column.BLOCK].cpu()
    start = 0
    while start < len(ends):
        slot, block = int(first_slots[start]), int(first_blocks[start])
        stop = max(start + 1, int(torch.searchsorted(ends, slot + most, right=True)))
        last = stop == len(ends)
        slots = slice(slot, int(ends[stop - 1]))
        blocks = slice(block, table.blocks if last else int(first_blocks[stop]))
        tiles = table.tiles[start:stop].clone()
        tiles[:, Column.SLOT] -= slot
        tiles[:, Column.BLOCK] -= block
        counts = torch.zeros(len(table.counts), dtype=torch.int64, device="cpu")
        counts.index_add_(0, tiles[:, Column.PARAM].cpu(), tiles[:, Column.ACTIVE].cpu())
        part = replace(table, tiles=tiles, blocks=blocks.stop - block, counts=tuple(counts.tolist()))
        yield Piece(part, slots, blocks)
        start = stop


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"
