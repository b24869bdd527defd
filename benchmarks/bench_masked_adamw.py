"""One optimizer step: `MaskedAdamW` against torch.optim.AdamW over all entries and sparse updates made of torch ops.

All providers update the same weights from the same gradients, on the same uniformly random ticket. Before they are
timed, each takes a few steps from fresh moments, with gradients that change, and is compared with AdamW in float64;
ours also bit by bit with the reference. There are cells of float32 and of bfloat16 weights; 8-bit moments stand in
both, and so do the packages that have them, where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from harness import (
    MODELS,
    Provider,
    Row,
    WrongResult,
    arguments,
    instruction_sets,
    time_rows,
    value_row,
    with_isa,
    write_csv,
)
from torch import Size, Tensor, nn

import ltp_sparse as ls
from ltp_sparse.testing import random_weights

BASELINE = "torch AdamW(fused=True)"
LR, DECAY, BETA1, BETA2, EPS = 1e-3, 0.01, 0.9, 0.999, 1e-8
OPTIONS = {"lr": LR, "weight_decay": DECAY, "betas": (BETA1, BETA2), "eps": EPS}
SCALES = (1.0, -2.0, 4.0)  # of the gradient, step by step, in the verification; powers of two are undone exactly
CHUNK = 1 << 22
LINE = 64  # bytes of a cache line
MASKED: dict[torch.dtype, dict[str, dict[str, Any]]] = {
    torch.float32: {"MaskedAdamW": {}, "MaskedAdamW, 8-bit states": {"states": "8bit"}},
    torch.bfloat16: {
        "MaskedAdamW, master": {},
        "MaskedAdamW, stochastic rounding": {"rounding": "stochastic"},
        "MaskedAdamW, rounding to nearest": {"master": False},
        "MaskedAdamW, stochastic rounding, 8-bit states": {"rounding": "stochastic", "states": "8bit"},
    },
}
"""Dtype of the weights -> ours by name, with options."""


@dataclass(frozen=True)
class Tolerance:
    """How far from the float64 result a weight may be, in parts of max(|p|, steps * lr).

    each: any entry
    mean: all entries that are looked at, on average
    """

    each: float = float("inf")
    mean: float = float("inf")


EXACT = Tolerance(each=4e-6)  # DESIGN.md, contract 4
ROUNDED = Tolerance(each=2**-5)  # three steps of up to one unit in the last place of a bfloat16
EIGHT_BITS = Tolerance(mean=0.05)


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem:
    """Weights, gradients and a ticket; every provider works on these very weights."""

    def __init__(self, shapes: Mapping[str, Size], density: float, dtype: torch.dtype = torch.float32) -> None:
        self.ticket = ls.Ticket.full(shapes) if density == 1 else ls.Ticket.random(shapes, density=density)
        self.dtype, self.width = dtype, dtype.itemsize
        self.tolerance = EXACT if dtype == torch.float32 else ROUNDED
        self.initial = {name: t.to(dtype) for name, t in random_weights(self.ticket.shapes).items()}
        grads = random_weights(self.ticket.shapes, seed=1, scale=1e-3)
        self.grads = {name: t.to(dtype) for name, t in grads.items()}
        self.params = {name: nn.Parameter(tensor.clone()) for name, tensor in self.initial.items()}
        for name, param in self.params.items():
            param.grad = self.grads[name]
        self.used_grads = [self.grads]  # with the copies that some providers work on
        self.n, self.k = self.ticket.n, self.ticket.k

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

    def lines(self) -> int:
        """Cache lines of the weights that hold an active entry."""
        entries = LINE // self.width
        bits = torch.int16 if entries == 16 else torch.int32
        return sum(
            -(-s.n // entries) if s.k == s.n else int(s.bitmap().view(bits).count_nonzero())
            for s in self.ticket.sets.values()
        )

    def check(self, name: str, active: str, tolerance: Tolerance) -> None:
        """Compares the weights with the expected ones after `take_steps`.

        active: "all": every entry was to be updated; "ticket": the ticket's, and the others are not looked at;
            "only": the ticket's, and the others must have kept their bits.
        """
        bits = torch.int32 if self.dtype == torch.float32 else torch.int16
        total, seen = 0.0, 0
        for parameter, param in self.params.items():
            mask = self.ticket.mask(parameter).view(-1) if active != "all" else None
            flats = param.detach().view(-1), self.initial[parameter].view(-1), self.grads[parameter].view(-1)
            for start in range(0, param.numel(), CHUNK):
                found, before, grad = (flat[start : start + CHUNK] for flat in flats)
                expected = adamw(before.double(), grad.double())
                error = (found.double() - expected).abs_() / expected.abs().clamp(min=len(SCALES) * LR)
                wrong = ~(error <= tolerance.each)  # NaN, too, is wrong
                chosen = None if mask is None else mask[start : start + CHUNK]
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

    def check_bits(self, name: str, options: Mapping[str, Any]) -> None:
        """Compares ours with the reference, bit by bit, on the smallest parameters and on one of middle size."""
        by_size = sorted(self.params, key=lambda name: self.params[name].numel())
        names = {*by_size[:12], by_size[len(by_size) // 2]} & {n for n, s in self.ticket.sets.items() if s.k}
        small, outcomes = self.ticket.restrict(sorted(names)), []
        for backend in ("reference", "compiled"):
            params = {key: nn.Parameter(self.initial[key].clone()) for key in sorted(names)}
            ls.use_backend(backend)
            optimizer = ls.MaskedAdamW(params, small, **OPTIONS, **options)
            for scale in SCALES:
                for key, param in params.items():
                    param.grad = self.grads[key] * scale
                optimizer.step()
            outcomes.append(list(params.values()))
        if not all(map(torch.equal, *outcomes)):
            raise WrongResult(f"{name}: the update differs from the reference's")


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
        problem.take_steps(step)
        problem.check(name, active, tolerance or problem.tolerance)

    return Provider(name, step, verify, traffic)


def masked(problem: Problem, name: str, optimizer: ls.MaskedAdamW, isas: list[str]) -> list[Provider]:
    """Ours, under these instruction sets; the state is shared."""
    coded = optimizer.precision.states == "8bit"

    def reset() -> None:
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    # touched lines of p read and written and of g read; moments and masters read and written; index read
    held = (2 if coded else 8) + (4 if optimizer.precision.keeps_master(problem.dtype) else 0)
    traffic = 3 * LINE * problem.lines() + held * problem.k + optimizer.state_bytes()
    return [
        provider(
            problem, f"{name} ({isa})", with_isa(isa, optimizer.step), reset, "only", traffic,
            EIGHT_BITS if coded else None,
        )
        for isa in isas
    ]  # fmt: skip


class Dense:
    """torch.optim.AdamW over all entries in several forms, which share one set of moments to save memory."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.state = {
            name: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for name, p in problem.params.items()
        }

    def reset(self) -> None:
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()

    def optimizer(self, params: Mapping[str, nn.Parameter], **form: bool) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(params.values(), **OPTIONS, **form)
        for name, param in params.items():
            optimizer.state[param] = self.state[name]
        return optimizer

    def provider(self, name: str, traffic: int | None, **form: bool) -> Provider:
        step = self.optimizer(self.problem.params, **form).step
        return provider(self.problem, name, step, self.reset, "all", traffic)

    def multiplied(self) -> Provider:
        """The gradient is multiplied by a mask, then everything is updated."""
        problem = self.problem
        masks = {name: problem.ticket.mask(name) for name in problem.params}
        views = {name: nn.Parameter(param.detach()) for name, param in problem.params.items()}
        grads = {name: grad.clone() for name, grad in problem.grads.items()}
        for name, view in views.items():
            view.grad = grads[name]
        problem.used_grads.append(grads)
        optimizer = self.optimizer(views, fused=True)

        def step() -> None:
            for name, view in views.items():
                view.grad.mul_(masks[name])
            optimizer.step()

        return provider(
            problem, "grad.mul_(mask) + fused", step, self.reset, "ticket", (9 * problem.width + 1) * problem.n
        )


