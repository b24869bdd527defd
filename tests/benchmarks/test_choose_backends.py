"""The table behind `auto`: what the measuring command writes, from this CPU and from results of `make gpu`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ltp_sparse import backends

ROOT = Path(__file__).parents[2]
COLUMNS = ("op", "model", "n", "density", "precision", "kind", "provider", "mode", "p50_ms", "error")


def choose(*options):
    command = [sys.executable, "benchmarks/choose_backends.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def results(folder, *ops):
    """A made-up folder of `make gpu`."""
    facts = {"device": "NVIDIA H200", "device_type": "cuda", "torch": "2.11.0", "commit": "abc"}
    (folder / "environment.json").write_text(json.dumps(facts))
    ours = ("MaskedAdamW (triton)", "MaskedAdamW (compiled)")
    rows = [
        ("step", "base", 100, 0.2, "float32", "uniform", "torch AdamW(fused=True)", "graph", 2.0),
        ("step", "base", 100, 0.2, "float32", "uniform", ours[0], "graph", 9.9),
        ("step", "base", 100, 0.2, "float32", "uniform", ours[0], "graph", 1.2),
        ("step", "base", 100, 0.2, "float32", "uniform", ours[0], "eager", 0.5),
        ("step", "base", 100, 0.2, "float32", "uniform", ours[1], "graph", 1.1),
        ("step", "small", 10, 0.2, "float32", "uniform", ours[1], "graph", 9.0),
        ("step", "base", 100, 0.01, "bfloat16", "uniform", ours[0], "graph", 0.25),
        ("step", "base", 100, 0.01, "bfloat16", "uniform", ours[1], "graph", ""),
        ("step", "base", 100, 0.01, "bfloat16-8bit", "uniform", ours[1], "graph", 0.1),
        ("step", "base", 100, 0.2, "float32", "clustered", ours[0], "graph", 0.1),
        ("selection", "base", 100, 0.2, "float32", "normal", "topk_delta (triton)", "eager", 0.9),
        ("selection", "base", 100, 0.2, "float32", "normal", "topk_delta (compiled)", "eager", 0.8),
        ("selection", "base", 100, 0.2, "float32", "normal", "select (compiled)", "eager", 0.1),
        ("selection", "base", 100, 0.2, "float32", "normal", "topk_delta, histogram (compiled)", "eager", 0.1),
        ("selection", "base", 100, 0.2, "float32", "untouched", "topk_delta (triton)", "eager", 0.1),
    ]
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *((*row, "") for row in rows if row[0] in ops)])


@pytest.mark.slow
def test_rows_of_a_gpu_are_taken_and_others_stay(tmp_path):
    results(tmp_path, "step", "selection")
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
            *(["masked_copy", dtype, 1.0, {"triton": None}] for dtype in ("float32", "bfloat16", "float16")),
        ],
    }


@pytest.mark.slow
def test_half_a_measurement_changes_nothing(tmp_path):
    results(tmp_path, "step")
    run = choose("--from", tmp_path, "--out", tmp_path / "table.json")
    assert run.returncode != 0 and "there are no measurements of topk_delta" in run.stderr
    assert not (tmp_path / "table.json").exists()
