"""The CPU benchmark of a step: every provider passes its verification, in every precision, and a wrong one does not."""

import sys
from pathlib import Path

import pytest
import torch

import ltp_sparse as ls
from ltp_sparse.testing import xlmr_shapes

SHAPES = xlmr_shapes(layers=1, hidden=32, intermediate=64, vocabulary=200, positions=20)


@pytest.fixture
def bench(monkeypatch):
    if (reason := ls.available_backends()["compiled"]) != "ok":
        pytest.skip(reason)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import bench_masked_adamw

    ls.use_backend("compiled")
    yield bench_masked_adamw
    ls.use_backend(None)


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_verified_results(bench, monkeypatch, capsys, dtype, density):
    monkeypatch.setitem(bench.MODELS, "smallest", SHAPES)
    monkeypatch.setattr(bench, "packages", lambda problem: [])
    rows = bench.measure("smallest", density, dtype, rounds=1)
    timed = {row.provider for row in rows if row.metric == "time"}
    for name in (*bench.MASKED[dtype], bench.BASELINE, "copy"):
        assert any(provider.startswith(name) for provider in timed)
    assert {row.dtype for row in rows} == {bench.word(dtype)}
    assert {row.provider for row in rows if row.metric == "state"} == {*bench.MASKED[dtype], bench.BASELINE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_step_is_refused(bench, dtype):
    problem = bench.Problem(SHAPES, 0.2, dtype)
    for name, options in bench.MASKED[dtype].items():
        optimizer = ls.MaskedAdamW(problem.params, problem.ticket, **{**bench.OPTIONS, "lr": 2e-3}, **options)
        (wrong,) = bench.masked(problem, name, optimizer, bench.instruction_sets()[:1])
        with pytest.raises(bench.WrongResult, match=name):
            wrong.verify()
        touching = torch.optim.AdamW(problem.params.values(), **bench.OPTIONS, fused=True)
        wrong = bench.provider(problem, "all entries", touching.step, touching.state.clear, "only", None)
        with pytest.raises(bench.WrongResult, match="all entries"):
            wrong.verify()


def test_a_package_that_is_missing_is_named(bench, monkeypatch, capsys):
    for name in ("torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, f"{name}.optim", None)
        monkeypatch.setitem(sys.modules, name, None)
    assert list(bench.packages(bench.Problem(SHAPES, 0.2))) == []
    printed = capsys.readouterr().out
    assert "skipped: torchao AdamW8bit" in printed and "skipped: bitsandbytes AdamW8bit" in printed


def test_report_keeps_dtypes_apart(bench, tmp_path):
    import report

    rows = [
        bench.Row("masked_adamw_", provider, dtype, 100, k, metric, unit, ms, ms, ms, None, None, None, 2.0)
        for dtype, ms in (("float32", 0.25), ("bfloat16", 0.125))
        for provider in ("MaskedAdamW, 8-bit states", bench.BASELINE)
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
    assert {path.name for path in tmp_path.glob("*.png")} == {"masked_adamw.png", "masked_adamw-bfloat16.png"}
