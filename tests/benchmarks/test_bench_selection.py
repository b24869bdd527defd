"""The CPU benchmarks of the selection: every result is verified before it is timed, and a wrong one is refused."""

import pytest
import torch

from ltp_sparse.testing import xlmr_shapes
from ltp_sparse.tickets.index_set import IndexSet

SHAPES = xlmr_shapes(layers=1, hidden=32, intermediate=64, vocabulary=200, positions=20)


@pytest.fixture
def bench(benchmark_module, monkeypatch):
    """Imports a module of benchmarks/, which then knows a model of the name "smallest"."""
    harness = benchmark_module("harness")
    monkeypatch.setitem(harness.MODELS, "smallest", SHAPES)
    monkeypatch.setattr(harness, "EVICTED", 4096)  # no figure is looked at here
    return benchmark_module


@pytest.mark.parametrize("density", [0.2, 0.95])
@pytest.mark.parametrize("deltas", ["normal", "heavy", "untouched"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selection_rows(bench, dtype, deltas, density):
    topk = bench("bench_topk_delta")
    rows = topk.measure(topk.Cell("smallest", density, dtype, deltas), rounds=1)
    assert {(row.op, row.dtype) for row in rows} == {(topk.OPS[deltas], dtype)}
    timed = [row for row in rows if row.metric == "time"]
    assert any(row.provider == topk.BASELINE for row in timed)
    assert any(row.provider == topk.LT_SFT for row in timed) is ((density, dtype, deltas) == topk.LT_SFT_AT)
    ours = next(row for row in timed if row.provider.startswith("topk_delta, sampled"))
    assert ours.bytes == (8 * ours.n + ours.n // 8 if dtype == "float32" else None)


def test_deltas_are_what_they_are_called(bench):
    topk = bench("bench_topk_delta")
    kurtosis, still = {}, {}
    for deltas in topk.OPS:
        found = topk.Problem(topk.Cell("smallest", 0.2, "float32", deltas)).deltas().double()
        moved = found[found > 0]
        kurtosis[deltas] = (moved**4).mean() / (moved**2).mean() ** 2
        still[deltas] = (found == 0).double().mean()
    assert abs(kurtosis["normal"] - 3) < 0.5
    assert kurtosis["heavy"] > 10
    assert still["untouched"] > 0.3 > 0.01 > still["normal"]


def test_a_wrong_selection_is_refused(bench):
    topk = bench("bench_topk_delta")
    problem = topk.Problem(topk.Cell("smallest", 0.2, "bfloat16", "normal"))
    right = topk.ours(problem, "histogram")()
    problem.check_sets("right", right)
    mask = right[0].mask()
    first, other = mask.nonzero()[0], (~mask).nonzero()[0]
    mask[first], mask[other] = False, True
    with pytest.raises(topk.WrongResult, match="wrong: tensor 0 has other entries"):
        problem.check_sets("wrong", [IndexSet.from_mask(mask), *right[1:]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streaming_rows(bench, tmp_path, dtype):
    streaming = bench("bench_streaming")
    rows = streaming.measure("smallest", dtype, 0.2, 1, tmp_path)
    by_provider = {row.provider: row for row in rows if row.metric == "time"}
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    (readings,) = [row.p50 for row in rows if row.metric == "readings"]
    assert readings >= 1
    assert by_provider[streaming.PASSES_ALONE].bytes == readings * files
    assert by_provider[streaming.BAND].bytes == by_provider[streaming.ONE_READER].bytes == files
    assert by_provider["select"].bytes == readings * files
    (memory,) = [row for row in rows if row.metric == "memory beside the ticket"]
    assert memory.unit == "MB"


def test_a_ticket_that_differs_from_the_one_in_memory_is_refused(bench, tmp_path, monkeypatch):
    streaming = bench("bench_streaming")
    other = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    monkeypatch.setattr(streaming, "random_weights", lambda shapes: other)
    real, calls = streaming.tuned_weights, []

    def drifting(weights):
        calls.append(None)
        return real(weights, seed=len(calls))

    monkeypatch.setattr(streaming, "tuned_weights", drifting)
    with pytest.raises(streaming.WrongResult, match="another ticket than from the same weights in memory"):
        streaming.measure("smallest", "float32", 0.2, 1, tmp_path)
