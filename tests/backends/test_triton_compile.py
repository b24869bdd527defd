"""The Triton kernels compile for NVIDIA and AMD GPUs, to the machine code their design counts on; without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.builds import built

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "static_triton.py"


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str], dict[str, str]]:
    """(kernel, variant, target) -> counts, from a process of its own: in this one the interpreter may be on."""

    def count(folder: Path) -> None:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
        command = [sys.executable, str(SCRIPT), "--output", str(folder / "triton.csv")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    folder = built("static-triton", count, [SCRIPT, *(ROOT / "kernels").rglob("*.py")], triton.__version__)
    with (folder / "triton.csv").open() as file:
        return {(row["kernel"], row["variant"], row["target"]): row for row in csv.DictReader(file)}


def on(table: dict, kernel: str, target: str = "sm_90") -> list[dict[str, str]]:
    return [row for (name, _, where), row in table.items() if (name, where) == (kernel, target)]


CANDIDATE_PASSES = ("candidate_histogram", "take_above", "take_ties")
SMALL_PASSES = ("sample_keys", *CANDIDATE_PASSES)
COPIES = ("masked_gather_", "masked_scatter_", "masked_swap_")


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize(
    "kernel", ["masked_adamw_", "masked_sum_squares", "masked_pack_", *COPIES, "delta_band", *SMALL_PASSES]
)
def test_compiles_without_spills(table, kernel, target):
    rows = on(table, kernel, target)
    assert rows
    for row in rows:
        assert row["spills"] == "0", row


def test_registers_leave_room_for_other_programs(table):
    # of the 65,536 registers of a processor: six programs of 128 threads for the update, for the band pass the two
    # programs of 256 threads that its grid counts on, and twelve of 128 for the passes that wait for scattered memory
    for row in on(table, "masked_adamw_") + on(table, "masked_sum_squares") + on(table, "masked_pack_"):
        assert int(row["registers"]) <= 80, row
    for row in on(table, "delta_band"):
        assert int(row["registers"]) <= 128, row
    for row in [row for kernel in (*SMALL_PASSES, *COPIES) for row in on(table, kernel)]:
        assert int(row["registers"]) <= 40, row


FLOAT32 = ("plain", "anchor", "packed")


@pytest.mark.parametrize("variant", FLOAT32)
def test_update_of_full_tiles_moves_vectors(table, variant):
    # parameter, gradient and two moments (and the anchor) are read, all but the gradient written
    row = table["masked_adamw_", variant, "sm_90"]
    assert int(row["ldg_128"]) >= (5 if variant == "anchor" else 4)
    assert int(row["stg_128"]) >= 3


@pytest.mark.parametrize("variant", FLOAT32)
def test_update_exchanges_nothing_between_threads(table, variant):
    # layouts that do not match would be converted through shared memory, with barriers
    row = table["masked_adamw_", variant, "sm_90"]
    assert (row["shared_bytes"], row["barriers"]) == ("0", "0")


@pytest.mark.parametrize("variant", ["bfloat16 master", "float16 master packed"])
def test_parameters_are_rounded_to_nearest_by_the_hardware(table, variant):
    # the interpreter takes another path, as its own conversion truncates
    assert int(table["masked_adamw_", variant, "sm_90"]["cvt_rn"]) >= 1


def test_copies_wait_once_for_a_block(table):
    """Nothing is stored before all is loaded; a thread has four entries on the way."""
    for kernel in COPIES:
        for row in on(table, kernel):
            assert (row["generic"], row["shared_bytes"], row["barriers"]) == ("0", "0", "0"), row
            for loop in row["loads_before_stores"].split(", "):
                before, loads = map(int, loop.split()[1].split("/"))
                assert before == loads >= 4, row


@pytest.mark.parametrize("variant", ["float32", "take", "scores", "bfloat16", "float16", "bfloat16 to float32"])
def test_band_pass_reads_vectors(table, variant):
    inputs = 1 if variant == "scores" else 2
    assert int(table["delta_band", variant, "sm_90"]["ldg_128"]) >= inputs


def test_band_pass_of_unaligned_tensors_reads_no_vectors(table):
    assert table["delta_band", "unaligned", "sm_90"]["ldg_128"] == "0"


def test_keys_keep_subnormal_deltas(table):
    for row in on(table, "delta_band") + on(table, "sample_keys"):
        assert row["flushes_subnormals"] == "0", row


@pytest.mark.parametrize("kernel", CANDIDATE_PASSES)
def test_candidate_passes_wait_for_no_atomic(table, kernel):
    row = table[kernel, "plain", "sm_90"]
    assert int(row["red"]) > 0
    assert row["atom"] == "0"


def test_loops_stay_short(table):
    # half as much again as counted when they were written; beyond that, look at the code
    bounds = {"full": 56, "bitmap": 101, "list16": 87, "mark": 28, "active": 480, "ties": 100}
    for kernel, variant in (
        ("masked_adamw_", "plain"),
        ("masked_adamw_", "packed"),
        ("masked_adamw_", "8bit"),
        ("delta_band", "float32"),
        ("delta_band", "bfloat16"),
        ("take_ties", "plain"),
    ):
        for loop in table[kernel, variant, "sm_90"]["instructions_per_entry"].split(", "):
            name, count = loop.split()
            assert float(count) <= bounds[name], loop
