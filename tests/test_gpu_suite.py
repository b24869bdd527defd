"""`make gpu` without a GPU: the same suite on the CPU, on a tiny model."""

import csv
import json
import os
import subprocess
import sys
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
    assert facts["torch"] and facts["bitsandbytes"]
    with (tmp_path / "masked_adamw.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["provider"].startswith("MaskedAdamW")]
    assert {row["precision"] for row in ours} == {"float32", "bfloat16", "bfloat16-8bit"}
    assert all(row["verified"] == "True" and float(row["p50_ms"]) > 0 for row in ours)
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


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu/run.py", "--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "torch sees no CUDA device" in run.stderr
