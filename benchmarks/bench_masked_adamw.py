"""One optimizer step: `MaskedAdamW` against torch.optim.AdamW over all entries and sparse updates made of torch ops.

All providers update the same weights from the same gradients, on the same uniformly random ticket. Before they are
timed, each takes a few steps from fresh moments, with gradients that change, and is compared with AdamW in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

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
TOLERANCE = 4e-6  # of max(|p|, steps * lr), as promised in DESIGN.md, contract 4
CHUNK = 1 << 22
LINE = 16  # float32 entries of a cache line of 64 bytes


class Problem:
    """Weights, gradients and a ticket; every provider works on these very weights."""

    def __init__(self, shapes: Mapping[str, Size], density: float) -> None:
        self.ticket = ls.Ticket.full(shapes) if density == 1 else ls.Ticket.random(shapes, density=density)
        self.initial = random_weights(self.ticket.shapes)
        self.grads = random_weights(self.ticket.shapes, seed=1, scale=1e-3)
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
        """Cache lines that hold an active entry."""
        return sum(
            -(-s.n // LINE) if s.k == s.n else int(s.bitmap().view(torch.int16).count_nonzero())
            for s in self.ticket.sets.values()
        )

    def check(self, name: str, active: str) -> None:
        """Compares the weights with the expected ones after `take_steps`.

        active: "all": every entry was to be updated; "ticket": the ticket's, and the others are not looked at;
            "only": the ticket's, and the others must have kept their bits.
        """
        for parameter, param in self.params.items():
            mask = self.ticket.mask(parameter).view(-1) if active != "all" else None
            flats = param.detach().view(-1), self.initial[parameter].view(-1), self.grads[parameter].view(-1)
            for start in range(0, param.numel(), CHUNK):
                found, before, grad = (flat[start : start + CHUNK] for flat in flats)
                expected = adamw(before.double(), grad.double())
                error = (found - expected).abs() > TOLERANCE * expected.abs().clamp(min=len(SCALES) * LR)
                if mask is not None:
                    chosen = mask[start : start + CHUNK]
                    error &= chosen
                    if active == "only":
                        error |= ~chosen & (found.view(torch.int32) != before.view(torch.int32))
                if bool(error.any()):
                    at = start + int(error.nonzero()[0])
                    raise WrongResult(f"{name}: {parameter} differs from the expected update, first at entry {at}")


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
) -> Provider:
    """A provider that is verified from fresh moments and the initial weights; `active` as in `Problem.check`."""

    def verify() -> None:
        reset()
        problem.take_steps(step)
        problem.check(name, active)

    return Provider(name, step, verify, traffic)


def masked(problem: Problem, optimizer: ls.MaskedAdamW) -> list[Provider]:
    """Ours, under every instruction set; the state is shared."""

    def reset() -> None:
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    # touched lines of p read and written and of g read; moments read and written; index read
    traffic = 3 * 4 * LINE * problem.lines() + 8 * problem.k + optimizer.state_bytes()
    return [
        provider(problem, f"MaskedAdamW ({isa})", with_isa(isa, optimizer.step), reset, "only", traffic)
        for isa in instruction_sets()
    ]


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

        return provider(problem, "grad.mul_(mask) + fused", step, self.reset, "ticket", 37 * problem.n)


def gathered(problem: Problem) -> Provider:
    """The active entries are gathered into compact tensors, updated there, and copied back."""
    names = [name for name, index_set in problem.ticket.sets.items() if index_set.k]
    indices = {name: problem.ticket.indices(name) for name in names}
    flat = {name: problem.params[name].detach().view(-1) for name in names}
    grads = {name: problem.grads[name].view(-1) for name in names}
    compact = {name: nn.Parameter(torch.empty(len(indices[name]))) for name in names}
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
    traffic = 64 * problem.k + 4 * 4 * LINE * problem.lines()
    return provider(problem, "index_select + fused + index_copy_", step, optimizer.state.clear, "only", traffic)


def measure(model: str, density: float, rounds: int) -> list[Row]:
    problem = Problem(MODELS[model], density)
    print(f"\nmasked_adamw_: {problem.n:,} entries, {100 * density:g} % active", flush=True)
    ours, dense = ls.MaskedAdamW(problem.params, problem.ticket, **OPTIONS), Dense(problem)
    providers = [*masked(problem, ours), dense.provider(BASELINE, 28 * problem.n, fused=True)]
    if density < 1:
        providers += [dense.multiplied(), gathered(problem)]
    if density == 0.2:  # all that is left does not depend on the density
        providers += [dense.provider("torch AdamW()", None, foreach=False)]
        providers += [dense.provider("torch AdamW(foreach=True)", None, foreach=True)]
    rows = time_rows("masked_adamw_", providers, n=problem.n, k=problem.k, rounds=rounds, baseline=BASELINE)
    held = {"MaskedAdamW": ours.state_bytes(), BASELINE: 8 * problem.n}
    return rows + [
        value_row("masked_adamw_", name, problem.n, problem.k, "state", "bytes/entry", size / problem.n)
        for name, size in held.items()
    ]


def main() -> None:
    args = arguments(__doc__, "masked_adamw.csv", [0.0005, 0.01, 0.05, 0.2, 0.5, 0.75, 1.0])
    rows: list[Row] = []
    for model in args.models:
        for density in args.densities:
            rows += measure(model, density, args.rounds)
            write_csv(args.out, rows)  # after every case: an interrupted run keeps what it has measured


if __name__ == "__main__":
    main()
