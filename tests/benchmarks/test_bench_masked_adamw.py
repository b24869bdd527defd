"""The CPU benchmark of a step: every provider passes its verification, in every precision, and a wrong one does not."""

import csv
import sys

import pytest
import torch

import ltp_sparse as ls
from ltp_sparse.testing import xlmr_shapes

SHAPES = xlmr_shapes(layers=1, hidden=32, intermediate=64, vocabulary=200, positions=20)


@pytest.fixture
def bench(benchmark_module):
    return benchmark_module("bench_masked_adamw")


@pytest.fixture
def updates(bench):
    import updates

    return updates


@pytest.mark.slow
@pytest.mark.parametrize(
    "density, masks",
    [
        (0.2, "uniform"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1.0, "uniform"), (0.2, "clustered"))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_verified_results(bench, monkeypatch, capsys, dtype, density, masks):
    monkeypatch.setitem(bench.MODELS, "smallest", SHAPES)
    monkeypatch.setattr(bench, "packages", lambda problem: [])
    rows = bench.measure("smallest", density, dtype, 1, masks)
    assert {row.op for row in rows} == {"masked_adamw_" if masks == "uniform" else "masked_adamw_, clustered masks"}
    (touched,) = [row.p50 for row in rows if row.metric == "touched cache lines"]
    assert (touched > 0.95) is (masks == "uniform")
    timed = {row.provider for row in rows if row.metric == "time"}
    of_training = (bench.WITH_NORM, bench.COMPACTED) if (dtype, masks) == (torch.float32, "uniform") else ()
    for name in (*bench.MASKED[dtype], *of_training, bench.FUSED, "copy"):
        assert any(provider.startswith(name) for provider in timed)
    assert {row.dtype for row in rows} == {bench.word(dtype)}
    assert {row.provider for row in rows if row.metric == "state"} == {*bench.MASKED[dtype], bench.FUSED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_step_is_refused(bench, updates, dtype):
    problem = bench.problem_of(SHAPES, 0.2, dtype)
    for name, options in bench.MASKED[dtype].items():
        optimizer = ls.MaskedAdamW(problem.params, problem.ticket, **{**bench.OPTIONS, "lr": 2e-3}, **options)
        (wrong,) = bench.under_isas(bench.masked(problem, name, optimizer), bench.instruction_sets()[:1])
        with pytest.raises(bench.WrongResult, match=name):
            wrong.verify()
        touching = torch.optim.AdamW(problem.params.values(), **bench.OPTIONS, fused=True)
        wrong = updates.provider(problem, "all entries", touching.step, touching.state.clear, "only", None)
        with pytest.raises(bench.WrongResult, match="all entries"):
            wrong.verify()


def test_a_package_that_is_missing_is_named(bench, updates, monkeypatch, capsys):
    for name in ("torchao", "bitsandbytes", "flashoptim"):
        monkeypatch.setitem(sys.modules, f"{name}.optim", None)
        monkeypatch.setitem(sys.modules, name, None)
    assert list(bench.packages(bench.problem_of(SHAPES, 0.2))) == []
    printed = capsys.readouterr().out
    assert all(f"skipped: {name} (" in printed for name in updates.PACKAGES)


class Scaled(torch.optim.AdamW):
    """A learning rate a tenth too high: about what 8-bit moments may not excuse."""

    def __init__(self, params, lr, **options):
        super().__init__(params, lr=1.1 * lr, **options)


class WithoutCorrection(torch.optim.AdamW):
    """Takes every step for a late one."""

    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[param] = {"step": torch.tensor(1e6), **zeros}
        super().step()


class Momentum(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay, betas, eps):
        super().__init__(params, lr=lr, momentum=betas[0], weight_decay=weight_decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_package_with_another_algorithm_is_refused(bench, updates, monkeypatch, dtype):
    problem = bench.problem_of(SHAPES, 0.2, dtype)
    makers = {
        kind.__name__: lambda params, kind=kind: kind(params, **updates.OPTIONS)
        for kind in (torch.optim.AdamW, Scaled, WithoutCorrection, Momentum, torch.optim.RAdam)
    }
    monkeypatch.setattr(updates, "PACKAGES", makers)
    right, *others = updates.packages(problem)
    right.verify()
    assert [wrong.name for wrong in others] == [*makers][1:]
    for wrong in others:
        with pytest.raises(
            bench.WrongResult, match=f"{wrong.name}: the weights are off by .* on average, 0.01 allowed"
        ):
            wrong.verify()


def test_torch_in_float16_is_accepted_fused_and_refused_where_its_moments_divide_by_zero(bench, updates):
    """Moments in float16 vanish where the gradient is small; only the fused form survives it."""
    problem = bench.problem_of(SHAPES, 0.2, torch.float16)
    problem.scale_grads(1000)
    dense = updates.Dense(problem)
    for right in (dense.fused(), dense.multiplied(), updates.gathered(problem)):
        right.verify()
    with pytest.raises(bench.WrongResult, match="foreach"):
        dense.provider(updates.FOREACH, None, foreach=True).verify()


@pytest.mark.slow
def test_report_keeps_dtypes_apart(bench, tmp_path):
    import report

    rows = [
        bench.Row(op, provider, dtype, 100, k, metric, unit, ms, ms, ms, None, None, None, 2.0)
        for op, dtype, ms in (
            ("masked_adamw_", "float32", 0.25),
            ("masked_adamw_", "bfloat16", 0.125),
            ("masked_adamw_, clustered masks", "float32", 0.2),
        )
        for provider in ("MaskedAdamW, 8-bit states", bench.FUSED)
        for k in (1, 20)
        for metric, unit in (("time", "ms"), ("state", "bytes/entry"))
    ]
    bench.write_csv(tmp_path / "masked_adamw.csv", rows)
    (tmp_path / "train_step.csv").write_text("stage,setting\nstage 2,ours\n")
    written = report.write(tmp_path).read_text()
    assert "## masked_adamw_: time (ms), 100 float32 entries" in written
    assert "## masked_adamw_: state (bytes/entry), 100 bfloat16 entries" in written
    assert (
        "| optimizer state, MaskedAdamW, 8-bit states, 20 % | 100 | at most 0.560 bytes/entry | 0.250 | met |"
        in written
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "masked_adamw.png", "masked_adamw-bfloat16.png", "masked_adamw-clustered-masks.png"
    }  # fmt: skip
    assert "(masked_adamw-clustered-masks.png)" in written
    assert written.count("| optimizer state, MaskedAdamW, 8-bit") == 1


def test_a_cell_that_is_measured_again_leaves_the_others(bench, tmp_path):
    def row(provider, dtype, k, ms):
        return bench.Row("masked_adamw_", provider, dtype, 100, k, "time", "ms", ms, ms, ms)

    path = tmp_path / "rows.csv"
    bench.write_csv(path, [row("a", "float32", 1, 0.5), row("b", "float32", 1, 0.6), row("a", "bfloat16", 1, 0.7)])
    bench.write_csv(path, [row("c", "float32", 1, 0.8), row("a", "float32", 20, 0.9)])
    with path.open(newline="") as file:
        found = [(line["provider"], line["dtype"], line["k"], line["p50"]) for line in csv.DictReader(file)]
    assert found == [("a", "bfloat16", "1", "0.7"), ("c", "float32", "1", "0.8"), ("a", "float32", "20", "0.9")]
    path.write_text("op,provider\nmasked_adamw_,a\n")  # of another form
    bench.write_csv(path, [row("a", "float32", 1, 0.5)])
    assert len(path.read_text().splitlines()) == 2 and list(tmp_path.iterdir()) == [path]


def test_clustered_tickets_touch_what_a_real_one_touches(bench):
    """On the shapes of mini-xlmr, which gave the measured shares."""
    import clustered

    shapes = xlmr_shapes(layers=4, hidden=192, intermediate=768, vocabulary=23_976, positions=130)
    for density, shares in clustered.MEASURED.items():
        ticket = clustered.ticket(shapes, density)
        assert ticket.k == int(density * ticket.n)
        for entries, dtype, share in zip((8, 16), (torch.int8, torch.int16), shares, strict=True):
            touched = sum(int(s.bitmap().view(dtype).count_nonzero()) for s in ticket.sets.values())
            assert touched * entries / ticket.n == pytest.approx(share, rel=0.15)
    with pytest.raises(ValueError, match="4,803,696 entries requested .*density 0.75.*, .* move"):
        clustered.ticket(shapes, 0.75)


def test_what_other_providers_wrote_is_taken_over_before_a_step_is_timed(bench, monkeypatch):
    """Masters look for weights that changed under them; no training loop changes them between two steps."""
    from harness import Provider, interleaved

    from ltp_sparse.optim import launch

    problem, calls = bench.problem_of(SHAPES, 0.2, torch.bfloat16), []
    optimizer = ls.MaskedAdamW(problem.params, problem.ticket, **bench.OPTIONS)
    ours = bench.masked(problem, "master", optimizer)
    gather, step = launch.gather, ours.run
    monkeypatch.setattr(launch, "gather", lambda *args: calls.append("gather") or gather(*args))
    ours.run = lambda: [calls.append("timed"), step(), calls.append("end")]

    def touch():
        for param in problem.params.values():
            param.detach().mul_(1)

    interleaved([ours, Provider("another", touch, lambda: None)], rounds=2, warmup=0)
    assert "gather" in calls
    assert [after for at, after in zip(calls, calls[1:], strict=False) if at == "timed"] == ["end", "end"]


def test_a_step_from_packed_gradients_that_misses_a_compaction_is_refused(bench, updates, monkeypatch):
    problem = bench.problem_of(SHAPES, 0.2)
    with_norm, compacted, _ = bench.of_training(problem)
    with_norm.verify()
    compacted.verify()
    monkeypatch.setattr(ls.optim.packed_gradients.ops, "masked_pack_", lambda grads, out, table, **_: out.fill_(1.0))
    with pytest.raises(bench.WrongResult, match="compaction and step"):
        compacted.verify()
