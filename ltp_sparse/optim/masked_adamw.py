"""`MaskedAdamW`: AdamW on the active entries of a ticket, with state for these entries only."""

from __future__ import annotations

import inspect
import math
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ltp_sparse.backends.rounding import tiles_have_keys
from ltp_sparse.optim.clipping import ClippedNorm
from ltp_sparse.optim.launch import Launch, Precision
from ltp_sparse.optim.members import (
    ParameterHome,
    check_engine,
    check_not_in_both,
    check_ordinary,
    dense_groups,
    dense_parameters,
    named_parameters,
    parts_of,
    trainable_parts,
)
from ltp_sparse.optim.packed_gradients import PackedGradients, WeakHook, check_unpacked
from ltp_sparse.selection.shards import Part, TicketShard
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.digests import is_known
from ltp_sparse.weights.sharding import Cut, fsdp_modules, is_same, is_sharded, local, mesh_of, spread, sum_over
from ltp_sparse.weights.tensors import DTYPE_NAMES, DTYPES

_DIGESTS = "ltp_sparse"
_GRADIENTS = "ltp_sparse_gradients"
_AT_LEAST_0 = ("eps", "weight_decay", "pull")


class StalledUpdates(UserWarning):
    """Most updates round to nothing."""


class NoGradients(UserWarning):
    """No entry of the ticket had a gradient in a step."""


