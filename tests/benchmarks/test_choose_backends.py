"""The table behind `auto`: what the measuring command writes, from this CPU and from results of `make gpu`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ltp_sparse import backends

ROOT = Path(__file__).parents[2]
UPDATES = ("n", "density", "precision", "provider", "mode", "masks", "p50_ms")
SELECTIONS = ["n", "density", "dtype", "deltas", "provider", "p50_ms"]


def choose(*options):
    command = [sys.executable, "benchmarks/choose_backends.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def write_rows(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def results(folder):
    """A made-up folder of `make gpu`."""
    facts = {"device": "NVIDIA H200", "device_type": "cuda", "torch": "2.11.0", "commit": "abc"}
    (folder / "environment.json").write_text(json.dumps(facts))
    updates = [
        (100, 0.2, "float32", "copy", "eager", "uniform", 0.1),
        (100, 0.2, "float32", "torch AdamW(fused=True)", "graph", "uniform", 2.0),
        (100, 0.2, "float32", "MaskedAdamW (triton)", "graph", "uniform", 1.2),
        (100, 0.2, "float32", "MaskedAdamW (triton)", "eager", "uniform", 0.5),
        (100, 0.2, "float32", "MaskedAdamW (compiled)", "graph", "uniform", 1.1),
        (10, 0.2, "float32", "MaskedAdamW (compiled)", "graph", "uniform", 9.0),
        (100, 0.01, "bfloat16", "MaskedAdamW (triton)", "graph", "uniform", 0.25),
        (100, 0.01, "bfloat16-8bit", "MaskedAdamW (compiled)", "graph", "uniform", 0.1),
        (100, 0.2, "float32", "MaskedAdamW (triton)", "graph", "clustered", 0.1),
    ]
    write_rows(folder / "masked_adamw.csv", UPDATES, updates)
    selections = [
        (100, 0.2, "float32", "normal", "topk_delta, sample (triton)", 0.9),
        (100, 0.2, "float32", "normal", "topk_delta, sample (compiled)", 0.8),
        (100, 0.2, "float32", "normal", "topk_delta, histogram (compiled)", 0.1),
        (100, 0.2, "float32", "untouched", "topk_delta, sample (triton)", 0.1),
    ]
    write_rows(folder / "topk_delta.csv", SELECTIONS, selections)


@pytest.mark.slow
def test_rows_of_a_gpu_are_taken_and_others_stay(tmp_path):
    results(tmp_path)
    table = tmp_path / "table.json"
    table.write_text(backends.CHOICES.read_text())
    run = choose("--from", tmp_path, "--out", table)
    assert run.returncode == 0, run.stderr
    written = json.loads(table.read_text())
    assert written["cpu"] == backends.choices()["cpu"]
    assert written["cuda"] == {
        "measured": True,
        "source": "NVIDIA H200, torch 2.11.0, commit abc: make gpu",
        "rows": [
            ["masked_adamw_", "bfloat16", 0.01, {"triton": 0.25}],
            ["masked_adamw_", "float32", 0.2, {"compiled": 1.1, "triton": 1.2}],
            ["topk_delta", "float32", 0.2, {"compiled": 0.8, "triton": 0.9}],
        ],
    }


@pytest.mark.slow
def test_half_a_measurement_changes_nothing(tmp_path):
    results(tmp_path)
    (tmp_path / "topk_delta.csv").unlink()
    run = choose("--from", tmp_path, "--out", tmp_path / "table.json")
    assert run.returncode != 0 and "nothing was measured of topk_delta" in run.stderr
    assert not (tmp_path / "table.json").exists()