def gathered(problem: Problem) -> Provider:
    """The active entries are gathered into compact tensors, updated there, and copied back."""
    names = [name for name, index_set in problem.ticket.sets.items() if index_set.k]
    indices = {name: problem.ticket.indices(name) for name in names}
    flat = {name: problem.params[name].detach().view(-1) for name in names}
    grads = {name: problem.grads[name].view(-1) for name in names}
    compact = {name: nn.Parameter(torch.empty(len(indices[name]), dtype=problem.dtype)) for name in names}
    for param in compact.values():
        param.grad = torch.empty_like(param)
    optimizer = torch.optim.AdamW(compact.values(), fused=True, **OPTIONS)

    def step() -> None:
        for name in names:
            torch.index_select(flat[name], 0, indices[name], out=compact[name].detach())
            torch.index_select(grads[name], 0, indices[name], out=compact[name].grad)
        optimizer.step()
        for name in names:
            flat[name].index_copy_(0, indices[name], compact[name].detach())

    # int64 indices three times, the compact tensors, and the touched lines of p (three times) and of g (once)
    traffic = (24 + 10 * problem.width) * problem.k + 4 * LINE * problem.lines()
    return provider(problem, "index_select + fused + index_copy_", step, optimizer.state.clear, "only", traffic)


def packages(problem: Problem) -> Iterator[Provider]:
    """AdamW with 8-bit moments over all entries, of other packages; one that is missing or does not run is named."""

    def torchao() -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit

        return AdamW8bit(problem.params.values(), **OPTIONS)

    def bitsandbytes() -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(problem.params.values(), **OPTIONS)

    for make in (torchao, bitsandbytes):
        try:
            optimizer = make()
            optimizer.step()
        except Exception as error:
            print(f"  skipped: {make.__name__} AdamW8bit ({type(error).__name__}: {error})", flush=True)
            continue
        name = f"{make.__name__} AdamW8bit"
        yield provider(problem, name, optimizer.step, optimizer.state.clear, "all", None, EIGHT_BITS)


