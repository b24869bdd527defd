"""The benchmark of deltas: every provider is verified and timed on a small model."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_provider_is_verified_and_timed(tmp_path):
    pytest.importorskip("peft", reason="a peer of the benchmark")
    out = tmp_path / "delta.csv"
    command = [sys.executable, ROOT / "benchmarks" / "bench_delta.py", "--models", "tiny", "--densities", "0.05"]
    done = subprocess.run([*command, "--rounds", "1", "--out", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    of = {op: {row["provider"] for row in rows if row["op"] == op} for op in {row["op"] for row in rows}}
    assert set(of) == {"masked_gather", "masked_scatter_", "masked_swap_", "apply", "revert", "switch", "request"}
    assert {"apply, strict=False", "merge of SHiRA (PEFT)", "sum with a dense difference (LT-SFT)"} <= of["apply"]
    (launches,) = (float(row["p50"]) for row in rows if row["metric"] == "launches")
    assert launches == 3
