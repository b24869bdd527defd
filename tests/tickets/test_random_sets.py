"""Random index sets: exactly k, every set equally likely, the same for a seed whatever the threads."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers.backends import threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Size

import ltp_sparse as ls
from ltp_sparse.tickets import random_sets
from ltp_sparse.tickets.bits import TILE


def draw(sizes, **kwargs):
    sets = random_sets.random_sets(
        {str(i): Size([n]) for i, n in enumerate(sizes)}, **{"density": None, "k": None, "seed": 0, **kwargs}
    )
    return [index_set.indices().tolist() for index_set in sets.values()]


@given(
    st.lists(st.sampled_from((0, 1, 31, 32, 63, 64, 65, 1000, TILE + 5)), min_size=1, max_size=4),
    st.fractions(0, 1),
    st.integers(0, 5),
)
def test_exactly_k_of_any_sizes(sizes, share, seed):
    k = int(share * sum(sizes))
    entries = draw(sizes, k=k, seed=seed)
    assert sum(map(len, entries)) == k
    assert all(i < n for found, n in zip(entries, sizes, strict=True) for i in found)


@pytest.mark.slow
@pytest.mark.parametrize("deviations", [-1, 0, 6], ids="{}-deviations".format)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_every_set_is_equally_likely(k, deviations, monkeypatch):
    """By coins that fall too often and are tossed again, by coins and draws, by draws alone; across tensors."""
    monkeypatch.setattr(random_sets, "_DEVIATIONS", deviations)
    trials = 1500
    found = Counter()
    for seed in range(trials):
        a, b = draw([2, 4], k=k, seed=seed)
        found[tuple(a + [2 + i for i in b])] += 1
    sets = list(itertools.combinations(range(6), k))
    expected = trials / len(sets)
    squares = sum((found[s] - expected) ** 2 / expected for s in sets)
    freedom = len(sets) - 1
    assert sum(found.values()) == trials == sum(found[s] for s in sets)
    assert squares < freedom + 4.5 * math.sqrt(2 * freedom) + 4, squares


@pytest.mark.slow
def test_counts_per_parameter_are_hypergeometric():
    """Mean and variance of what falls into one of two parameters."""
    a, b, k, trials = 3000, 7000, 2000, 400
    counts = torch.tensor([len(draw([a, b], k=k, seed=seed)[0]) for seed in range(trials)]).double()
    n = a + b
    variance = k * (a / n) * (b / n) * (n - k) / (n - 1)
    assert abs(counts.mean() - k * a / n) < 4 * math.sqrt(variance / trials)
    assert abs(counts.var() / variance - 1) < 4 * math.sqrt(2 / trials)


def test_places_inside_a_tile_and_across_tiles_are_even():
    n = 40 * TILE
    (entries,) = draw([n], k=n // 5)
    for parts in (40, 64):
        at = torch.tensor(entries) // TILE if parts == 40 else torch.tensor(entries) % parts
        counts = torch.bincount(at, minlength=parts).double()
        deviation = math.sqrt(n / parts * 0.2 * 0.8)
        assert bool(((counts - n / parts / 5).abs() < 4.5 * deviation).all())


def test_same_on_any_number_of_threads():
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(ls.Ticket.random({"a": [3 * TILE + 1], "b": [500]}, density=0.3, seed=9).digest())
    assert found[0] == found[1]


def test_unrelated_to_weights_of_the_same_seed():
    weights = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    mask = ls.Ticket.random({"a": [100_000]}, density=0.3, seed=0).mask("a").float()
    correlation = torch.corrcoef(torch.stack([weights, mask]))[0, 1]
    assert abs(correlation) < 4.5 / math.sqrt(100_000)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    ls.Ticket.random({"a": [5000]}, density=0.3)
    assert torch.equal(before, torch.get_rng_state())
