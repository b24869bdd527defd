"""One optimizer step: `MaskedAdamW` against torch.optim.AdamW over all entries and sparse updates made of torch ops.

All providers update the same weights from the same gradients, on the same ticket: a uniformly random one, or one with
the clustering of a real one. Before they are timed, each takes a few steps from fresh moments with changing gradients,
and is compared with AdamW in float64; `MaskedAdamW` also bit by bit with the reference. There are cells of float32 and
of bfloat16 weights, both with 8-bit moments, also of other packages if these are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import clustered
import torch
from harness import (
    MODELS,
    Provider,
    Row,
    WrongResult,
    argument_parser,
    instruction_sets,
    parse,
    time_rows,
    value_row,
    with_isa,
    write_csv,
)
from torch import Size, nn
from updates import FOREACH, FUSED, OPTIONS, SCALES, Dense, Problem, compacted, gathered, masked, packages

import ltp_sparse as ls
from ltp_sparse.testing import random_weights

LINE = 64  # bytes of a cache line
WITH_NORM = "MaskedAdamW, norm and step"
COMPACTED = "MaskedAdamW, compaction and step"
ANY_NORM = 1e9  # the gradients are not clipped, but their norm is computed
CLUSTERED = (0.05, 0.2)  # densities that are also measured with clustered masks, in float32
MASKED: dict[torch.dtype, dict[str, dict[str, Any]]] = {
    torch.float32: {"MaskedAdamW": {}, "MaskedAdamW, 8-bit states": {"states": "8bit"}},
    torch.bfloat16: {
        "MaskedAdamW, master": {},
        "MaskedAdamW, stochastic rounding": {"rounding": "stochastic"},
        "MaskedAdamW, rounding to nearest": {"master": False},
        "MaskedAdamW, stochastic rounding, 8-bit states": {"rounding": "stochastic", "states": "8bit"},
    },
}
"""Dtype of the weights -> name -> options of `MaskedAdamW`."""


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem_of(
    shapes: Mapping[str, Size], density: float, dtype: torch.dtype = torch.float32, masks: str = "uniform"
) -> Problem:
    if masks == "clustered":
        ticket = clustered.ticket(shapes, density)
    else:
        ticket = ls.Ticket.full(shapes) if density == 1 else ls.Ticket.random(shapes, density=density)
    initial = random_weights(ticket.shapes)
    grads = random_weights(ticket.shapes, seed=1, scale=1e-3)
    return Problem(ticket, *({name: t.to(dtype) for name, t in each.items()} for each in (initial, grads)), LINE)


def check_bits(problem: Problem, name: str, options: Mapping[str, Any]) -> None:
    """Compares `MaskedAdamW` with the reference, bit by bit, on the smallest parameters and a medium one."""
    by_size = sorted(problem.params, key=lambda name: problem.params[name].numel())
    names = {*by_size[:12], by_size[len(by_size) // 2]} & {n for n, s in problem.ticket.sets.items() if s.k}
    small, outcomes = problem.ticket.restrict(sorted(names)), []
    for backend in ("reference", "compiled"):
        params = {key: nn.Parameter(problem.initial[key].clone()) for key in sorted(names)}
        ls.use_backend(backend)
        optimizer = ls.MaskedAdamW(params, small, **OPTIONS, **options)
        for scale in SCALES:
            for key, param in params.items():
                param.grad = problem.grads[key] * scale
            optimizer.step()
        outcomes.append(list(params.values()))
    if not all(map(torch.equal, *outcomes)):
        raise WrongResult(f"{name}: the update differs from the reference's")


def under_isas(ours: Provider, isas: list[str]) -> list[Provider]:
    """One provider for each of these instruction sets."""
    return [
        replace(ours, name=f"{ours.name} ({isa})", run=with_isa(isa, ours.run), verify=with_isa(isa, ours.verify))
        for isa in isas
    ]


def of_training(problem: Problem) -> list[Provider]:
    """Steps as in training: with a norm for clipping, and from packed gradients including compaction."""

    def packed(**options: Any) -> Callable[[nn.Module], ls.MaskedAdamW]:
        return lambda model: ls.MaskedAdamW(model, problem.ticket, **OPTIONS, gradients="packed", **options)

    clipped = ls.MaskedAdamW(problem.params, problem.ticket, **OPTIONS, max_grad_norm=ANY_NORM)
    return [
        replace(masked(problem, WITH_NORM, clipped), bytes=None),
        compacted(problem, COMPACTED, packed()),
        compacted(problem, f"{COMPACTED}, with norm", packed(max_grad_norm=ANY_NORM)),
    ]


def measure(model: str, density: float, dtype: torch.dtype, rounds: int, masks: str = "uniform") -> list[Row]:
    problem = problem_of(MODELS[model], density, dtype, masks)
    op = "masked_adamw_" if masks == "uniform" else f"masked_adamw_, {masks} masks"
    print(f"\n{op}: {problem.n:,} {word(dtype)} entries, {100 * density:g} % active", flush=True)
    dense, providers, held = Dense(problem), [], {}
    isas = instruction_sets()
    for name, options in MASKED[dtype].items():
        check_bits(problem, name, options)
        optimizer = ls.MaskedAdamW(problem.params, problem.ticket, **OPTIONS, **options)
        providers += under_isas(masked(problem, name, optimizer), isas if not providers else isas[:1])
        held[name] = optimizer.state_bytes()
    if dtype == torch.float32 and masks == "uniform":
        providers += of_training(problem)
    providers += [dense.fused()]
    held[FUSED] = 2 * problem.width * problem.n
    if density < 1:
        providers += [dense.multiplied(), gathered(problem)]
    if density == 0.2 and masks == "uniform":  # the rest depends on neither
        providers += [dense.provider("torch AdamW()", None, foreach=False)]
        providers += [dense.provider(FOREACH, None, foreach=True)]
        providers += packages(problem)
    cell = {"n": problem.n, "k": problem.k, "dtype": word(dtype)}
    rows = time_rows(op, providers, **cell, rounds=rounds, baseline=FUSED)
    touched = problem.line * problem.lines / (problem.width * problem.n)
    rows.append(value_row(op, "weights", metric="touched cache lines", unit="share", value=touched, **cell))
    return rows + [
        value_row(op, name, metric="state", unit="bytes/entry", value=size / problem.n, **cell)
        for name, size in held.items()
    ]


def main() -> None:
    dtypes = {word(dtype): dtype for dtype in MASKED}
    densities = [0.0005, 0.01, 0.05, 0.2, 0.5, 0.75, 1.0]
    args = parse(argument_parser(__doc__, "masked_adamw.csv", densities, dtypes=tuple(dtypes)))
    cases = [
        (model, density, dtypes[dtype], args.rounds, masks)
        for masks in ("uniform", "clustered")
        for dtype in args.dtypes
        for model in args.models
        for density in args.densities
        if masks == "uniform" or (dtype, density in CLUSTERED) == ("float32", True)
    ]
    rows: list[Row] = []
    for case in cases:
        rows += measure(*case)
        write_csv(args.out, rows)  # after every case, to keep the rows of an interrupted run


if __name__ == "__main__":
    main()
