"""Small sizes under pytest-benchmark, to compare two states of the code: `pytest benchmarks --benchmark-autosave`."""

import pytest

import ltp_sparse as ls
from ltp_sparse.testing import random_weights, tuned_weights, update_problem, xlmr_shapes

SHAPES = xlmr_shapes(layers=2, hidden=128, intermediate=512, vocabulary=5000)
BACKENDS = [name for name in ("reference", "compiled") if ls.available_backends()[name] == "ok"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    ls.use_backend(request.param)
    yield request.param
    ls.use_backend("auto")


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_masked_adamw(benchmark, backend, density):
    problem = update_problem(SHAPES, density=density)
    benchmark(ls.masked_adamw_, *problem.args())


@pytest.mark.parametrize("density", [0.01, 0.2])
def test_topk_delta(benchmark, backend, density):
    initial = random_weights(SHAPES)
    tuned = tuned_weights(initial)
    k = int(density * sum(t.numel() for t in initial.values()))
    sets, _ = benchmark(ls.topk_delta, list(initial.values()), list(tuned.values()), k)
    assert sum(s.k for s in sets) == k


def test_step(benchmark, backend):
    """A whole optimizer step."""
    problem = update_problem(SHAPES, density=0.2)
    weights = dict(zip(problem.ticket.sets, problem.params, strict=True))
    for param, grad in zip(problem.params, problem.grads, strict=True):
        param.requires_grad_().grad = grad
    benchmark(ls.MaskedAdamW(weights, problem.ticket).step)
