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

ROOT = Path(__file__).parents[1]


def test_the_suite_measures_and_goes_on_where_it_stopped(tmp_path):
    if not hasattr(backends._extension(), "isa"):
        pytest.skip(str(backends._extension()))
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
def report():
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
        "n,density,precision,masks,provider,mode,gradients,p50_ms,host_ms,touched_sectors,gbps,share_of_copy,ratio_to_fused,"
        "verified"
    ]
    for cell in (f"{n},{density}" for n in (100, 200) for density in (0.01, 0.2)):
        updates.append(f"{cell},float32,uniform,torch AdamW(fused=True),graph,static,2.0,0.01,0.83,4000,0.9,1,True")
        updates.append(f"{cell},float32,clustered,MaskedAdamW (triton),eager,fresh,0.5,0.1,0.83,,,4,True")
        updates.append(f"{cell},bfloat16,uniform,MaskedAdamW (triton),graph,static,0.25,0.1,0.97,3000,0.7,2,True")
    (folder / "masked_adamw.csv").write_text("\n".join(updates))
    selections = ["n,density,dtype,deltas,provider,p50_ms,gbps,share_of_copy,ratio_to_topk,ratio_to_cub_flat,verified"]
    selections.append('100,0.2,float32,normal,"topk_delta, sample (triton)",0.75,3000,0.7,8,2.5,True')
    selections.append("100,0.2,float32,normal,sub + abs + cat + sort,,,,,,False")
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


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu/run.py", "--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "torch sees no CUDA device" in run.stderr


def test_its_tests_do_without_what_a_gpu_machine_may_lack():
    """They are collected, and skip here, where neither hypothesis nor the packages of training can be imported."""
    code = (
        "import sys, pytest\n"
        "for name in ('hypothesis', 'datasets', 'accelerate', 'matplotlib', 'yaml'): sys.modules[name] = None\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-o', 'addopts=-ra', '-k', 'gpu',"
        " 'tests/test_gpu.py', 'tests/test_pull.py']))"
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
