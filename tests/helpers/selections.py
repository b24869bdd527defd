"""Random selections, the routes that compute them, and their results by a stable sort."""

from __future__ import annotations

import numpy as np
import torch

from helpers.bits import DTYPES

ROUTES = ("sample", "histogram")

SMALL_ROUTES = {
    "SAMPLES": 200, "_SAMPLE_SHARE": 2, "SAMPLE_FROM": 1, "_SPARE_CANDIDATES": 40, "_PIECE": 64, "_HISTOGRAMS": 1 << 16,
}  # fmt: skip
"""Constants of the routes: with these values, all routes and pieces occur at a few hundred entries."""

DELTAS = {
    "normal": lambda n, g: torch.randn(n, generator=g) * 1e-3,
    "levels": lambda n, g: torch.randint(0, 4, (n,), generator=g) * 2.0**-7,
    "mostly-zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.3),
    "constant": lambda n, g: torch.full((n,), -0.5),
    "denormal": lambda n, g: torch.randint(-40, 41, (n,), generator=g) * 2.0**-149,
    "wide": lambda n, g: torch.randn(n, generator=g) * 10.0 ** torch.randint(-38, 38, (n,), generator=g),
}


def random_case(seed: int):
    """(initial, tuned, ks, groups): tensors of awkward sizes, mixed dtypes and deltas, up to three budgets."""
    g = torch.Generator().manual_seed(seed)

    def pick(options):
        return list(options)[int(torch.randint(len(options), (1,), generator=g))]

    initial, tuned = [], []
    for _ in range(int(torch.randint(1, 7, (1,), generator=g))):
        n = pick((0, 1, 31, 63, 64, 65, 500, 1000))
        kind = pick(DELTAS)
        base = torch.zeros(n) if kind in ("denormal", "wide") else torch.randn(n, generator=g) * 0.05
        initial.append(base.to(pick(DTYPES.values()) if kind != "wide" else torch.float32))
        after = initial[-1].float() + DELTAS[kind](n, g)
        tuned.append(after.to(pick(DTYPES.values()) if kind != "wide" else torch.float32))
    count = pick((1, 1, 2, 3))
    groups = [int(torch.randint(count, (1,), generator=g)) for _ in tuned]
    pools = [sum(t.numel() for t, at in zip(tuned, groups, strict=True) if at == group) for group in range(count)]
    ks = [pick((0, n, min(1, n), n // 5, int(torch.randint(n + 1, (1,), generator=g)))) for n in pools]
    return initial if seed % 5 else [], tuned, ks, groups


def naive(initial, tuned, ks, groups=None) -> list[list[int]]:
    """Selected entries of each tensor, by a stable sort of float32 deltas in numpy, without keys."""
    groups = groups or [0] * len(tuned)
    after = [t.float().reshape(-1).numpy() for t in tuned]
    before = [t.float().reshape(-1).numpy() for t in initial] or [np.zeros_like(a) for a in after]
    chosen: list[list[int]] = [[] for _ in tuned]
    for group, k in enumerate(ks):
        mine = [i for i, g in enumerate(groups) if g == group]
        deltas = np.concatenate([np.empty(0, np.float32), *(np.abs(after[i] - before[i]) for i in mine)])
        owner = np.concatenate([np.empty(0, int), *(np.full(after[i].size, i) for i in mine)])
        place = np.concatenate([np.empty(0, int), *(np.arange(after[i].size) for i in mine)])
        order = np.argsort(-deltas, kind="stable")
        for at in order[deltas[order] > 0][:k]:
            chosen[owner[at]].append(int(place[at]))
    return [sorted(entries) for entries in chosen]
