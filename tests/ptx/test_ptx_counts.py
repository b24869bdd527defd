"""What launches touch, counted by `benchmarks/static_ptx.py`: hardly more than the operation has to move."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.emulated_gpu import missing

pytestmark = [pytest.mark.slow, pytest.mark.ptx, pytest.mark.timeout(1200)]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "static_ptx.py"


@pytest.fixture(scope="module")
def rows(once) -> list[dict[str, str]]:
    if reason := missing(None) or missing("compiled") or missing("triton"):
        pytest.skip(reason)

    def count(folder: Path) -> None:
        command = [sys.executable, str(SCRIPT), "--output", str(folder / "ptx.csv")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    with (once("static-ptx", count) / "ptx.csv").open() as file:
        return list(csv.DictReader(file))


def test_bytes_are_those_of_the_operation(rows):
    """Within 3 % for updates; a selection of eight tiles has the candidates beside."""
    with_floor = [row for row in rows if row["floor_bytes"]]
    assert {row["operation"] for row in with_floor} == {
        "masked_adamw_", "masked_sum_squares", "masked_pack_", "masked_gather", "masked_scatter_", "masked_swap_",
        "topk_delta",
    }  # fmt: skip
    for row in with_floor:
        above = 0.15 if row["operation"] == "topk_delta" else 0.03
        assert 0.97 < float(row["bytes"]) / float(row["floor_bytes"]) < 1 + above, row
