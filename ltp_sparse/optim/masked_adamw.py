"""`MaskedAdamW`: AdamW over a ticket. Its state exists for the active entries only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ltp_sparse.backends import DTYPES
from ltp_sparse.encoding import IndexSet
from ltp_sparse.names import canonical_parameters
from ltp_sparse.optim.launch import Launch, Precision
from ltp_sparse.optim.members import active_names, dense_groups, dense_parameters
from ltp_sparse.optim.packed_gradients import PackedGradients, carrier_of, check_packable
from ltp_sparse.ticket import Ticket

_DIGESTS = "ltp_sparse"
_GRADIENTS = "ltp_sparse_gradients"


class StalledUpdates(UserWarning):
    """Most updates round to nothing."""


class MaskedAdamW(Optimizer):
    """AdamW that updates the active entries of a ticket and leaves every other entry bitwise as it is.

    The moments, and nothing else of the model's size, are held: 8 bytes per active entry, plus the index. Parameters
    may be float32, bfloat16 or float16; the arithmetic is float32, and that of torch.optim.AdamW (decoupled weight
    decay, bias correction, one step count per parameter). A parameter whose gradient is None is skipped altogether.
    Weight decay, too, acts on active entries only. One call of `masked_adamw_` serves all parameters of a device and
    dtype. Works with learning-rate schedulers, `torch.amp.GradScaler`, accelerate, the Hugging Face Trainer and DDP.

    Args:
        model: a module, or a mapping from names to parameters.
        ticket: the active entries, by canonical name. Parameters of the model that are neither in it nor in `dense` are
            left out.
        lr: step size, a number or a 0-dim tensor.
        betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        dense: parameters updated in full in the same launch, such as a prompt encoder or a task head: a module,
            parameters, or parameter groups with their own options (`[{"params": head.parameters(), "lr": 1e-3}]`).
        max_grad_norm: clips the gradient of active and dense entries to this norm inside the step. Framework clipping
            of `model.parameters()` would count frozen entries: leave it off.
        pull: adds pull * sign(param - initial) to the gradient of the ticket's entries, before norm, clip and moments:
            the L1 term that draws them to their values at construction. Holds a float32 copy of them,
        pull_on: on the "device" of the parameters or, with parameters on a GPU, on the "host": 4 bytes per active entry
            less there; every step copies them over in pieces of 64 MiB, twice with `max_grad_norm`. The same bits.
        freeze: turns `requires_grad` off for parameters without an active entry (see `freeze`). The constructor changes
            nothing else in the model.
        states: "float32", or "8bit": moments in 1 byte each, with a scale per 256 active entries and moment (see
            `quantization.py`).
        master: keeps the exact value of every active entry of bfloat16 and float16 parameters in float32, 4 bytes each,
            and rounds it into the weight. Default: yes, unless `rounding` is stochastic. What others write into the
            weights is taken over at the next step, as far as torch counts it (edits through `.data` are not).
        rounding: "nearest", or "stochastic" for bfloat16 parameters without a master: up or down with probabilities
            that make the mean exact, so that small updates are not lost.
        seed: of the random bits that round weights and 8-bit moments: those of (seed, step, parameter, index) alone.
        gradients: "dense" reads the `.grad` of the parameters. "packed" replaces the gradient of every parameter of the
            ticket by its active entries as soon as backward has made it: 4 bytes per active entry are held, and of
            dense gradients at most one at a time. The parameter groups then hold a stand-in per parameter whose `.grad`
            is the packed gradient; later micro-batches add to it, a step consumes it, skipped or not, and `zero_grad`
            is not needed. Embeddings become `sparse=True`. Make the optimizer before wrapping the model in DDP, which
            then leaves these parameters to us. `remove()` undoes the hooks.

    Attributes:
        grad_norm: 0-dim float64 tensor, the last norm over active and dense entries before clipping; None without
            `max_grad_norm`.

    Raises:
        ValueError: no name of the ticket is in the model (the closest are listed), a shape differs, an option is out of
            range, a parameter is in the ticket and in `dense`, or gradients are to be packed that another optimizer
            packs already.
    """

    # GradScaler hands us its scale and found_inf; whether a step is skipped is then decided on the device
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        ticket: Ticket,
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
        named = canonical_parameters(model) if isinstance(model, nn.Module) else dict(model)
        names = active_names(named, ticket, what="MaskedAdamW")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"MaskedAdamW: max_grad_norm must be above 0 or None, got {max_grad_norm}")
        if pull_on not in ("device", "host"):
            raise ValueError(f'MaskedAdamW: pull_on must be "device" or "host", got {pull_on!r}')
        self.precision = Precision(states, master, rounding, seed)
        self.pull_on = pull_on
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._sets = {named[name]: ticket.sets[name] for name in names}  # all other parameters are dense
        self._launches: list[Launch] = []
        self._removed = False
        members = [named[name] for name in names]
        in_full = dense_groups(dense, what="MaskedAdamW")
        self._dense_of: dict[nn.Parameter, nn.Parameter] = {}
        if gradients == "packed":
            if not isinstance(model, nn.Module):
                raise ValueError('MaskedAdamW: gradients="packed" needs the module, not a mapping of its parameters')
            ticketed = dict(zip(names, members, strict=True))
            check_packable(ticketed, (p for group in in_full for p in group["params"]), what="MaskedAdamW")
            carriers = [carrier_of(param, self._sets[param].k) for param in members]
            self._dense_of = dict(zip(carriers, members, strict=True))
            self._sets |= {carrier: self._sets[param] for carrier, param in self._dense_of.items()}
            members = carriers
        elif gradients != "dense":
            raise ValueError(f'MaskedAdamW: gradients must be "dense" or "packed", got {gradients!r}')
        groups: list[dict[str, Any]] = [{"params": members, "pull": pull}] if names else []
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
            _freeze(model, {self._dense_of.get(p, p) for group in self.param_groups for p in group["params"]})
        for launch in self._launches:
            if launch.members is not launch.params:
                assert isinstance(model, nn.Module)
                launch.packed = PackedGradients(model, launch.params, launch.members, launch.sets, launch.table)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are updated in full."""
        self._refuse_if_packed()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, self.precision)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self._sets.setdefault(param, IndexSet.full(param.numel()))
        if self._launches:
            self._build()

    def _refuse_if_packed(self) -> None:
        if self._launches and self._dense_of:
            raise ValueError(
                'MaskedAdamW: gradients="packed" keeps to the parameters and devices of its construction; pass all '
                "parameters in `dense`, and move the model before making the optimizer"
            )

    def _build(self) -> None:
        """Lays parameters out, a launch per device and dtype, and carries the state over."""
        for launch in self._launches:
            launch.refresh_masters()  # those of the new launches take the weights to be theirs
        before = {param: dict(state) for param, state in self.state.items()}
        placed: dict[tuple[torch.device, torch.dtype, bool], list[tuple[nn.Parameter, int, int]]] = {}
        members = [(member, index) for index, group in enumerate(self.param_groups) for member in group["params"]]
        for number, (member, index) in enumerate(members):
            param = self._dense_of.get(member, member)
            placed.setdefault((param.device, param.dtype, param is member), []).append((member, number, index))
        self._launches = []
        for (_, _, direct), triples in placed.items():
            own = [member for member, _, _ in triples]
            params = [self._dense_of.get(member, member) for member in own]
            self._launches.append(
                Launch(
                    params,
                    numbers=[number for _, number, _ in triples],
                    group=[index for _, _, index in triples],
                    sets=[self._sets[member] for member in own],
                    groups=len(self.param_groups),
                    precision=self.precision,
                    members=None if direct else own,
                )
            )
        for launch in self._launches:
            if any(group["pull"] for group in self.param_groups):
                launch.keep_anchor(self.pull_on)
            for position, member in enumerate(launch.members):
                state = launch.state(position)
                for key, value in before.get(member, {}).items():
                    state[key].copy_(value)
                self.state[member] = state
        self.update_hyperparameters()

    def update_hyperparameters(self) -> None:
        """Copies the hyperparameters of `param_groups` to the devices.

        `step` does so itself, except in a captured CUDA graph: call this before replaying one, so that a scheduler's
        learning rate reaches it.
        """
        for launch in self._launches:
            launch.set_hyperparameters(self.param_groups)
        self._hyper_known = self._hyper_key()

    def _hyper_key(self) -> list[tuple[Any, ...]]:
        keys = ("lr", "betas", "eps", "weight_decay", "maximize", "pull")
        return [tuple(group[key] for key in keys) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Parameters without a gradient are skipped; a found_inf of a GradScaler skips all of them.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            ValueError: a gradient is sparse or of another dtype, or a parameter changed its shape or dtype.
        """
        if self._removed:
            raise RuntimeError("MaskedAdamW: remove() has taken the hooks of its packed gradients away; make a new one")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for launch in self._launches:
            launch.check_dtypes()
        if any(p.device != launch.device for launch in self._launches for p in launch.params):
            self._refuse_if_packed()
            self._build()
        if (
            any(isinstance(group["lr"], Tensor) for group in self.param_groups)
            or self._hyper_known != self._hyper_key()
        ):
            self.update_hyperparameters()

        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for launch in self._launches:
            launch.refresh_masters()
            launch.begin_step(found_inf, grad_scale)
        if self.max_grad_norm is not None:
            self._clip(self.max_grad_norm)
        for launch in self._launches:
            launch.update()
        return loss

    def _clip(self, max_norm: float) -> None:
        """Scales gradients and pull so that the norm over active and dense entries is at most `max_norm`."""
        sums = [launch.sum_squares() for launch in self._launches]
        total = torch.stack([s.to(sums[0].device) for s in sums]).sum().sqrt()
        self.grad_norm = total
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for launch in self._launches:
            launch.clip(factor.to(launch.device))

    def state_dict(self, *, include_gradients: bool = False) -> dict[str, Any]:
        """The packed state and the parameter groups, with a digest of every index set.

        The moments are in slot order, which depends neither on backend, device nor encoding; those of an optimizer
        with other `states` load as well. Index sets are not stored: the ticket that makes the optimizer brings them.

        include_gradients: also what micro-batches have accumulated so far (copies), to go on in the middle of an
            accumulation; `load_state_dict` puts it back into an optimizer with the same `gradients`.
        """
        saved = {**super().state_dict(), _DIGESTS: {"version": 1, "index_sets": self._digests()}}
        if include_gradients:
            grads = [member.grad for member in self._members()]
            saved[_GRADIENTS] = [None if grad is None else grad.detach().clone() for grad in grads]
        return saved

    def _members(self) -> list[nn.Parameter]:
        return [member for group in self.param_groups for member in group["params"]]

    def _digests(self) -> list[str]:
        return [self._sets[param].digest() for group in self.param_groups for param in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, onto any device.

        Raises:
            ValueError: it belongs to another ticket, other parameters, or is of a newer version; nothing is changed
                then.
        """
        extra = state_dict.get(_DIGESTS)
        if extra is None:
            raise ValueError(
                "MaskedAdamW: the state was not saved by MaskedAdamW; its moments cannot be matched to a ticket"
            )
        if extra["version"] != 1:
            raise ValueError(
                f"MaskedAdamW: state of version {extra['version']}, this one reads version 1; update ltp_sparse"
            )
        if extra["index_sets"] != self._digests():
            raise ValueError(
                "MaskedAdamW: the state was saved for another ticket, or for other parameters in another order; "
                "make the optimizer with the ticket of that run"
            )
        params = self._members()
        gradients = state_dict.get(_GRADIENTS)
        if gradients is not None and any(
            grad is not None and grad.shape != member.shape for grad, member in zip(gradients, params, strict=True)
        ):
            raise ValueError(
                "MaskedAdamW: the saved gradients were packed and those of this optimizer are dense, or the reverse; "
                "make it with the `gradients` of that run"
            )
        saved = {params[index]: state for index, state in state_dict["state"].items()}
        places = [(launch, position) for launch in self._launches for position in range(len(launch.members))]
        for launch, position in places:
            launch.check(position, saved.get(launch.members[position], {}))
        # the base class would cast every tensor to the dtype of its parameter, so it gets the groups alone
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for launch, position in places:
            self.state[launch.members[position]] = launch.state(position)
            launch.load(position, saved.get(launch.members[position], {}))
        self.update_hyperparameters()
        if gradients is not None:
            of_member = dict(zip(params, gradients, strict=True))
            for launch, position in places:
                launch.put_gradient(position, of_member[launch.members[position]])

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry; torch's own would leave the packed buffers behind."""
        if self._dense_of:
            raise TypeError(
                'MaskedAdamW: gradients="packed" hooks into its model and cannot be copied; make an optimizer for the '
                "copy of the model and load the state_dict"
            )
        own = (
            "max_grad_norm", "grad_norm", "precision", "pull_on", "_removed", "_dense_of", "_sets", "_launches",
            "_hyper_known",
        )  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("pull", 0.0)
            group.setdefault("maximize", False)
        for launch in self._launches:  # a pickle has given every view a storage of its own
            for position, member in enumerate(launch.members):
                self.state[member] = launch.state(position)

    def average_gradients(self, group: ProcessGroup | None = None) -> None:
        """Averages packed gradients over the ranks, for loops without DDP; call it after the last micro-batch."""
        for launch in self._launches:
            if launch.packed is not None:
                launch.packed.average(group)

    def remove(self) -> None:
        """Takes the hooks of packed gradients away; a further step is an error. Without such hooks it does nothing."""
        for launch in self._launches:
            if launch.packed is not None:
                launch.packed.remove()
                self._removed = True

    def stalled_share(self, warn_above: float = 0.5) -> float:
        """Share of the active entries whose update, with the moments as they are, rounds to nothing.

        That happens to bfloat16 and float16 weights that are rounded to nearest and have no master: their steps are
        finer than the weights. Call it now and then, e.g. after the first hundred steps; it reads the device.

        Warns:
            StalledUpdates: the share is above `warn_above`. The text is always the same, so that Python's default
                filter shows it once for every place that calls.
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
        """Entries that train: the ticket's and the dense ones."""
        return sum(launch.table.k for launch in self._launches)

    def initial_values(self) -> dict[nn.Parameter, Tensor]:
        """Parameter -> float32 [k], the values that `pull` draws its active entries to, in slot order.

        They are views of what the optimizer holds: read them, do not write them. Empty without a pull.
        """
        return {
            param: launch.anchor[slots]
            for launch in self._launches
            if launch.anchor is not None
            for param, slots in zip(launch.params, launch.slots, strict=True)
        }

    def state_bytes(self) -> int:
        """Bytes held where the parameters are on top of weights and gradients: moments, masters, index, and the pull's
        initial values, or room for a piece of them."""
        return sum(tensor.nbytes for launch in self._launches for tensor in launch.tensors())

    def __repr__(self) -> str:
        n = sum(param.numel() for launch in self._launches for param in launch.params)
        lines = [f"{self.__class__.__name__} ("]
        lines.append(f"  {self.active_entries:,} of {n:,} entries train, {self.state_bytes():,} bytes of state")
        for index, group in enumerate(self.param_groups):
            options = ", ".join(f"{k}={v}" for k, v in group.items() if k != "params")
            lines.append(f"  group {index}: {len(group['params'])} parameters, {options}")
        return "\n".join([*lines, ")"])


def freeze(model: nn.Module, ticket: Ticket, dense: nn.Module | Iterable[Any] = ()) -> None:
    """Turns `requires_grad` off for all parameters without an active entry that are not in `dense`.

    Do so before wrapping the model in DDP, which decides at construction which gradients it waits for.
    """
    named = canonical_parameters(model)
    trained = {named[name] for name in active_names(named, ticket, what="freeze")}
    _freeze(model, trained | set(dense_parameters(dense, what="freeze")))


def _freeze(model: nn.Module, trained: set[nn.Parameter]) -> None:
    frozen = [param for param in model.parameters() if param not in trained and param.requires_grad]
    if frozen and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("freeze: the model is already wrapped in DDP; call ltp_sparse.optim.freeze before wrapping it")
    for param in frozen:
        param.requires_grad_(False)
        param.grad = None


def _check_group(group: dict[str, Any], precision: Precision) -> None:
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    for what, value, valid in (
        ("lr must be at least 0", lr, isinstance(lr, Tensor) or lr >= 0),
        ("betas must be in [0, 1)", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps must be at least 0", group["eps"], group["eps"] >= 0),
        ("weight_decay must be at least 0", group["weight_decay"], group["weight_decay"] >= 0),
        ("pull must be at least 0", group["pull"], group["pull"] >= 0),
    ):
        if not valid:
            raise ValueError(f"MaskedAdamW: {what}, got {value}")
    for param in group["params"]:
        if param.dtype not in DTYPES:
            raise TypeError(
                f"MaskedAdamW: parameters must be {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, "
                f"got {param.dtype}"
            )
        precision.is_stochastic(param.dtype)
