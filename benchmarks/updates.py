"""One optimizer step for the benchmarks of CPU and GPU: the weights, their expected values, and the peers.

A provider is verified before it is timed: three steps from the initial weights and fresh moments, each with another
scale of the gradient, must match AdamW in float64, with the tolerance of the provider's precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from harness import Provider, WrongResult
from torch import Tensor, nn

import ltp_sparse as ls

FUSED = "torch AdamW(fused=True)"
FOREACH = "torch AdamW(foreach=True)"
MULTIPLIED = "grad.mul_(mask) + fused"
GATHERED = "index_select + fused + index_copy_"
LR, DECAY, BETA1, BETA2, EPS = 1e-3, 0.01, 0.9, 0.999, 1e-8
OPTIONS = {"lr": LR, "weight_decay": DECAY, "betas": (BETA1, BETA2), "eps": EPS}
SCALES = (1.0, -2.0, 4.0)  # of the gradient, step by step, in the verification; powers of two can be undone exactly
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # entries compared at a time


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference of a weight from the float64 result, relative to max(|p|, steps * lr).

    Attributes:
        each: limit for any single entry.
        mean: limit for the mean of all compared entries.
    """

    # Means of wrong updates, for comparison: no update at all 0.12; a learning rate twice too high 0.12, 10 % too high
    # 0.012; moments without bias correction 0.31, ones that forget the earlier steps 0.013; no second moment 0.09 or
    # more; no first moment 0.023.

    each: float = float("inf")
    mean: float = float("inf")


EXACT = Tolerance(each=4e-6)  # the bound of docs/design.md, Arithmetic
BFLOAT16 = Tolerance(each=2**-5)  # three steps of up to one unit in the last place
FLOAT16 = Tolerance(mean=1e-3)  # torch's second moments are float16 and vanish for small gradients
EIGHT_BITS = Tolerance(mean=0.01)  # 0.0008 in float32; 0.0035 for stochastically rounded bfloat16 weights


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """The tolerance for weights of this dtype, and moments of at least its precision."""
    return {torch.float32: EXACT, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}[dtype]


