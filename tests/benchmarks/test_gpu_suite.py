"""`make gpu` without a GPU: the same suite on the CPU, on a tiny model."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ltp_sparse import backends
from ltp_sparse.backends import compiled

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_suite_measures_and_goes_on_where_it_stopped(tmp_path):
    if not hasattr(compiled.extension(), "isa"):
        pytest.skip(str(compiled.extension()))
    command = [sys.executable, "benchmarks/gpu/run.py", "--device", "cpu", "--folder", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stdout + runs[0].stderr
    assert "MaskedAdamW (compiled)" in runs[0].stdout and "MaskedAdamW" not in runs[1].stdout
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert (
        facts["torch"]
        and facts["bitsandbytes"]
        and facts["CUB"]
        and {"commit", "clocks_before", "clocks_after"} <= {*facts}
    )
    with (tmp_path / "masked_adamw.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["provider"].startswith("MaskedAdamW")]
    assert {row["precision"] for row in ours} == {"float32", "bfloat16", "bfloat16-8bit", "float16"}
    sectors = {(row["masks"], row["density"], row["precision"]): float(row["touched_sectors"]) for row in ours}
    assert sectors["clustered", "0.2", "float32"] < 0.7 * sectors["uniform", "0.2", "float32"]
    assert {(row["mode"], row["gradients"]) for row in ours} == {
        ("graph", "static"), ("eager", "static"), ("eager", "fresh")
    }  # fmt: skip
    refused = [row for row in rows if row["verified"] != "True"]
    assert {(row["provider"], row["precision"]) for row in refused} == {("torch AdamW(foreach=True)", "float16")}
    assert all(row["verified"] == "False" and not row["p50_ms"] and not row["ratio_to_fused"] for row in refused)
    assert "torch AdamW(foreach=True): " in runs[0].stdout and "; nothing is timed" in runs[0].stdout
    assert {"grad.mul_(mask) + fused", "index_select + fused + index_copy_"} < {row["provider"] for row in rows}
    assert all(row["mode"] and row["gradients"] for row in rows)
    assert all(float(row["host_ms"]) > 0 and float(row["ratio_to_fused"]) > 0 for row in rows if row not in refused)
    assert all(0 < float(row["touched_sectors"]) <= 1 for row in rows)
    assert all(float(row["p50_ms"]) > 0 for row in ours)
    with (tmp_path / "topk_delta.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["dtype"], row["deltas"]) for row in rows} == {("float32", "normal"), ("bfloat16", "untouched")}
    assert all(row["verified"] == "True" and float(row["gbps"]) > 0 and float(row["share_of_copy"]) > 0 for row in rows)
    ours = [row for row in rows if row["provider"].startswith("topk_delta")]
    assert {row["provider"] for row in ours} == {f"topk_delta, {route} (compiled)" for route in ("sample", "histogram")}
    assert all(float(row[f"ratio_to_{peer}"]) > 0 for row in ours for peer in ("topk", "topk_sorted", "sort"))
    assert all(bool(row["ratio_to_kthvalue"]) == (row["density"] == "0.2") for row in ours)
    assert "topk_delta, sample" not in runs[1].stdout
    report = (tmp_path / "report.md").read_text()
    assert "| MaskedAdamW (compiled) |" in report and "| topk_delta, sample (compiled) |" in report
    choice = json.loads((tmp_path / "backend_choice.json").read_text())["cpu"]
    assert choice["measured"] and {row[0] for row in choice["rows"]} == set(backends.OPERATIONS)
    assert len(list(tmp_path.iterdir())) <= 8
    with zipfile.ZipFile(tmp_path / "rest.zip") as archive:
        assert len([name for name in archive.namelist() if name.startswith("log-")]) == 2, "of both runs"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "benchmarks" / "gpu" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(folder):
    """A results folder as the suite leaves it before its report."""
    facts = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "time": "2026-01-01"}
    peers = {"bitsandbytes": "0.49", "torchao": "skipped: not installed", "flashoptim": "skipped: not installed"}
    peers["CUB"] = "3.5.0"
    (folder / "environment.json").write_text(json.dumps(facts | peers))
    updates = [
        "model,n,density,precision,masks,provider,mode,gradients,p50_ms,host_ms,touched_sectors,gbps,share_of_copy,ratio_to_fused,"
        "state_bytes_per_entry,verified"
    ]
    for cell in (f"{name},{n},{density}" for name, n in (("small", 100), ("base", 200)) for density in (0.01, 0.2)):
        updates.append(f"{cell},float32,uniform,torch AdamW(fused=True),graph,static,2.0,0.01,0.83,4000,0.9,1,,True")
        updates.append(f"{cell},float32,clustered,MaskedAdamW (triton),eager,fresh,0.5,0.1,0.83,,,4,,True")
        updates.append(f"{cell},bfloat16,uniform,MaskedAdamW (triton),graph,static,0.25,0.1,0.97,3000,0.7,2,0.5,True")
    (folder / "masked_adamw.csv").write_text("\n".join(updates))
    selections = [
        "model,n,density,dtype,deltas,provider,p50_ms,gbps,share_of_copy,temporary_bytes_per_entry,ratio_to_topk,"
        "ratio_to_cub_flat,verified",
        'base,100,0.2,float32,normal,"topk_delta, sample (triton)",0.75,3000,0.7,0.2,8,2.5,True',
        "base,100,0.2,float32,normal,sub + abs + cat + sort,,,,,,,False",
    ]
    (folder / "topk_delta.csv").write_text("\n".join(selections))
    (folder / "log.txt").write_text("said")
    (folder / "train_step.csv").write_text("stage")


def test_report_has_tables_plots_and_an_archive_of_the_rest(report, tmp_path):
    pytest.importorskip("matplotlib")
    made_up(tmp_path)
    report.write(tmp_path)
    report.pack(tmp_path)
    text = (tmp_path / "report.md").read_text()
    row = "| 100 | 0.2 | float32 | clustered | MaskedAdamW (triton) | eager | fresh | 0.5000 | 0.1000 | 83 % |  |  |"
    assert f"{row} 4.00x |" in text
    assert "| selection, float32, 20 %: sampled bracket | at most 0.75 ms | 0.75 ms | yes |" in text
    assert text.strip().splitlines()[-1] == "| selection, 7B, bfloat16, 20 % | at most 20 ms | not measured | |"
    assert (
        "| 100 | 0.2 | float32 | normal | topk_delta, sample (triton) | 0.7500 | 3000 | 70 % | 8.00x | 2.50x |" in text
    )
    assert "| 100 | 0.2 | float32 | normal | sub + abs + cat + sort | differs from the reference: no figures |" in text
    assert "bitsandbytes 0.49, torchao skipped: not installed" in text and "CUB 3.5.0" in text and "commit abc" in text
    assert "![masked_adamw](masked_adamw.png)" in text and "![topk_delta](topk_delta.png)" in text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*report.KEPT} - {"backend_choice.json"} and len(report.KEPT) <= 8
    with zipfile.ZipFile(tmp_path / "rest.zip") as archive:
        log, steps = sorted(archive.namelist())
        assert log.startswith("log-") and steps.startswith("train_step-") and archive.read(log) == b"said"


def test_without_matplotlib_the_report_names_the_command_for_the_plots(report, tmp_path, monkeypatch, capsys):
    made_up(tmp_path)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    report.write(tmp_path)
    command = f"python benchmarks/gpu/report.py {tmp_path}"
    text = (tmp_path / "report.md").read_text()
    assert f"`{command}` makes it where matplotlib is installed" in text and "MaskedAdamW (triton)" in text
    assert f"{command} makes it" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu/run.py", "--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "torch sees no CUDA device" in run.stderr


@pytest.mark.slow
def test_its_tests_do_without_what_a_gpu_machine_may_lack():
    """They are collected, and skip here, where neither hypothesis nor the packages of training can be imported."""
    code = (
        "import sys, pytest\n"
        "for name in ('hypothesis', 'datasets', 'accelerate', 'matplotlib', 'yaml'): sys.modules[name] = None\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-o', 'addopts=-ra', '-k', 'gpu',"
        " 'tests/backends/test_gpu.py', 'tests/optim/test_pull.py']))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "skipped" in run.stdout or "passed" in run.stdout


def test_a_wrong_peer_has_no_figures_and_a_wrong_step_of_ours_ends_the_run(monkeypatch, capsys):
    import torch

    import ltp_sparse as ls

    if (reason := ls.available_backends()["compiled"]) != "ok":
        pytest.skip(reason)
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    import measure
    import updates

    def peers(problem):
        dense = updates.Dense(problem)
        yield dense.fused()
        wrong = torch.optim.AdamW(problem.params.values(), **{**updates.OPTIONS, "betas": (0.9, 0.99)})
        yield updates.provider(problem, "wrong", wrong.step, wrong.state.clear, "all", None)

    monkeypatch.setattr(measure, "peers", peers)
    cell, bench = measure.Cell("tiny", 0.2, "uniform", "float32"), measure.Bench(torch.device("cpu"), 2)
    rows = measure.measure(cell, bench, ["compiled"])
    assert {row["provider"]: row["verified"] for row in rows} == {
        "copy": True, "MaskedAdamW (compiled)": True, updates.FUSED: True, "wrong": False
    }  # fmt: skip
    assert [row.get("p50_ms") for row in rows if row["provider"] == "wrong"] == [None]
    assert "wrong: roberta.embeddings.position_embeddings.weight differs" in capsys.readouterr().out
    monkeypatch.setattr(measure.Problem, "check_bits", lambda *_: None)
    monkeypatch.setattr(
        measure.Problem,
        "optimizer",
        lambda self, _: ls.MaskedAdamW(self.params, self.ticket, **{**updates.OPTIONS, "eps": 1e-6}),
    )
    with pytest.raises(measure.WrongResult, match="MaskedAdamW"):
        measure.measure(cell, bench, ["compiled"])
    ls.use_backend(None)


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    import targets

    return targets


def lines_of(targets, results):
    """What -> (measured, met) of every line of the table."""
    found = {}
    for line in targets.table({"masked_adamw": [], "topk_delta": [], **results}).splitlines()[2:]:
        what, _, measured, met = (cell.strip() for cell in line.split("|")[1:-1])
        found[what] = (measured, met)
    return found


def step_row(provider, p50, mode="graph", density="0.2", precision="float32", **more):
    row = {"provider": provider, "p50_ms": str(p50), "mode": mode, "density": density, "precision": precision}
    common = {"model": "base", "masks": "uniform", "share_of_copy": "", "state_bytes_per_entry": "", "verified": "True"}
    return {**row, **common, **more}


def test_targets_without_rows_are_not_measured(targets):
    found = lines_of(targets, {})
    assert len(found) == len(targets.TARGETS) == 19 and set(found.values()) == {("not measured", "")}


def test_targets_are_met_or_not_by_the_fastest_backend(targets):
    ours = {"share_of_copy": "0.9", "state_bytes_per_entry": "1.757"}
    steps = [
        step_row("MaskedAdamW (triton)", 1.25, share_of_copy="0.7", state_bytes_per_entry="1.757"),
        step_row("MaskedAdamW (compiled)", 1.0, **ours),
        step_row("MaskedAdamW (compiled)", 0.5, mode="eager", **ours),
        step_row("MaskedAdamW (compiled)", 0.1, masks="clustered", **ours),
        step_row("MaskedAdamW (compiled)", 0.1, model="large", **ours),
        step_row(targets.FUSED, 2.0),
        step_row(targets.FUSED, 1.0, mode="eager"),
        step_row(targets.MULTIPLIED, 2.4),
        {**step_row(targets.GATHERED, ""), "verified": "False"},
        step_row("MaskedAdamW (triton)", 0.5, density="0.05"),
        step_row(targets.FUSED, 2.0, density="0.05"),
    ]
    found = lines_of(targets, {"masked_adamw": steps})
    assert found[f"step, float32, 20 %: against {targets.FUSED}"] == ("2x", "yes")
    assert found[f"step, float32, 20 %: against {targets.MULTIPLIED}"] == ("2.4x", "**no**")
    assert found[f"step, float32, 20 %: against {targets.GATHERED}"] == ("not measured", "")
    assert found[f"step, float32, 5 %: against {targets.FUSED}"] == ("4x", "**no**")
    assert found["step, float32, 20 %: share of a copy's bandwidth"] == ("0.9", "yes")
    assert found["state, float32, 20 %"] == ("1.757 bytes/entry", "yes")


@pytest.mark.parametrize("installed", [True, False])
def test_the_target_of_8_bit_states_falls_back_to_a_floor(targets, installed):
    cell = {"precision": "bfloat16-8bit", "state_bytes_per_entry": "0.6"}
    steps = [step_row("MaskedAdamW (compiled)", 0.5, **cell)]
    if installed:
        steps.append(step_row(targets.FLASH, 1.0, mode="eager", **cell))
    found = lines_of(targets, {"masked_adamw": steps})
    against = f"step, bfloat16, 8-bit states, 20 %: against {targets.FLASH}, or 0.79 ms without it"
    assert found[against] == (("2x", "yes") if installed else ("1.58x", "yes"))
    assert found["state, 8-bit, 20 %"] == ("0.6 bytes/entry", "**no**")


def test_targets_of_the_selection(targets):
    def row(provider, p50, temporary="0.2", **more):
        cell = {"model": "base", "density": "0.2", "dtype": "float32", "deltas": "normal", "verified": "True"}
        return {**cell, "provider": provider, "p50_ms": str(p50), "temporary_bytes_per_entry": temporary, **more}

    selections = [
        row("topk_delta, sample (triton)", 0.8), row("topk_delta, sample (compiled)", 0.7),
        row("topk_delta, histogram (compiled)", 1.4, "0.3"), row("pass: delta_band (compiled)", 0.1, ""),
        row("topk_delta, sample (compiled)", 0.1, deltas="untouched"), row(targets.TOPK, 7.0), row(targets.CUB, 1.05),
        row("topk_delta, sample (compiled)", 19.0, model="7b", dtype="bfloat16"),
    ]  # fmt: skip
    found = lines_of(targets, {"topk_delta": selections})
    assert found["selection, float32, 20 %: sampled bracket"] == ("0.7 ms", "yes")
    assert found["selection, float32, 20 %: histogram"] == ("1.4 ms", "**no**")
    assert found[f"selection, float32, 20 %: against {targets.TOPK}"] == ("10x", "yes")
    assert found[f"selection, float32, 20 %: against {targets.CUB}"] == ("1.5x", "**no**")
    assert found["selection, float32, 20 %: temporary memory"] == ("0.3 bytes/entry", "**no**")
    assert found["selection, 7B, bfloat16, 20 %"] == ("19 ms", "yes")


def test_targets_name_what_is_measured(targets):
    import measure
    import measure_topk_delta
    import updates

    assert (targets.FUSED, targets.MULTIPLIED, targets.GATHERED) == measure.CAPTURED
    assert targets.FLASH in updates.PACKAGES
    assert (targets.TOPK, targets.KTHVALUE, targets.CUB) == tuple(
        measure_topk_delta.PEERS[key] for key in ("topk", "kthvalue", "cub_flat")
    )
    assert {"bfloat16", "bfloat16-8bit", "float32"} <= {*measure.PRECISIONS}