def measure(model: str, density: float, dtype: torch.dtype, rounds: int) -> list[Row]:
    problem = Problem(MODELS[model], density, dtype)
    print(f"\nmasked_adamw_: {problem.n:,} {word(dtype)} entries, {100 * density:g} % active", flush=True)
    dense, providers, held = Dense(problem), [], {}
    isas = instruction_sets()
    for name, options in MASKED[dtype].items():
        problem.check_bits(name, options)
        optimizer = ls.MaskedAdamW(problem.params, problem.ticket, **OPTIONS, **options)
        providers += masked(problem, name, optimizer, isas if not providers else isas[:1])
        held[name] = optimizer.state_bytes()
    moments = 2 * problem.width
    providers += [dense.provider(BASELINE, (3 * problem.width + 2 * moments) * problem.n, fused=True)]
    held[BASELINE] = moments * problem.n
    if density < 1:
        providers += [dense.multiplied(), gathered(problem)]
    if density == 0.2:  # all that is left does not depend on the density
        providers += [dense.provider("torch AdamW()", None, foreach=False)]
        providers += [dense.provider("torch AdamW(foreach=True)", None, foreach=True)]
        providers += packages(problem)
    cell = {"n": problem.n, "k": problem.k, "dtype": word(dtype)}
    rows = time_rows("masked_adamw_", providers, **cell, rounds=rounds, baseline=BASELINE)
    return rows + [
        value_row("masked_adamw_", name, metric="state", unit="bytes/entry", value=size / problem.n, **cell)
        for name, size in held.items()
    ]


def main() -> None:
    dtypes = {word(dtype): dtype for dtype in MASKED}
    densities = [0.0005, 0.01, 0.05, 0.2, 0.5, 0.75, 1.0]
    args = arguments(__doc__, "masked_adamw.csv", densities, dtypes=tuple(dtypes))
    rows: list[Row] = []
    for dtype in args.dtypes:
        for model in args.models:
            for density in args.densities:
                rows += measure(model, density, dtypes[dtype], args.rounds)
                write_csv(args.out, rows)  # after every case: an interrupted run keeps what it has measured


if __name__ == "__main__":
    main()
