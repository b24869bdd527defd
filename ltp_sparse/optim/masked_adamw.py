"""`MaskedAdamW`: AdamW over a ticket. Its state exists for the active entries only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ltp_sparse import ops
from ltp_sparse.delta import gather
from ltp_sparse.encoding import IndexSet, TileTable
from ltp_sparse.names import canonical_parameters, match_names
from ltp_sparse.reference import Coefficient
from ltp_sparse.ticket import Ticket

_DIGESTS = "ltp_sparse"


class _Launch:
    """The parameters of one device: what one launch updates, and the packed state it holds.

    params:      the parameters, in the order of the parameter groups
    group:       index of the parameter group of each
    table:       their active entries
    exp_avg:     float32 [K], first moments in slot order; exp_avg_sq the second ones
    anchor:      float32 [K], initial values for the pull, or None
    steps:       float64 [P], updates each parameter has taken
    hyper:       float64 [G, 7], the hyperparameters of every parameter group
    """

    HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "sign", "pull")

    def __init__(self, params: list[nn.Parameter], group: list[int], sets: list[IndexSet], groups: int) -> None:
        self.params = params
        self.device = params[0].device
        self.sets = sets
        self.table = TileTable.build(sets, device=self.device, ranks=self.device.type != "cpu")
        self.exp_avg, self.exp_avg_sq = (torch.zeros(self.table.k, device=self.device) for _ in range(2))
        self.anchor: Tensor | None = None
        self.steps = torch.zeros(len(params), dtype=torch.float64, device=self.device)
        self.group = torch.tensor(group, device=self.device)
        self.hyper = torch.zeros(groups, len(self.HYPER), dtype=torch.float64, device=self.device)
        self.has_grad = torch.zeros(len(params), dtype=torch.float64, device=self.device)
        self.known_grads: list[bool] | None = None
        starts = torch.tensor([0, *self.table.counts]).cumsum(0).tolist()
        self.slots = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]

    def state(self, position: int) -> dict[str, Tensor]:
        """The state of one parameter, as views of the packed buffers."""
        slots = self.slots[position]
        state = {"step": self.steps[position], "exp_avg": self.exp_avg[slots], "exp_avg_sq": self.exp_avg_sq[slots]}
        return state if self.anchor is None else {**state, "anchor": self.anchor[slots]}

    def keep_anchor(self) -> None:
        """Keeps the current values of the active entries: what the pull draws to."""
        self.anchor = torch.cat([gather(p, s).float() for p, s in zip(self.params, self.sets, strict=True)])

    def tensors(self) -> list[Tensor]:
        table = self.table
        state = [self.exp_avg, self.exp_avg_sq, table.tiles, table.words, table.ranks, table.positions]
        return [*state, *([] if self.anchor is None else [self.anchor])]


class MaskedAdamW(Optimizer):
    """AdamW that updates the active entries of a ticket and leaves every other entry bitwise as it is.

    The moments, and nothing else of the model's size, are held: 8 bytes per active entry, plus the index. The
    arithmetic is that of torch.optim.AdamW (decoupled weight decay, bias correction, one step count per parameter); a
    parameter whose gradient is None is skipped altogether. Weight decay, too, acts on active entries only. One call of
    `masked_adamw_` serves all parameters of a device. Works with learning-rate schedulers, `torch.amp.GradScaler`,
    accelerate, the Hugging Face Trainer and DDP.

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
            the L1 term that draws them to their values at construction. Holds a float32 copy of them.
        freeze: turns `requires_grad` off for parameters without an active entry (see `freeze`). The constructor changes
            nothing else in the model.

    Attributes:
        grad_norm: 0-dim float64 tensor, the last norm over active and dense entries before clipping; None without
            `max_grad_norm`.

    Raises:
        ValueError: no name of the ticket is in the model (the closest are listed), a shape differs, or an option is out
            of range.
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
        maximize: bool = False,
        freeze: bool = False,
    ) -> None:
        named = canonical_parameters(model) if isinstance(model, nn.Module) else dict(model)
        names = match_names(ticket.active_names, named, what="MaskedAdamW", where="the model")
        for name in names:
            if named[name].shape != ticket.shapes[name]:
                raise ValueError(
                    f"MaskedAdamW: {name!r} has shape {list(named[name].shape)} in the model and "
                    f"{list(ticket.shapes[name])} in the ticket; select the ticket on this model"
                )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"MaskedAdamW: max_grad_norm must be above 0 or None, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._sets = {named[name]: ticket.sets[name] for name in names}  # all other parameters are dense
        self._launches: list[_Launch] = []
        groups: list[dict[str, Any]] = [{"params": [named[name] for name in names], "pull": pull}] if names else []
        groups += _dense_groups(dense)
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
            _freeze(model, {p for group in self.param_groups for p in group["params"]})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are updated in full."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self._sets.setdefault(param, IndexSet.full(param.numel()))
        if self._launches:
            self._build()

    def _build(self) -> None:
        """Lays parameters out, a launch per device, and carries the state over."""
        before = {param: dict(state) for param, state in self.state.items()}
        members: dict[torch.device, list[tuple[nn.Parameter, int]]] = {}
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                members.setdefault(param.device, []).append((param, index))
        self._launches = [
            _Launch(
                [p for p, _ in pairs], [i for _, i in pairs], [self._sets[p] for p, _ in pairs], len(self.param_groups)
            )
            for pairs in members.values()
        ]
        for launch in self._launches:
            if any(group["pull"] for group in self.param_groups):
                launch.keep_anchor()
            for position, param in enumerate(launch.params):
                state = launch.state(position)
                for key, value in before.get(param, {}).items():
                    state[key].copy_(value)
                self.state[param] = state
        self.update_hyperparameters()

    def update_hyperparameters(self) -> None:
        """Copies the hyperparameters of `param_groups` to the devices.

        `step` does so itself, except in a captured CUDA graph: call this before replaying one, so that a scheduler's
        learning rate reaches it.
        """
        for launch in self._launches:
            for index, group in enumerate(self.param_groups):
                if group["pull"] and launch.anchor is None:
                    raise ValueError(
                        "MaskedAdamW: pull must be set at construction, which keeps the values it draws to"
                    )
                lr = group["lr"]
                sign = -1.0 if group["maximize"] else 1.0
                values = [float(lr) if not isinstance(lr, Tensor) else 0.0, *group["betas"], group["eps"]]
                row = torch.tensor([*values, group["weight_decay"], sign, group["pull"]], dtype=torch.float64)
                launch.hyper[index].copy_(row)
                if isinstance(lr, Tensor):
                    launch.hyper[index, 0].copy_(lr)
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.device != launch.device for launch in self._launches for p in launch.params):
            self._build()
        if (
            any(isinstance(group["lr"], Tensor) for group in self.param_groups)
            or self._hyper_known != self._hyper_key()
        ):
            self.update_hyperparameters()

        prepared = []
        for launch in self._launches:
            grads = [p.grad for p in launch.params]
            present = [grad is not None for grad in grads]
            if present != launch.known_grads:
                launch.has_grad.copy_(torch.tensor(present, dtype=torch.float64))
                launch.known_grads = present
            prepared.append((launch, grads, self._coefficients(launch)))
        if self.max_grad_norm is not None:
            self._clip(prepared, self.max_grad_norm)
        for launch, grads, coefficients in prepared:
            ops.masked_adamw_(
                launch.params, grads, launch.exp_avg, launch.exp_avg_sq, launch.table, coefficients, launch.anchor
            )
        return loss

    def _coefficients(self, launch: _Launch) -> Tensor:
        """float64 [P, 10]: what `masked_adamw_` needs of hyperparameters and step counts; all on the device."""
        apply = launch.has_grad
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None:
            apply = apply * (found_inf.to(launch.device, torch.float64) == 0)
        launch.steps += apply
        lr, beta1, beta2, eps, weight_decay, sign, pull = launch.hyper[launch.group].unbind(1)
        # a parameter that has never been updated has no bias correction yet; its row is not applied
        steps = launch.steps.clamp(min=1)
        factor = sign if grad_scale is None else sign / grad_scale.to(launch.device, torch.float64)
        columns = {
            Coefficient.APPLY: apply,
            Coefficient.GRAD_FACTOR: factor,
            Coefficient.DECAY: 1 - lr * weight_decay,
            Coefficient.ONE_MINUS_BETA1: 1 - beta1,
            Coefficient.BETA2: beta2,
            Coefficient.ONE_MINUS_BETA2: 1 - beta2,
            Coefficient.STEP_SIZE: lr / (1 - beta1**steps),
            Coefficient.INV_SQRT_BC2: (1 - beta2**steps).rsqrt(),
            Coefficient.EPS: eps,
            Coefficient.PULL: pull,
        }
        return torch.stack([columns[i] for i in range(Coefficient.COUNT)], dim=1)

    def _clip(self, prepared: list[tuple[_Launch, list[Tensor | None], Tensor]], max_norm: float) -> None:
        """Scales gradients and pull so that the norm over active and dense entries is at most `max_norm`."""
        sums = [
            ops.masked_sum_squares(launch.params, grads, launch.table, coefficients, launch.anchor).sum()
            for launch, grads, coefficients in prepared
        ]
        total = torch.stack([s.to(sums[0].device) for s in sums]).sum().sqrt()
        self.grad_norm = total
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for launch, _, coefficients in prepared:
            coefficients[:, [Coefficient.GRAD_FACTOR, Coefficient.PULL]] *= factor.to(launch.device)

    def state_dict(self) -> dict[str, Any]:
        """The packed state and the parameter groups, with a digest of every index set.

        The moments are in slot order, which depends neither on backend, device nor encoding. Index sets are not stored:
        the ticket that makes the optimizer brings them.
        """
        return {**super().state_dict(), _DIGESTS: {"version": 1, "index_sets": self._digests()}}

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
        params = [param for group in self.param_groups for param in group["params"]]
        saved = {params[index]: state for index, state in state_dict["state"].items()}
        for param, state in saved.items():
            for key, value in state.items():
                if key not in self.state[param] or value.shape != self.state[param][key].shape:
                    raise ValueError(f"MaskedAdamW: {key!r} of shape {list(value.shape)} does not fit the packed state")
        # the base class would cast every tensor to the dtype of its parameter, so it gets the groups alone
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for launch in self._launches:
            for position, param in enumerate(launch.params):
                self.state[param] = launch.state(position)
                for key, value in saved.get(param, {}).items():
                    self.state[param][key].copy_(value)
        self.update_hyperparameters()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry; torch's own would leave the packed buffers behind."""
        own = ("max_grad_norm", "grad_norm", "_sets", "_launches", "_hyper_known")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("pull", 0.0)
            group.setdefault("maximize", False)

    @property
    def active_entries(self) -> int:
        """Entries that train: the ticket's and the dense ones."""
        return sum(launch.table.k for launch in self._launches)

    def state_bytes(self) -> int:
        """Bytes held on top of weights and gradients: moments, index, and the pull's initial values."""
        return sum(tensor.nbytes for launch in self._launches for tensor in launch.tensors())

    def __repr__(self) -> str:
        n = sum(p.numel() for group in self.param_groups for p in group["params"])
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
    names = match_names(ticket.active_names, named, what="freeze", where="the model")
    trained = {named[name] for name in names}
    trained |= {param for group in _dense_groups(dense) for param in group["params"]}
    _freeze(model, trained)


def _freeze(model: nn.Module, trained: set[nn.Parameter]) -> None:
    frozen = [param for param in model.parameters() if param not in trained and param.requires_grad]
    if frozen and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("freeze: the model is already wrapped in DDP; call ltp_sparse.optim.freeze before wrapping it")
    for param in frozen:
        param.requires_grad_(False)
        param.grad = None


def _dense_groups(dense: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """Parameter groups from a module, parameters, or parameter groups."""
    if isinstance(dense, Tensor):
        dense = [dense]
    items = list(dense.parameters() if isinstance(dense, nn.Module) else dense)
    if all(isinstance(item, Tensor) for item in items):
        return [{"params": items}] if items else []
    if not all(isinstance(item, dict) for item in items):
        raise TypeError("MaskedAdamW: dense must be a module, parameters, or parameter groups, not a mixture")
    alone = [isinstance(group["params"], Tensor) for group in items]
    return [{**g, "params": [g["params"]] if one else list(g["params"])} for g, one in zip(items, alone, strict=True)]


def _check_group(group: dict[str, Any]) -> None:
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
        if param.dtype != torch.float32:
            raise TypeError(f"MaskedAdamW: parameters must be float32, got {param.dtype}; keep weights in float32")
