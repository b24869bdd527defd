"""The Triton kernels compile for NVIDIA and AMD GPUs, and to the machine code their design counts on; no GPU is needed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "static_triton.py"


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[tuple[str, str, str], dict[str, str]]:
    """(kernel, variant, target) -> counts. In a process of its own: this one may have the kernels in the interpreter."""
    folder = tmp_path_factory.mktemp("static")
    output = folder / "triton.csv"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(SCRIPT), "--output", str(output)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with output.open() as file:
        return {(row["kernel"], row["variant"], row["target"]): row for row in csv.DictReader(file)}


def on(table: dict, kernel: str, target: str = "sm_90") -> list[dict[str, str]]:
    return [row for (name, _, where), row in table.items() if (name, where) == (kernel, target)]


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize("kernel", ["masked_adamw_", "masked_sum_squares", "delta_band"])
def test_compiles_without_spills(table, kernel, target):
    rows = on(table, kernel, target)
    assert rows
    for row in rows:
        assert row["spills"] == "0", row


def test_registers_leave_room_for_other_programs(table):
    # threads of the programs that fit the 65,536 registers of a processor: half of what it can hold for the update,
    # and for the band pass the two programs of 256 threads that its grid counts on
    for row in on(table, "masked_adamw_") + on(table, "masked_sum_squares"):
        assert int(row["registers"]) <= 80, row
    for row in on(table, "delta_band"):
        assert int(row["registers"]) <= 128, row


def test_update_of_full_tiles_moves_vectors(table):
    # two vectors a thread: read parameter, gradient and two moments (and the anchor), write all but the gradient
    for row in on(table, "masked_adamw_"):
        assert int(row["ldg_128"]) == (10 if row["variant"] == "anchor" else 8), row
        assert int(row["stg_128"]) == 6, row


def test_update_exchanges_nothing_between_threads(table):
    # layouts that do not match would be converted through shared memory, with barriers
    for row in on(table, "masked_adamw_"):
        assert (row["shared_bytes"], row["barriers"]) == ("0", "0"), row


@pytest.mark.parametrize(
    "variant, vectors",
    [("float32", 8), ("take", 8), ("scores", 4), ("bfloat16", 4), ("float16", 4), ("bfloat16 to float32", 6)],
)
def test_band_pass_reads_vectors(table, variant, vectors):
    assert int(table["delta_band", variant, "sm_90"]["ldg_128"]) == vectors


def test_band_pass_of_unaligned_tensors_reads_no_vectors(table):
    assert table["delta_band", "unaligned", "sm_90"]["ldg_128"] == "0"


def test_band_pass_keeps_subnormal_deltas(table):
    for row in on(table, "delta_band"):
        assert row["flushes_subnormals"] == "0", row


def test_loops_stay_short(table):
    # half as much again as counted when they were written; beyond that, look at the code
    bounds = {"full": 56, "bitmap": 101, "list16": 87, "mark": 28}
    for kernel, variant in (("masked_adamw_", "plain"), ("delta_band", "float32"), ("delta_band", "bfloat16")):
        for loop in table[kernel, variant, "sm_90"]["instructions_per_entry"].split(", "):
            name, count = loop.split()
            assert float(count) <= bounds[name], loop