class MaskedAdamW(Optimizer):
    """AdamW that updates the active entries of a ticket and leaves every other entry bitwise as it is.

    It holds the moments of the active entries (8 bytes per entry) and their index, and no tensor of the model's size.
    Parameters can be float32, bfloat16 or float16. The arithmetic is in float32 and follows torch.optim.AdamW:
    decoupled weight decay, bias correction, one step count per parameter. A parameter whose gradient is None is
    skipped. Weight decay acts on active entries only. One call of `masked_adamw_` updates all parameters of a device
    and dtype. It works with learning-rate schedulers, `torch.amp.GradScaler`, accelerate, the Hugging Face Trainer and
    DDP. The model can be sharded by FSDP2 or tensor parallelism, before or after the optimizer is made; each rank then
    updates the shards that it holds (docs/sharded.md).

    Args:
        model: a module, or a mapping from names to parameters. In a transformers Trainer:
            `optimizer_cls_and_kwargs=(MaskedAdamW, {"model": model, "ticket": ticket, "lr": 2e-5})`.
        ticket: the active entries, by canonical name. For a sharded model, either the whole ticket, which the
            optimizer cuts, or this rank's part of it (`select_sharded`). Parameters that are neither in the ticket nor
            in `dense` are not trained.
        lr: step size, a number or a 0-dim tensor.
        betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        dense: parameters updated in full in the same launch, such as a prompt encoder or a task head: a module,
            parameters, or parameter groups with their own options (`[{"params": head.parameters(), "lr": 1e-3}]`).
        max_grad_norm: clips the gradients of active and dense entries to this norm inside the step. A framework that
            clips `model.parameters()` also counts the dense gradients of inactive entries: turn that off, or call
            `clip_grad_norm_` of the optimizer.
        pull: weight of an L1 term that pulls the ticket's entries towards their values at construction: adds
            pull * sign(param - initial) to the gradient, before norm, clip and moments. The optimizer keeps a float32
            copy of these values.
        pull_on: where that copy is kept: on the "device" of the parameters, or on the "host" to save 4 bytes per active
            entry of GPU memory. Every step then copies the values to the GPU in pieces of 64 MiB, twice with
            `max_grad_norm`. The results have the same bits.
        freeze: turns `requires_grad` off for parameters without an active entry (see `freeze`). The constructor changes
            nothing else in the model.
        states: "float32", or "8bit" for moments of 1 byte each, with a scale per moment and 256 active entries (see
            `backends/quantization.py`).
        master: keeps a float32 value for every active entry of bfloat16 and float16 parameters (4 bytes each) and
            rounds it into the weight. Default: True, unless `rounding` is stochastic. If other code changes the weights
            in place, the next step starts from its values; edits through `.data`, which torch does not count, go
            unnoticed.
        rounding: "nearest", or "stochastic" for bfloat16 parameters without a master: up or down with probabilities
            that make the mean exact, so that small updates are not lost.
        seed: seed of the random bits that round weights and 8-bit moments. They depend on nothing but (seed, step,
            parameter, index).
        gradients: "dense" reads the `.grad` of the parameters. "packed" keeps only the active entries of each gradient,
            as soon as backward has computed it: 4 bytes per active entry, and at most one dense gradient at a time
            besides 256 KiB of small ones. Later micro-batches are added, every step consumes the gradients, even a
            skipped one, and `zero_grad` is not needed. `param.grad` is a view of the packed gradient (`GradientView`):
            code that clips, logs or checks the gradients of the model sees the active entries, and `step` uses what it
            changes. Embeddings become `sparse=True`. Make the optimizer before you wrap the model in DDP, so that DDP
            leaves these parameters out. `remove()` removes the hooks.

    Attributes:
        grad_norm: 0-dim float64 tensor, the latest norm of active and dense entries before clipping; None without
            `max_grad_norm`.

    Raises:
        ValueError: no name of the ticket is in the model (the message lists the closest ones), a shape differs, an
            option is out of range, a parameter is both in the ticket and in `dense`, or another optimizer already packs
            the gradients.
    """

    # GradScaler hands us its scale and found_inf; whether a step is skipped is then decided on the device
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        ticket: Ticket | TicketShard,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        dense: nn.Module | Iterable[Any] = (),
        max_grad_norm: float | None = None,
        pull: float = 0.0,
        pull_on: str = "device",
        maximize: bool = False,
        freeze: bool = False,
        states: str = "float32",
        master: bool | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        gradients: str = "dense",
    ) -> None:
        named, parts = trainable_parts(model, ticket, what="MaskedAdamW", mappings=True)
        if max_grad_norm is not None:
            _check_max_norm(max_grad_norm, ": max_grad_norm must be above 0 or None")
        if pull_on not in ("device", "host"):
            raise ValueError(f'MaskedAdamW: pull_on must be "device" or "host", got {pull_on!r}')
        self.precision = Precision(states, master, rounding, seed)
        self.pull_on = pull_on
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._parts = {named[name]: part for name, part in parts.items()}  # all other parameters are dense
        self._names = {param: name for name, param in named.items()}
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else None
        self._home = ParameterHome(model, named) if isinstance(model, nn.Module) else None
        self._launches: list[Launch] = []
        self._removed = self._warned = self._compared = False
        self._pull_factor: Tensor | None = None  # by which `clip_grad_norm_` has clipped the pull of the next step
        self._ticketed = set(self._parts)
        in_full = dense_groups(dense, what="MaskedAdamW")
        self._packs: set[nn.Parameter] = set()  # whose gradients are packed
        self._watch: Any = None  # the handle of the hook `_before_forward`
        ticketed = {name: named[name] for name in parts}
        check_not_in_both(ticketed, (p for group in in_full for p in group["params"]), what="MaskedAdamW")
        if gradients == "packed":
            if not isinstance(model, nn.Module):
                raise ValueError('MaskedAdamW: gradients="packed" needs the module, not a mapping of its parameters')
            for name, param in ticketed.items():
                check_unpacked(name, param, what="MaskedAdamW")
            self._packs = set(self._parts)
        elif gradients != "dense":
            raise ValueError(f'MaskedAdamW: gradients must be "dense" or "packed", got {gradients!r}')
        groups: list[dict[str, Any]] = [{"params": [*ticketed.values()], "pull": pull}] if parts else []
        groups += in_full
        if not groups:
            raise ValueError(
                "MaskedAdamW: the ticket has no active entry and `dense` is empty; there is nothing to train"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        defaults["pull"] = 0.0
        super().__init__(groups, defaults)
        self._build()
        if freeze:
            if not isinstance(model, nn.Module):
                raise ValueError("MaskedAdamW: freeze=True needs the module, not a mapping of its parameters")
            _freeze(model, set(self._members()))
        self._pack()

    def _pack(self) -> None:
        """Puts the hooks of packed gradients on the model."""
        for launch in self._launches:
            if launch.params[0] in self._packs:
                model = self.model
                assert model is not None
                launch.packed = PackedGradients(model, launch.params, launch.sets, launch.table)
                if self._watch is None:
                    self._watch = model.register_forward_pre_hook(WeakHook(self._before_forward))
                    weakref.finalize(self, self._watch.remove).atexit = False

    def _before_forward(self, model: nn.Module, *_: object) -> None:
        """Adopts parameters that were sharded after construction early enough to pack their first gradients."""

        def settle(*_: object) -> None:  # FSDP2 has its own parameters in the model until the forward pass has ended
            handle.remove()
            self._settle_parameters()

        if torch.is_grad_enabled() and self._home is not None and self._home.awaits_sharded() and fsdp_modules(model):
            handle = model.register_forward_hook(settle)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are updated in full."""
        self._refuse_if_packed()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for param in group["params"]:
                check_ordinary(local(param), what="MaskedAdamW")
                if param.dtype not in DTYPES:
                    raise TypeError(f"MaskedAdamW: parameters must be {DTYPE_NAMES}, got {param.dtype}")
                self.precision.is_stochastic(param.dtype)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for param in group["params"]:
            if param not in self._parts:
                self._parts[param] = Part.of(IndexSet.full(param.numel()), Cut.of(param, "MaskedAdamW: a parameter"))
            self._check_part(param, self._parts[param], self._names.get(param, "a parameter"))
        group["index_sets"] = self._digests_of(group)
        self._compared = False
        if self._launches:
            self._build()

    def _refuse_if_packed(self) -> None:
        if self._launches and self._packs:
            raise ValueError(
                'MaskedAdamW: gradients="packed" keeps to the parameters and devices of its construction; pass all '
                "parameters in `dense`, and move the model before making the optimizer"
            )

    def _build(self) -> None:
        """Groups the parameters into launches, one per device and dtype, and carries the state over."""
        for launch in self._launches:
            launch.refresh_masters()  # new launches note the present version of the weights as already seen
        before = {param: dict(state) for param, state in self.state.items()}
        placed: dict[tuple[Any, ...], list[tuple[nn.Parameter, int, int]]] = {}
        self._laid_out = self._members()
        members = [(param, index) for index, group in enumerate(self.param_groups) for param in group["params"]]
        for number, (param, index) in enumerate(members):
            place = param.device, param.dtype, param in self._packs, spread(param)
            placed.setdefault(place, []).append((param, number, index))
        self._launches = []
        for triples in placed.values():
            params, numbers, group = map(list, zip(*triples, strict=True))
            sets = [self._parts[param].index_set for param in params]
            keyed = self._is_keyed(params[0])  # then random bits depend on where each shard begins
            origins = tuple(self._parts[param].start or 0 for param in params) if keyed else ()
            launch = Launch(params, numbers, group, sets, len(self.param_groups), self.precision, origins)
            if any(group["pull"] for group in self.param_groups):
                launch.keep_anchor(self.pull_on)
            for position, param in enumerate(params):
                self.state[param] = launch.state(position)
                for key, value in before.get(param, {}).items():
                    self.state[param][key].copy_(value)
            self._launches.append(launch)
        self._set_clips()
        self.update_hyperparameters()

    def _set_clips(self) -> None:
        self._norm, self._clips_by = ClippedNorm(self._launches), self.max_grad_norm is not None
        for launch in self._launches:
            launch.clip_by(self._norm.clips[launch.device] if self._clips_by else None)

    def update_hyperparameters(self) -> None:
        """Copies the hyperparameters of `param_groups` to the devices.

        `step` does this itself, but the replay of a captured CUDA graph does not: call this method before the replay
        so that the graph uses the scheduler's learning rate.
        """
        for launch in self._launches:
            launch.set_hyperparameters(self.param_groups)
        self._hyper_known = self._hyper_key()

    def _hyper_key(self) -> list[tuple[Any, ...]]:
        keys = ("lr", "betas", "eps", "weight_decay", "maximize", "pull")
        return [tuple(group[key] for key in keys) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the active entries. Parameters without a gradient are skipped.

        If a GradScaler has found infinities, the step is skipped for all parameters.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: `remove` was called.
            ValueError: a gradient is sparse or of another dtype, a parameter changed its shape or dtype, or a module
                has other parameters than at construction, by anything other than sharding. A module that was replaced
                as a whole is not noticed.

        Warns:
            NoGradients: no entry of the ticket has a gradient; once per optimizer.
        """
        if self._removed:
            raise RuntimeError("MaskedAdamW: remove() has taken the hooks of its packed gradients away; make a new one")
        self._settle_parameters()
        self._compare_ranks()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.max_grad_norm is not None:
            _check_max_norm(self.max_grad_norm, ": max_grad_norm must be above 0 or None")
        if self._clips_by != (self.max_grad_norm is not None):
            self._set_clips()
        changed = [launch for launch in self._launches if launch.look()]
        if changed and (model := self.model) is not None:
            check_engine(model, what="MaskedAdamW")
        for launch in changed:
            launch.check_dtypes()
        if any(launch.has_moved() for launch in changed):
            self._refuse_if_packed()
            self._build()
            changed = [launch for launch in self._launches if launch.look()]
        for launch in changed:
            launch.check_arguments()
        if (
            any(isinstance(group["lr"], Tensor) for group in self.param_groups)
            or self._hyper_known != self._hyper_key()
        ):
            self.update_hyperparameters()

        self._warn_without_gradients()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None:
            found_inf = self._on_all_ranks(local(found_inf))
            _tell_accelerate(self, found_inf)
        for launch in self._launches:
            launch.refresh_masters()
            launch.begin_step(found_inf, grad_scale, self._pull_factor)
        self._pull_factor = None
        if self.max_grad_norm is not None:
            self.grad_norm = self._norm.measure(self.max_grad_norm)
        for launch in self._launches:
            launch.update()
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the gradients of active and dense entries to a norm, for training loops of your own.

        Call it between backward and step, like `torch.nn.utils.clip_grad_norm_`, and after `GradScaler.unscale_` if you
        use a scaler. The norm includes the pull, which is scaled with the gradients, so that the step has the result
        that `max_grad_norm=` gives.

        Args:
            max_norm: above 0; with infinity nothing is scaled and the norm is returned.

        Returns:
            0-dim float64, the norm before clipping, also in `grad_norm`.

        Raises:
            ValueError: `max_norm` is not above 0.
        """
        _check_max_norm(max_norm, ".clip_grad_norm_: max_norm must be above 0")
        self._settle_parameters()
        if self._hyper_known != self._hyper_key():
            self.update_hyperparameters()
        for launch in self._launches:
            if launch.look():
                launch.check_arguments()
            launch.begin_step(None, None, self._pull_factor, counts=False)
        self.grad_norm = self._norm.measure(max_norm)
        for launch in self._launches:
            launch.forget()
            launch.scale_gradients(self._norm.clips[launch.device])
        if any(group["pull"] for group in self.param_groups):
            clip = next(iter(self._norm.clips.values()))
            self._pull_factor = clip.clone() if self._pull_factor is None else clip * self._pull_factor
        return self.grad_norm

    @torch.no_grad()
    def _settle_parameters(self) -> None:
        """Adopts the parameters by which `fully_shard` has replaced those of construction.

        Raises:
            ValueError: parameters were replaced in any other way, or the model was sharded after the first step.
        """
        model = self.model
        moved = {} if self._home is None or model is None else self._home.sharded(model, what="MaskedAdamW")
        members, settled = self._members(), self._laid_out
        if moved:
            settled = [moved.get(param, param) for param in settled]
        if not (_are_same(members, self._laid_out) or _are_same(members, settled)):
            raise ValueError(
                "MaskedAdamW: the parameters in param_groups are not those of construction; add some with "
                "add_param_group, and make a new optimizer for another model or for parameters that were replaced"
            )
        if not moved:
            return
        if any(bool(launch.steps.any()) for launch in self._launches):
            raise ValueError(
                "MaskedAdamW: the model was sharded after a step was taken or a state was loaded; shard it before, or "
                "make a new optimizer and load the state into that"
            )
        assert model is not None
        parts = {
            old: Part.of(self._parts[old].index_set, Cut.of(new, f"MaskedAdamW: {self._names[old]!r}"))
            for old, new in moved.items()
            if old in self._parts
        }
        for old, part in parts.items():
            self._check_part(moved[old], part, self._names[old])
        self._parts = {moved.get(param, param): parts.get(param, part) for param, part in self._parts.items()}
        self._compared = False
        self._names = {moved.get(param, param): name for param, name in self._names.items()}
        self._home = ParameterHome(model, {name: param for param, name in self._names.items()})
        self._ticketed = {moved.get(param, param) for param in self._ticketed}
        self._packs = {moved.get(param, param) for param in self._packs}
        for group in self.param_groups:
            group["params"] = [moved.get(param, param) for param in group["params"]]
            group["index_sets"] = self._digests_of(group)
        for launch in self._launches:
            if launch.packed is not None:
                launch.packed.remove()
        self._launches = []
        self.state.clear()
        self._build()
        self._pack()

    def _compare_ranks(self) -> None:
        """Raises ValueError, on all ranks, if those that share parameters train other entries of them; looks once.

        Other meshes are not waited for: the stages of a pipeline have other parameters.
        """
        if self._compared:
            return
        self._compared = True
        for mesh in dict.fromkeys(map(mesh_of, self._names)):
            shared = [(self._names.get(p), self._parts[p].digest) for p in self._members() if mesh_of(p) == mesh]
            if mesh is not None and not is_same(str(shared), mesh.get_all_groups(), mesh.device_type):
                raise ValueError(
                    "MaskedAdamW: expected the same ticket and `dense` on all ranks that share parameters, got others; "
                    "load one file on each, draw with one seed, or let select_sharded give each rank its part"
                )

    def _check_part(self, param: nn.Parameter, part: Part, name: str) -> None:
        """Raises ValueError if the ranks cannot update their shards of a parameter independently."""
        if self._is_keyed(param) and part.start is None:
            raise ValueError(
                f'MaskedAdamW: states="8bit" and rounding="stochastic" are for parameters cut by rows, {name!r} is '
                "cut by columns; train it with float32 states and master=True"
            )
        if self._is_keyed(param) and not tiles_have_keys(part.start or 0, local(param).numel()):
            raise ValueError(
                f'MaskedAdamW: states="8bit" and rounding="stochastic" need shards that start at a multiple of 65,536 '
                f"or do not contain entry 2**32, {name!r} has another; train it with float32 states and master=True"
            )
        if self.precision.states == "8bit" and part.blocks is None:
            raise ValueError(
                f'MaskedAdamW: states="8bit" has blocks of 256 active entries of a tile of 65,536, and {name!r} is '
                "cut inside of one; leave it out of the ticket, or train with float32 states"
            )

    def _is_keyed(self, param: nn.Parameter) -> bool:
        """Whether a parameter is sharded and its update needs random bits, which depend on the entry of the whole."""
        return bool(spread(param)) and (self.precision.states == "8bit" or self.precision.is_stochastic(param.dtype))

    def _on_all_ranks(self, found_inf: Tensor) -> Tensor:
        """A found_inf that is the same on all ranks which share parameters, so that all of them skip the step."""
        pairs = [pair for over in dict.fromkeys(launch.spread for launch in self._launches) for pair in over]
        return sum_over(pairs, found_inf.clone()) if pairs else found_inf

    def _warn_without_gradients(self) -> None:
        if self._warned:
            return
        ticketed = self._ticketed or set(self._members())
        if any(param in ticketed for launch in self._launches for param in launch.having_gradients()):
            return
        if (model := self.model) is not None:
            check_engine(model, what="MaskedAdamW")
        self._warned = True
        frozen = sum(not param.requires_grad for param in ticketed)
        warnings.warn(
            f"MaskedAdamW: no entry of the ticket has a gradient in this step, so nothing of it trains "
            f"({frozen} of its {len(ticketed)} parameters have requires_grad=False). Was backward() called, on a loss "
            "that is attached to the model that the optimizer was made for? A copy of it, a model made anew, or one "
            "whose parameters were replaced has other parameters: make the optimizer for that",
            NoGradients,
            stacklevel=_outside_torch(),
        )

    def state_dict(self, *, include_gradients: bool = False) -> dict[str, Any]:
        """The packed state and the parameter groups, with the name and a digest of the index set of every parameter.

        The moments are in slot order, which depends on neither backend, device nor encoding. An optimizer with other
        `states` can load them, too. Index sets are not stored, because the optimizer has them from its ticket. The
        state of sharded parameters is sharded: torch.distributed.checkpoint saves it on n ranks and loads it on m.

        Args:
            include_gradients: also copies the gradients that micro-batches have accumulated so far, so that training
                can resume in the middle of an accumulation. `load_state_dict` restores them if the optimizer has the
                same `gradients` option.
        """
        self._settle_parameters()
        for launch in self._launches:
            launch.refresh_masters(loaded=False)
        digests = [digest for group in self.param_groups for digest in group["index_sets"]]
        extra = {"version": 1, "index_sets": digests, "names": list(self.named_members())}
        saved = {**super().state_dict(), _DIGESTS: extra}
        for number, param in enumerate(self._members()):
            if spread(param):
                from ltp_sparse.optim.sharded_state import to_save  # takes long to import

                saved["state"][number] = to_save(saved["state"][number], param, self._parts[param])
        if include_gradients:
            found = {p: launch.gradient(i) for launch in self._launches for i, p in enumerate(launch.params)}
            grads = [found[param] for param in self._members()]
            saved[_GRADIENTS] = [None if grad is None else grad.detach().clone() for grad in grads]
        return saved

    @property
    def model(self) -> nn.Module | None:
        """The module given at construction; None if a mapping was given, or if the module no longer exists."""
        return None if self._model is None else self._model()

    def named_members(self) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, for all trained parameters. One outside the model is named by its number."""
        return {self._names.get(param, f"parameter {i}"): param for i, param in enumerate(self._members())}

    def _members(self) -> list[nn.Parameter]:
        return [member for group in self.param_groups for member in group["params"]]

    def _digests_of(self, group: Mapping[str, Any]) -> list[str]:
        return [self._parts[param].digest for param in group["params"]]

    def _is_of_ticket(self, param: nn.Parameter, digest: str) -> bool:
        """Whether a digest, possibly by an earlier hash function, is that of the active entries of a parameter."""
        part = self._parts[param]
        return digest == part.digest or (not is_sharded(param) and digest == part.index_set.digest(digest))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`, also as `torch.distributed.checkpoint.state_dict` returns it.

        Everything is checked before anything changes. With `"state": {}` the optimizer starts anew.

        Args:
            state_dict: tensors on any device.

        Raises:
            ValueError: the state belongs to another ticket, to other parameters or to a newer version, or a value is
                missing or impossible, such as a negative second moment. Nothing has changed then.
        """
        self._settle_parameters()
        saved, groups, gradients = self._checked(state_dict, self._members())
        state, own_groups = self.state, self.param_groups
        states = [launch.state(i) for launch in self._launches for i in range(len(launch.params))]
        before = [(tensor, tensor.clone()) for own in states for tensor in own.values()]
        try:
            # the base class would cast every tensor to the dtype of its parameter, so it gets the groups alone
            super().load_state_dict({"state": {}, "param_groups": groups})
            for launch in self._launches:
                for position, param in enumerate(launch.params):
                    self.state[param] = launch.state(position)
                    launch.load(position, saved[param] if saved else launch.fresh(position))
                    if gradients is not None:
                        launch.put_gradient(position, gradients[param])
            self.update_hyperparameters()
        except BaseException:
            self.state, self.param_groups = state, own_groups
            for tensor, values in before:
                tensor.copy_(values)
            self.update_hyperparameters()
            raise
        self._pull_factor = None

    def _checked(
        self, state_dict: Mapping[str, Any], params: list[nn.Parameter]
    ) -> tuple[dict[nn.Parameter, Any], list[dict[str, Any]], dict[nn.Parameter, Any] | None]:
        """(parameter -> state, parameter groups, parameter -> gradient or None), once everything is checked."""
        extra, groups = _checked_form(state_dict)
        sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        digests = extra.get("index_sets", [digest for group in groups for digest in group.get("index_sets", [])])
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"MaskedAdamW: the state has parameter groups of {sizes[0]} parameters, this optimizer of {sizes[1]}; "
                "make it with the ticket and the dense parameters of that run"
            )
        known = all(map(is_known, digests)) and len(digests) == len(params)
        if not known or not all(map(self._is_of_ticket, params, digests)):
            raise ValueError(
                "MaskedAdamW: the state was saved for another ticket, or for other parameters in another order; "
                "make the optimizer with the ticket of that run"
            )
        names = list(self.named_members())
        for theirs, name in zip(extra.get("names", []), names, strict=False):
            if theirs != name and theirs in names:  # sets of all entries do not tell parameters of one size apart
                raise ValueError(
                    f"MaskedAdamW: the state has {theirs!r} in the place of {name!r}; make the optimizer with "
                    "the ticket and with `dense` in the order of that run"
                )
        loaded = []
        for number, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            if missing := [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]:
                raise ValueError(f"MaskedAdamW: parameter group {number} of the state has no {missing[0]!r}")
            loaded.append({"pull": 0.0, "maximize": False, **group, "index_sets": list(own["index_sets"])})
            _check_options(loaded[-1])
            if loaded[-1]["pull"] and any(launch.anchor is None for launch in self._launches):
                raise ValueError(
                    "MaskedAdamW: the state is of an optimizer with a pull; create this one with pull=, too, to keep "
                    "the values that the pull draws to"
                )
        of_key = dict(zip((key for group in groups for key in group["params"]), params, strict=True))
        if unknown := [key for key in state_dict["state"] if key not in of_key]:
            raise ValueError(f"MaskedAdamW: the state holds {unknown[0]!r}, which is in none of its parameter groups")
        saved = {of_key[key]: self._own_state(of_key[key], state) for key, state in state_dict["state"].items()}
        if saved and not any(saved.values()):
            saved = {}
        members = zip(self.param_groups, loaded, strict=True)
        of_param = {param: values for group, values in members for param in group["params"]}
        given = state_dict.get(_GRADIENTS)
        if given is not None and (not isinstance(given, list) or len(given) != len(params)):
            raise ValueError(f"MaskedAdamW: {_GRADIENTS!r} in the state must be a list of {len(params)} gradients")
        gradients = None if given is None else dict(zip(params, given, strict=True))
        name_of = dict(zip(params, names, strict=True))
        for launch in self._launches:
            for position, param in enumerate(launch.params):
                name = name_of[param]
                if saved:
                    launch.check_state(position, saved.get(param, {}), name, of_param[param])
                if gradients is not None:
                    launch.check_gradient(position, gradients[param], name)
        return saved, loaded, gradients

    def _own_state(self, param: nn.Parameter, state: Any) -> Any:
        """This rank's share of the saved state of a parameter."""
        if not spread(param) or not isinstance(state, Mapping):
            return state
        from ltp_sparse.optim.sharded_state import to_load

        lengths = {key: len(values) for key, values in self.state[param].items() if values.dim()}
        return to_load(dict(state), self._parts[param], lengths)

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles. The base class would leave the packed buffers out."""
        if self._packs:
            raise TypeError(
                'MaskedAdamW: gradients="packed" hooks into its model and cannot be copied; make an optimizer for the '
                "copy of the model and load the state_dict"
            )
        own = (
            "max_grad_norm", "grad_norm", "precision", "pull_on", "_removed", "_packs", "_parts", "_launches",
            "_hyper_known", "_laid_out", "_names", "_ticketed", "_warned", "_pull_factor", "_compared",
        )  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_launches" in state:  # a copy, which stands for another model; torch loads state dicts this way, too
            self._home = self._model = None
        self.__dict__.setdefault("_laid_out", self._members())
        for group in self.param_groups:
            group.setdefault("pull", 0.0)
            group.setdefault("maximize", False)
            group.setdefault("index_sets", self._digests_of(group))
        self._set_clips()
        for launch in self._launches:  # a pickle has given every view a storage of its own
            for position, param in enumerate(launch.params):
                self.state[param] = launch.state(position)

    def average_gradients(self, group: ProcessGroup | None = None) -> None:
        """Averages packed gradients over the ranks. Without DDP, call it after the last micro-batch.

        Args:
            group: the process group; None: the default one.

        Raises:
            ValueError: parameters are sharded, so that their gradients are those of all ranks already; or the ranks
                have different tickets.
        """
        if any(launch.spread for launch in self._launches):
            raise ValueError(
                "MaskedAdamW.average_gradients: gradients of sharded parameters are those of all ranks already"
            )
        for launch in self._launches:
            if launch.packed is not None:
                launch.packed.average(group)

    def remove(self) -> None:
        """Removes the hooks of packed gradients; a further step is an error. Does nothing if there are none."""
        if self._watch is not None:
            self._watch.remove()
        for launch in self._launches:
            if launch.packed is not None:
                launch.packed.remove()
                self._removed = True

    def stalled_share(self, warn_above: float = 0.5) -> float:
        """Share of the active entries whose next update rounds to nothing, assuming that the moments stay as they are.

        This affects bfloat16 and float16 weights that are rounded to nearest and have no master: an update can be
        smaller than half the distance to the next weight. Call it occasionally, e.g. after the first hundred steps; it
        waits for the device.

        Args:
            warn_above: the share from which on a warning is given.

        Warns:
            StalledUpdates: the share is above `warn_above`. The text is always the same, so that Python's default
                filter shows it once per place that calls this method.
        """
        with torch.no_grad():  # as a decorator it would take the caller's place in the warning
            share = sum(launch.stalled() for launch in self._launches) / max(self.active_entries, 1)
        if share > warn_above:
            warnings.warn(
                f"MaskedAdamW: the updates of more than {warn_above:.0%} of the active entries round to nothing; train "
                'with master=True, with rounding="stochastic" (bfloat16), or at a higher learning rate',
                StalledUpdates,
                stacklevel=2,
            )
        return share

    @property
    def active_entries(self) -> int:
        """The number of trained entries, those of dense parameters included."""
        return sum(launch.table.k for launch in self._launches)

    def initial_values(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> float32 [k], the values that `pull` draws its active entries to, in slot order.

        They are views of the optimizer's own tensors and must not be changed. Empty without a pull.
        """
        return {
            param: launch.anchor[slots]
            for launch in self._launches
            if launch.anchor is not None
            for param, slots in zip(launch.params, launch.slots, strict=True)
        }

    def state_bytes(self) -> int:
        """Bytes on the parameters' devices besides weights and gradients: moments, masters, index, and the values of a
        pull, or the buffer for a piece of them."""
        return sum(tensor.nbytes for launch in self._launches for tensor in launch.tensors())

    def __repr__(self) -> str:
        n = sum(param.numel() for launch in self._launches for param in launch.params)
        lines = [f"{self.__class__.__name__} ("]
        lines.append(f"  {self.active_entries:,} of {n:,} entries train, {self.state_bytes():,} bytes of state")
        for index, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v}" for k, v in group.items() if k not in ("params", "index_sets"))
            lines.append(f"  group {index}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])


def _checked_form(state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """(version and digests, parameter groups) of a state. Raises ValueError if `state_dict` cannot have made it."""
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(f"MaskedAdamW: the state has no {key!r}; expected what state_dict() gave")
        if not isinstance(state_dict[key], kind):
            raise ValueError(f"MaskedAdamW: {key!r} is a {type(state_dict[key]).__name__}, no {kind.__name__}")
    extra, groups = state_dict.get(_DIGESTS, {"version": 1}), state_dict["param_groups"]
    if not isinstance(extra, Mapping) or "version" not in extra:
        raise ValueError(f"MaskedAdamW: {_DIGESTS!r} in the state must be a mapping with a version, got {extra!r}")
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"MaskedAdamW: parameter group {number} of the state has no list of 'params'")
    if extra["version"] != 1:
        raise ValueError(
            f"MaskedAdamW: state of version {extra['version']}, this one reads version 1; update ltp_sparse"
        )
    if _DIGESTS not in state_dict and not all("index_sets" in group for group in groups):
        raise ValueError(
            "MaskedAdamW: the state was not saved by MaskedAdamW; its moments cannot be matched to a ticket"
        )
    return extra, groups


def _are_same(some: list[nn.Parameter], others: list[nn.Parameter]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def freeze(model: nn.Module, ticket: Ticket | TicketShard, dense: nn.Module | Iterable[Any] = ()) -> None:
    """Turns `requires_grad` off for all parameters without an active entry that are not in `dense`.

    Call it before wrapping the model in DDP, which decides at construction which gradients it waits for.

    Args:
        model: the model that is trained.
        ticket: the active entries.
        dense: as in `MaskedAdamW`.

    Raises:
        ValueError: the model is already wrapped in DDP, or the ticket is not one of this model.
    """
    named = named_parameters(model, what="freeze")
    trained = {named[name] for name in parts_of(named, ticket, what="freeze")}
    _freeze(model, trained | set(dense_parameters(dense, what="freeze")))


def _freeze(model: nn.Module, trained: set[nn.Parameter]) -> None:
    frozen = [param for param in model.parameters() if param not in trained and param.requires_grad]
    if frozen and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("freeze: the model is already wrapped in DDP; call ltp_sparse.optim.freeze before wrapping it")
    for param in frozen:
        param.requires_grad_(False)
        param.grad = None


def _tell_accelerate(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Shows accelerate that a GradScaler skips this step, so that its scheduler does not advance.

    During a step accelerate replaces `step` by a function of its own, whose call counts as a step taken. Only in this
    case is found_inf read from the device.
    """
    patched = optimizer.__dict__.get("step")
    if patched is not None and patched.__module__ == "accelerate.optimizer" and found_inf.item():
        inspect.getclosurevars(patched).nonlocals["accelerated_optimizer"]._accelerate_step_called = False


def _outside_torch() -> int:
    """The level of the stack, for a warning of the calling function, that is neither torch's nor this module's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "ltp_sparse"):
        frame, level = frame.f_back, level + 1
    return level


def _check_max_norm(value: Any, expected: str) -> None:
    """Raises ValueError, with what was expected, unless gradients can be clipped to this norm."""
    if not (isinstance(value, Real | Tensor) and float(value) > 0):
        raise ValueError(f"MaskedAdamW{expected}, got {value!r}")


def _check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError unless every hyperparameter is in its range."""

    def number(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() == 1:
        lr = lr.item()
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    for what, value, valid in (
        ("lr must be at least 0", lr, number(lr) and lr >= 0),
        ("maximize must be True or False", group["maximize"], isinstance(group["maximize"], bool)),
        ("betas must be in [0, 1)", betas, pair and all(number(beta) and 0 <= beta < 1 for beta in betas)),
        *((f"{key} must be at least 0", group[key], number(group[key]) and group[key] >= 0) for key in _AT_LEAST_0),
    ):
        if not valid:
            kind = ", a text; pass a number" if isinstance(value, str) else ""
            raise ValueError(f"MaskedAdamW: {what}, got {value}{kind}")
