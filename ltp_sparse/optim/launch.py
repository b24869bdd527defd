"""`Launch`: the parameters that one launch of `masked_adamw_` updates, and their packed state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
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
from ltp_sparse.tickets.tile_table import STATE_BLOCK, Column, TileTable, state_blocks
from ltp_sparse.weights.sharding import is_sharded, local, own_gradient, spread
from ltp_sparse.weights.tensors import check_plain_tensor, count_edit, edits_of

_Scalars = tuple[Tensor | None, Tensor | None, Tensor | None]  # `found_inf`, `grad_scale` and `pull_factor` of `Step`

PACKED = ("exp_avg", "exp_avg_sq", "scales", "master", "anchor")
"""The packed buffers of a `Launch`, by the names that checkpoints and the fields of `Update` have for them."""

PIECE = 1 << 24
"""Slots of an anchor kept on the host that are copied to a GPU at a time: 64 MiB."""

_MOST_STEPS = 2**53  # float64 counts up to this number without gaps
_UNDERFLOW = 1e-15
"""First moments up to this size can have a second moment that is 0 in float32."""
_LOADED = (0, -1)
"""In place of the address and count of edits of a weight: its master was loaded, and has yet to be compared with it."""


@dataclass(frozen=True)
class Precision:
    """How parameters are rounded and moments are stored; the options of `MaskedAdamW`.

    Attributes:
        states: "float32" or "8bit" moments.
        master: whether bfloat16 and float16 parameters have float32 masters; None: if `rounding` is "nearest".
        rounding: "nearest", or "stochastic" for bfloat16 parameters without masters.
        seed: seed of the random bits that round weights and 8-bit moments.
    """

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
        """Whether parameters of this dtype get a float32 master."""
        return dtype != torch.float32 and (self.rounding == "nearest" if self.master is None else self.master)

    def bytes_per_entry(self, dtype: torch.dtype) -> float:
        """Bytes of packed state per active entry of a parameter of this dtype, without the anchor."""
        moments = 8.0 if self.states == "float32" else 2.0 + 8 / STATE_BLOCK
        return moments + 4 * self.keeps_master(dtype)

    def is_stochastic(self, dtype: torch.dtype) -> bool:
        """Whether parameters of this dtype are rounded stochastically.

        Raises:
            TypeError: they are float16, for which there is no stochastic rounding.
        """
        if self.rounding == "stochastic" and dtype == torch.float16:
            raise TypeError(
                "MaskedAdamW: stochastic rounding is for bfloat16 parameters, got float16; use master=True for these"
            )
        return self.rounding == "stochastic" and dtype == torch.bfloat16


@dataclass(frozen=True)
class Piece:
    """Consecutive tiles of a launch, with their slots and state blocks.

    Attributes:
        table: these tiles alone, over all parameters of the launch. Slots and blocks count from the first of the piece.
    """

    table: TileTable
    slots: slice
    blocks: slice


class Launch:
    """The parameters of one device, dtype and sharding, in the order of the parameter groups.

    For sharded parameters, this rank's shards are updated, and P and K count these.

    Args:
        params: the P parameters.
        numbers: a number per parameter, so that no two parameters get the same random bits.
        group: the parameter group of each parameter.
        sets: the active entries of each parameter, K together.
        groups: the number G of parameter groups.
        precision: how moments are stored and parameters are rounded.
        origins: see `Tensors.origins`; for parameters whose random bits depend on the entry of the whole.

    Attributes:
        spread: the mesh and its dimensions over which the parameters are sharded, as `weights.sharding.spread` returns.
        table: the active entries.
        exp_avg: [K], first moments in slot order, float32 or int8 codes.
        exp_avg_sq: [K], second moments, float32 or uint8 codes.
        scales: float32 [B, 2], scales of the 8-bit moments, or None.
        master: float32 [K], the exact values of the active entries, or None.
        anchor: float32 [K], initial values for the pull, or None; on the device, or pinned on the host.
        room: float32 [at most PIECE], the buffer on the device for pieces of an anchor on the host, or None.
        steps: float64 [P], updates that each parameter has taken.
        hyper: float64 [G, 7], the hyperparameters of every parameter group.
        coefficients: float64 [P, 11], those of the present step.
        backend: the backend of the present step, chosen by `look`.
        clip: 0-dim float64, the factor for the gradients of the present step, which `ClippedNorm` writes, or None.
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
        self.params, self.sets = params, sets
        self.spread = spread(params[0])
        self._sharded = any(map(is_sharded, params))
        self.packed: PackedGradients | None = None
        self.device, self.dtype = params[0].device, params[0].dtype
        self.table = TileTable.build(sets, device=self.device, ranks=self.device.type != "cpu")
        coded = precision.states == "8bit"
        k, dtypes = self.table.k, (torch.int8, torch.uint8) if coded else (torch.float32, torch.float32)
        self.exp_avg, self.exp_avg_sq = (torch.zeros(k, dtype=dtype, device=self.device) for dtype in dtypes)
        self.scales = torch.zeros(self.table.blocks, 2, dtype=torch.float32, device=self.device) if coded else None
        self.stochastic = precision.is_stochastic(self.dtype)
        self.seed = precision.seed
        self.master = self.values() if precision.keeps_master(self.dtype) else None
        self.master_of = edits_of(self._held())
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

        self.active: list[list[int]] = [[] for _ in params]  # of every tile of each parameter
        for position, active in self.table.tiles[:, [Column.PARAM, Column.ACTIVE]].tolist():
            self.active[position].append(active)
        blocks = (sum(map(state_blocks, active)) for active in self.active)
        self.slots, self.blocks = (
            [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))] for counts in (self.table.counts, blocks)
        )

    def _held(self) -> list[Any]:
        """The parameters, or this rank's shards of them."""
        return [local(param) for param in self.params] if self._sharded else self.params

    def values(self) -> Tensor:
        """float32 [K], the active entries of the parameters."""
        return ops.masked_gather(self._held(), self.table).float()

    def _gradients(self) -> list[Tensor | None]:
        return list(map(own_gradient, self.params)) if self._sharded else [param.grad for param in self.params]

    def _of_wholes(self) -> TileTable:
        """The table. If random bits depend on entries of whole parameters, its tiles are numbered by these."""
        if not self.origins:
            return self.table
        tiles = self.table.tiles.clone()
        tiles[:, Column.START] += torch.tensor(self.origins, dtype=torch.int64, device=self.device)[
            tiles[:, Column.PARAM]
        ]
        sizes = tuple(n and n + at for n, at in zip(self.table.sizes, self.origins, strict=True))
        return replace(self.table, tiles=tiles, sizes=sizes)

    def keep_anchor(self, place: str) -> None:
        """Keeps the present values as the anchor of the pull, on the "device" or on the "host"."""
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
        """Notes the present parameters and gradients, for the next step.

        Returns:
            Whether anything but the addresses of gradients has changed since the last step and must be checked.
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
            if self.backend.needs_prepared and self.prepared is None:
                self.prepared = torch.empty(len(self.params), 8, dtype=torch.int64, device=self.device)
            return True
        self.seen_grads.renew(grads or [], of_grads[1])
        self.changed = False
        return False

    def _look_anew(self) -> None:
        """Forgets what `look` has noted."""
        self.changed = True
        self.looks = ()
        self.seen, self.seen_grads = Tensors(), Tensors()
        self.updates = []

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles, without what `look` has noted."""
        copied = object.__new__(Launch)
        vars(copied).update(vars(self))
        copied._look_anew()
        return vars(copied)

    def check_arguments(self) -> None:
        """Makes and checks the records of a step after a change, so that a refused step has changed nothing.

        Raises:
            TypeError, ValueError: as `masked_adamw_`.
        """
        self.updates = [(self._update_of(piece, self.backend), self.backend) for piece in self.pieces]
        for update, backend in self.updates:
            ops.check("masked_adamw_", update, backend)

    def runs(self) -> Iterator[tuple[Update, Backend]]:
        """The launches of a step in order, for norm and update: records, each with its backend.

        Pieces of an anchor on the host are copied on the stream of the launches, so that a copy waits for the launch
        that reads the piece before.
        """
        for piece, (update, backend) in zip(self.pieces, self.updates, strict=True):
            if self.room is not None and self.anchor is not None and update.anchor is not None:
                update.anchor.copy_(self.anchor[piece.slots], non_blocking=True)
            yield update, backend

    def clip_by(self, factor: Tensor | None) -> None:
        """Sets the tensor (0-dim float64) that holds the factor for the gradients of each step, or None."""
        self.clip = factor
        self._look_anew()

    def _update_of(self, piece: Piece, backend: Backend) -> Update:
        slots, packed = piece.slots, self._packed(piece.slots, piece.blocks)
        if self.room is not None:
            packed["anchor"] = self.room[: slots.stop - slots.start]
        fields = ops.norm_fields(
            "masked_adamw_", self.seen, self.seen_grads if self.packed is None else self.packed.buffer[slots],
            piece.table.with_ranks() if backend.needs_ranks else piece.table, self.coefficients, **packed,
        )  # fmt: skip
        # the addresses in `prepared` are those of the whole buffer of packed gradients
        whole = self.packed is None or len(self.pieces) == 1
        prepared = self.prepared if backend.needs_prepared and whole else None
        return Update(**fields, stochastic=self.stochastic, prepared=prepared, clip=self.clip)

    def state(self, position: int) -> dict[str, Tensor]:
        """The state of one parameter, as views of the packed buffers."""
        packed = self._packed(self.slots[position], self.blocks[position])
        return {"step": self.steps[position], **{key: part for key, part in packed.items() if part is not None}}

    def _packed(self, slots: slice, blocks: slice) -> dict[str, Tensor | None]:
        """Name -> view of these slots, or state blocks, of each packed buffer; None for an absent one."""
        parts = {key: blocks if key == "scales" else slots for key in PACKED}
        buffers = {key: getattr(self, key) for key in PACKED}
        return {key: None if buffer is None else buffer[parts[key]] for key, buffer in buffers.items()}

    def check_state(self, position: int, saved: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> None:
        """Checks that `load` can take a saved state.

        Args:
            position: the position of the parameter in this launch.
            saved: its state.
            name: the name of the parameter, for messages.
            group: its hyperparameters in the saved state.

        Raises:
            ValueError: a tensor is missing, unknown, or has a wrong shape, dtype or value. The message names it and the
                parameter.
        """
        if not isinstance(saved, Mapping):
            raise ValueError(f"MaskedAdamW: the state of {name!r} must be a mapping, got {type(saved).__name__}")
        k, blocks = self.table.counts[position], self.blocks[position]
        shapes = {"step": (), **dict.fromkeys(PACKED, (k,)), "scales": (blocks.stop - blocks.start, 2)}
        coded = "scales" in saved or getattr(saved.get("exp_avg"), "dtype", None) == torch.int8
        dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(PACKED, (torch.float32,))
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
            # While beta1^2 < beta2 the first moment decays faster than the root of the second. So if the second is 0,
            # the first is nearly 0, too.
            beta1, beta2 = group["betas"]
            if beta1**2 < beta2 < 1 and bool(((second == 0) & (first > _UNDERFLOW)).any()):
                refuse("exp_avg_sq", "is 0 where 'exp_avg' is not")

    def check_gradient(self, position: int, grad: Tensor | None, name: str) -> None:
        """Raises ValueError unless `put_gradient` accepts a gradient."""
        packed = self.packed is not None
        shape = (self.sets[position].k,) if packed else tuple(self.params[position].shape)
        if grad is not None and tuple(grad.shape) != shape:
            raise ValueError(
                f"MaskedAdamW: the saved gradients were packed and those of this optimizer are dense, or the reverse "
                f"({name!r}: expected {list(shape)}, got {list(grad.shape)}); make the optimizer with the `gradients=` "
                "of that run"
            )

    def fresh(self, position: int) -> dict[str, Tensor]:
        """The state of a parameter that has not been updated."""
        state = {key: torch.zeros_like(value) for key, value in self.state(position).items() if key != "anchor"}
        if self.master is not None:
            state["master"] = gather(local(self.params[position]), self.sets[position]).float()
        return state

    def load(self, position: int, saved: Mapping[str, Tensor]) -> None:
        """Copies a saved state of one parameter, converting its moments if they have another precision."""
        saved = dict(saved)
        if saved:
            saved |= self._converted(saved, self.active[position])
        own = self.state(position)
        for key in saved.keys() & own.keys():
            own[key].copy_(torch.as_tensor(saved[key], dtype=own[key].dtype, device=own[key].device))
        self.master_of[position] = _LOADED

    def put_gradient(self, position: int, grad: Tensor | None) -> None:
        """Sets a gradient that `gradient` has returned."""
        param = self.params[position]
        if grad is None or self.packed is None:
            param.grad = None if grad is None else grad.to(param.device, copy=True)
        else:
            self.packed.gradients[position].buffer.copy_(grad)
            self.packed.show(position)

    def gradient(self, position: int) -> Tensor | None:
        """The gradient that one parameter has accumulated, packed or dense as in this optimizer, or None."""
        if not self.present()[position]:
            return None
        return self.params[position].grad if self.packed is None else self.packed.gradients[position].buffer

    def _converted(self, saved: Mapping[str, Tensor], active: Sequence[int]) -> dict[str, Tensor]:
        """The moments of a saved state that have another precision or older codes, converted to this launch's."""
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
        """Counts the active entries whose weight an update with the present moments would not change."""
        if self.dtype == torch.float32 or self.master is not None or self.stochastic:
            return 0
        rows = torch.empty_like(self.coefficients)
        prepare_step(self._step(torch.ones_like(self.steps), rows, (None, None, None), counts=False))
        rows = rows.float()
        rows[:, [Coefficient.ONE_MINUS_BETA1, Coefficient.ONE_MINUS_BETA2]] = 0  # the moments stay
        rows[:, Coefficient.BETA2] = 1
        count = 0
        for position, (param, index_set) in enumerate(zip(self._held(), self.sets, strict=True)):
            state, c = self.state(position), rows[position]
            if c[Coefficient.STEP_SIZE] == 0:  # at a learning rate of 0 no weight is meant to change
                continue
            exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
            if self.scales is not None and self.active[position]:
                exp_avg, exp_avg_sq = dequantize_tiles(exp_avg, exp_avg_sq, state["scales"], self.active[position])
            flat = param.detach().reshape(-1)
            for slot, indices in index_set.to(self.device).chunks():
                here = slice(slot, slot + indices.numel())
                first, second, values = exp_avg[here], exp_avg_sq[here], flat[indices]
                exact, _, _ = adamw_update(values.float(), first, first, second, c)
                count += int(((exact.to(self.dtype) == values) & (first != 0)).sum())
        return count

    def set_hyperparameters(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Copies the hyperparameters of the parameter groups to the device."""
        if self.anchor is None and any(group["pull"] for group in groups):
            raise ValueError("MaskedAdamW: pull must be set at construction, when the initial values are kept")
        rows = []
        for group in groups:
            lr = 0.0 if isinstance(group["lr"], Tensor) else float(group["lr"])
            sign = -1.0 if group["maximize"] else 1.0
            rows.append([lr, *group["betas"], group["eps"], group["weight_decay"], sign, group["pull"]])
        self.hyper.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        for index, group in enumerate(groups):
            if isinstance(group["lr"], Tensor):
                self.hyper[index, HYPER.index("lr")].copy_(group["lr"].reshape(()))

    def has_moved(self) -> bool:
        """Whether a parameter is on another device now."""
        return self.seen.devices != {-1 if self.device.type == "cpu" else self.device.index}

    def check_dtypes(self) -> None:
        """Raises TypeError if a parameter has been cast since construction."""
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
        return [gradient.present for gradient in self.packed.gradients]

    def having_gradients(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that have a gradient, one by one: the caller stops at the first."""
        if self.packed is None:
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
        """Computes the coefficients of a step on the device.

        Args:
            found_inf: one number; the step is skipped unless it is 0. None: there is no GradScaler.
            grad_scale: one number, the loss scale that the gradients contain, or None.
            pull_factor: one number that multiplies the pull, or None.
            counts: whether this is a step, to be counted, and not only a measurement of the norm.
        """
        scalars = (
            None if found_inf is None else found_inf.to(self.device, torch.float32),
            None if grad_scale is None else grad_scale.to(self.device, torch.float32),
            None if pull_factor is None else pull_factor.to(self.device),
        )
        ops.prepare_step(self._step(self._find_gradients(), self.coefficients, scalars, counts), self.backend)

    def _step(self, has_grad: Tensor, coefficients: Tensor, scalars: _Scalars, counts: bool) -> Step:
        return Step(
            self.seen, self.seen_grads if self.packed is None else Tensors([self.packed.buffer]),
            self.packed is not None, self.hyper, self.group, self.numbers, has_grad, self.steps, counts, *scalars,
            self.seed, coefficients, self.prepared,
        )  # fmt: skip

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies all gradients, in place, by a factor on the device."""
        if self.packed is not None:
            self.packed.buffer.mul_(factor)
            return
        for grad in self._gradients():
            if grad is not None:
                grad *= factor

    def update(self) -> None:
        """Updates the active entries. Packed gradients are consumed."""
        for update, backend in self.runs():
            ops.run("masked_adamw_", update, backend)
        if self.packed is not None:
            pairs = zip(self._held(), self.packed.gradients, strict=True)
            count_edit([param for param, gradient in pairs if gradient.present])
        self.forget()
        if self.master is not None:
            self.master_of = edits_of(self._held())
        if self.packed is not None:
            self.packed.consume()

    def forget(self) -> None:
        """Drops the references to gradients that `look` has noted, so that they can be freed."""
        self.seen_grads.renew((), ())

    def refresh_masters(self, *, loaded: bool = True) -> None:
        """Updates masters of weights that other code has changed since the last update (torch counts in-place edits).

        An entry whose weight still equals its rounded master keeps the master: loading a checkpoint writes weights for
        which the loaded masters have the exact values.

        Args:
            loaded: also compares masters that were loaded since the last update. Their weights may be yet to come.
        """
        if self.master is None or (edits := edits_of(self._held())) == self.master_of:
            return
        for position, param in enumerate(self._held()):
            known = self.master_of[position]
            if edits[position] != known and (loaded or known != _LOADED):
                masters = self.master[self.slots[position]]
                weights = gather(param, self.sets[position]).to(masters.device)  # they can have moved
                masters.copy_(torch.where(masters.to(self.dtype) == weights, masters, weights.float()))
                self.master_of[position] = edits[position]

    def tensors(self) -> list[Tensor]:
        """The tensors on the device besides weights, gradients, and a few numbers per parameter and tile."""
        table = self.table
        buffers = (self.room if key == "anchor" and self.room is not None else getattr(self, key) for key in PACKED)
        state = [buffer for buffer in buffers if buffer is not None]
        if self.packed is not None:
            state += self.packed.index_tensors()
        return [*state, table.tiles, table.words, table.ranks, table.positions]


def pieces_of(table: TileTable, most: int) -> Iterator[Piece]:
    """Cuts a table into pieces of consecutive tiles with at most `most` slots each, but at least one tile."""
    first_slots = table.tiles[:, Column.SLOT].cpu()
    ends = first_slots + table.tiles[:, Column.ACTIVE].cpu()
    first_blocks = table.tiles[:, Column.BLOCK].cpu()
    start = 0
    while start < len(ends):
        slot, block = int(first_slots[start]), int(first_blocks[start])
        stop = max(start + 1, int(torch.searchsorted(ends, slot + most, right=True)))
        slots = slice(slot, int(ends[stop - 1]))
        blocks = slice(block, table.blocks if stop == len(ends) else int(first_blocks[stop]))
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