def touched_lines(ticket: ls.Ticket, entries: int) -> int:
    """How many lines of `entries` neighbouring entries have an active one."""
    bits = {8: torch.int8, 16: torch.int16, 32: torch.int32}[entries]
    return sum(
        -(-s.n // entries) if s.k == s.n else int(s.bitmap().view(bits).count_nonzero()) for s in ticket.sets.values()
    )


class Problem:
    """Weights, gradients and a ticket on one device; all providers work on the same weights.

    Args:
        line: bytes of a cache line or sector, the smallest unit of memory traffic.
    """

    def __init__(
        self, ticket: ls.Ticket, initial: Mapping[str, Tensor], grads: Mapping[str, Tensor], line: int
    ) -> None:
        self.ticket, self.initial, self.line = ticket, initial, line
        first = next(iter(initial.values()))
        self.dtype, self.width, self.device = first.dtype, first.dtype.itemsize, first.device
        self.params = {name: nn.Parameter(tensor.clone()) for name, tensor in initial.items()}
        self.used_grads: list[Mapping[str, Tensor]] = [grads]  # with the copies of some providers
        self.use_grads(grads)
        self.n, self.k = ticket.n, ticket.k

    def use_grads(self, grads: Mapping[str, Tensor]) -> None:
        self.grads = grads
        for name, param in self.params.items():
            param.grad = grads[name]

    def copied_grads(self) -> dict[str, Tensor]:
        """A copy of the gradients, which is scaled with the others."""
        grads = {name: grad.clone() for name, grad in self.grads.items()}
        self.used_grads.append(grads)
        return grads

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        return {name: self.ticket.mask(name).to(self.device) for name in self.params}

    @cached_property
    def lines(self) -> int:
        """Cache lines of the weights with an active entry."""
        return touched_lines(self.ticket, self.line // self.width)

    def take_steps(self, step: Callable[[], object]) -> None:
        """Steps from the initial weights, under the gradients that `check` expects."""
        for name, param in self.params.items():
            param.detach().copy_(self.initial[name])
        for before, now in pairwise((1.0, *SCALES)):
            self.scale_grads(now / before)
            step()
        self.scale_grads(1 / SCALES[-1])

    def scale_grads(self, factor: float) -> None:
        for grads in self.used_grads:
            for grad in grads.values():
                grad.mul_(factor)

    def check(self, name: str, active: str, tolerance: Tolerance) -> None:
        """Compares the weights with the expected ones after `take_steps`.

        Args:
            name: name of the provider, for the message.
            active: which entries must be updated: "all"; "ticket", those of the ticket, without a look at others; or
                "only", those of the ticket, while others keep their initial bits.
            tolerance: tolerance of the provider's precision.
        """
        bits = torch.int32 if self.dtype == torch.float32 else torch.int16
        total, seen, size = 0.0, 0, CHUNK[self.device.type]
        for parameter, param in self.params.items():
            mask = self.masks[parameter].view(-1) if active != "all" else None
            flats = param.detach().view(-1), self.initial[parameter].view(-1), self.grads[parameter].view(-1)
            for start in range(0, param.numel(), size):
                found, before, grad = (flat[start : start + size] for flat in flats)
                expected = adamw(before.double(), grad.double())
                error = (found.double() - expected).abs_() / expected.abs().clamp(min=len(SCALES) * LR)
                wrong = ~(error <= tolerance.each)  # also for NaN
                chosen = None if mask is None else mask[start : start + size]
                if chosen is not None:
                    error, wrong = error[chosen], wrong & chosen
                    if active == "only":
                        wrong |= ~chosen & (found.view(bits) != before.view(bits))
                if bool(wrong.any()):
                    at = start + int(wrong.nonzero()[0])
                    raise WrongResult(f"{name}: {parameter} differs from the expected update, first at entry {at}")
                total, seen = total + float(error.sum()), seen + error.numel()
        if not total <= tolerance.mean * seen:
            raise WrongResult(f"{name}: the weights are off by {total / seen:.3g} on average, {tolerance.mean} allowed")


def adamw(param: Tensor, grad: Tensor) -> Tensor:
    """The expected weights (float64) after a step per scale of the gradient."""
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    for step, scale in enumerate(SCALES, start=1):
        g = scale * grad
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        denominator = (v / (1 - BETA2**step)).sqrt() + EPS
        param = param * (1 - LR * DECAY) - LR * m / (1 - BETA1**step) / denominator
    return param


def provider(
    problem: Problem,
    name: str,
    step: Callable[[], object],
    reset: Callable[[], None],
    active: str,
    traffic: int | None,
    tolerance: Tolerance | None = None,
) -> Provider:
    """A provider that is verified from fresh moments and the initial weights; `active` as in `Problem.check`."""

    def verify() -> None:
        reset()
        problem.take_steps(made.run)
        problem.check(name, active, tolerance or tolerance_of(problem.dtype))

    made = Provider(name, step, verify, traffic)
    return made


def masked(problem: Problem, name: str, optimizer: ls.MaskedAdamW) -> Provider:
    """A step of `MaskedAdamW`."""
    coded = optimizer.precision.states == "8bit"
    # touched lines of p read and written and of g read; moments and masters read and written; index read
    held = (2 if coded else 8) + (4 if optimizer.precision.keeps_master(problem.dtype) else 0)
    in_lines, state = 3 * problem.line * problem.lines, optimizer.state_bytes()
    traffic, tolerance = in_lines + held * problem.k + state, EIGHT_BITS if coded else None
    ours = provider(problem, name, optimizer.step, moments_of(optimizer), "only", traffic, tolerance)
    ours.bytes_in_lines, ours.memory = in_lines, state
    if optimizer.precision.keeps_master(problem.dtype):
        # the first step after another provider copies its weights into the masters, which no training loop needs
        ours.before = optimizer.step
    return ours


def compacted(problem: Problem, name: str, optimizer_of: Callable[[nn.Module], ls.MaskedAdamW]) -> Provider:
    """`MaskedAdamW` with packed gradients: the work of its hooks in backward, and the step.

    Args:
        problem: the weights and gradients.
        name: name of the provider.
        optimizer_of: makes the optimizer, for a module with the problem's weights.
    """
    params = {parameter: nn.Parameter(param.detach()) for parameter, param in problem.params.items()}
    optimizer = optimizer_of(module_of(params))
    hooked = [(key, param, list((param._post_accumulate_grad_hooks or {}).values())) for key, param in params.items()]

    def step() -> None:
        for parameter, param, hooks in hooked:
            for hook in hooks:
                param.grad = problem.grads[parameter]
                hook(param)
        optimizer.step()

    return provider(problem, name, step, moments_of(optimizer), "only", None)


def module_of(params: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module with these named parameters."""
    root = nn.Module()
    for name, param in params.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, param)
    return root


def moments_of(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Returns a function that sets them to zero in place, as a captured step keeps their addresses."""

    def reset() -> None:
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    return reset


class Dense:
    """Several forms of torch.optim.AdamW over all entries, with shared moments to save memory."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.state = {
            name: {
                "step": torch.zeros((), device=problem.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
            for name, param in problem.params.items()
        }

    def reset(self) -> None:
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    def optimizer(self, params: Mapping[str, nn.Parameter], **form: bool) -> torch.optim.AdamW:
        optimizer = adamw_of_torch(params.values(), self.problem.device, **form)
        for name, param in params.items():
            optimizer.state[param] = self.state[name]
        return optimizer

    def provider(self, name: str, traffic: int | None, **form: bool) -> Provider:
        step = self.optimizer(self.problem.params, **form).step
        return provider(self.problem, name, step, self.reset, "all", traffic)

    def fused(self) -> Provider:
        """p, both moments read and written, g read."""
        return self.provider(FUSED, 7 * self.problem.width * self.problem.n, fused=True)

    def multiplied(self) -> Provider:
        """Multiplies the gradient by a mask, then updates all entries."""
        problem = self.problem
        masks, grads = problem.masks, problem.copied_grads()
        views = {name: nn.Parameter(param.detach()) for name, param in problem.params.items()}
        for name, view in views.items():
            view.grad = grads[name]
        optimizer = self.optimizer(views, fused=True)

        def step() -> None:
            for name, view in views.items():
                view.grad.mul_(masks[name])
            optimizer.step()

        return provider(problem, MULTIPLIED, step, self.reset, "ticket", (9 * problem.width + 1) * problem.n)


def adamw_of_torch(params: Iterable[nn.Parameter], device: torch.device, **form: bool) -> torch.optim.AdamW:
    """AdamW; on a GPU one whose steps can be captured in a graph."""
    return torch.optim.AdamW(params, **OPTIONS, **form, capturable=device.type == "cuda")


def gathered(problem: Problem) -> Provider:
    """Gathers the active entries into compact tensors, updates these, and copies them back."""
    names = [name for name, index_set in problem.ticket.sets.items() if index_set.k]
    indices = {name: problem.ticket.indices(name).to(problem.device) for name in names}
    flat = {name: problem.params[name].detach().view(-1) for name in names}
    grads = {name: problem.grads[name].view(-1) for name in names}
    compact = {name: nn.Parameter(torch.empty_like(flat[name][: len(indices[name])])) for name in names}
    for param in compact.values():
        param.grad = torch.empty_like(param)
    optimizer = adamw_of_torch(compact.values(), problem.device, fused=True)

    def step() -> None:
        for name in names:
            torch.index_select(flat[name], 0, indices[name], out=compact[name].detach())
            torch.index_select(grads[name], 0, indices[name], out=compact[name].grad)
        optimizer.step()
        for name in names:
            flat[name].index_copy_(0, indices[name], compact[name].detach())

    # int64 indices three times, the compact tensors, and the touched lines of p (three times) and of g (once)
    traffic = (24 + 10 * problem.width) * problem.k + 4 * problem.line * problem.lines
    return provider(problem, GATHERED, step, moments_of(optimizer), "only", traffic)


def _torchao(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **OPTIONS)


def _bitsandbytes(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **OPTIONS)


def _flashoptim(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    # it has 24-bit weights for lower precisions only and refuses them for float32
    bits = {"master_weight_bits": None} if params[0].dtype == torch.float32 else {}
    return FlashAdamW(params, **OPTIONS, **bits)


PACKAGES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torchao AdamW8bit": _torchao,
    "bitsandbytes AdamW8bit": _bitsandbytes,
    "flashoptim FlashAdamW": _flashoptim,
}
"""AdamW with 8-bit moments over all entries, from other packages."""


def package(problem: Problem, name: str) -> Provider:
    """AdamW of another package.

    Raises:
        Exception: the package is missing or does not run here.
    """
    optimizer = PACKAGES[name](list(problem.params.values()))
    optimizer.step()
    return provider(problem, name, optimizer.step, optimizer.state.clear, "all", None, EIGHT_BITS)


def packages(problem: Problem) -> Iterator[Provider]:
    """The peers that are installed and run here; prints the others."""
    for name in PACKAGES:
        try:
            yield package(problem, name)
        except Exception as error:
            print(f"  skipped: {name} ({type(error).__name__}: {error})", flush=True)
