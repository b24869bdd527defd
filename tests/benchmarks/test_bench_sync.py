"""The benchmark of published versions runs, and its followers have the bits."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_sync.py"


def test_versions_are_smaller_than_diffs(tmp_path):
    command = [
        sys.executable,
        BENCHMARK,
        "--models",
        "tiny",
        "--rounds",
        "2",
        "--lrs",
        "3e-6",
        "--out",
        tmp_path / "rows.csv",
    ]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "size"]
    ours = {row["k"]: float(row["p50"]) for row in rows if row["provider"].startswith("ls.sync")}
    theirs = {row["k"]: float(row["p50"]) for row in rows if row["provider"].startswith("changed")}
    assert len(ours) == 3 and all(4 * ours[k] < theirs[k] for k in ours)
