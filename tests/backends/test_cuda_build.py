"""The CUDA extension builds where a toolkit is: no spills, within the registers of its thread blocks."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-c"]
# kernels of a source: 3 x 8 storage types for update, coded update and sum, and 3 for packing; 4 x 3 for either pass
# over the weights and for samples, and 3 for candidates
KERNELS = {"masked_adamw": 27, "topk_delta": 39}
REGISTERS = {"masked_adamw": 80, "topk_delta": 64}
"""A thread, at most, of the 65,536 of a processor: six thread blocks of 128 threads (updates, with the loads of four
entries on the way), four of 256 (band) or one of 1,024 (histogram) then find room."""


@pytest.mark.parametrize(
    ("source", "target"), [("masked_adamw", "sm_90"), ("topk_delta", "sm_90"), ("topk_delta", "sm_80")]
)
def test_kernels_do_not_spill(tmp_path, source, target):
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit: nvcc is not on the PATH")
    command = ["nvcc", *FLAGS, f"-arch={target}", str(ROOT / "csrc" / "cuda" / f"{source}.cu")]
    run = subprocess.run([*command, "-o", str(tmp_path / "k.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", run.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", run.stderr)]
    stacks = [int(count) for count in re.findall(r"(\d+) bytes stack frame", run.stderr)]
    assert len(registers) == KERNELS[source]
    assert max(registers) <= REGISTERS[source]
    assert spills and set(spills) == set(stacks) == {0}


def test_selection_is_bound_by_memory(tmp_path):
    """By the static figures: instructions take less time than bytes, entries are loaded as vectors."""
    pytest.importorskip("triton")  # brings the disassembler
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit: nvcc is not on the PATH")
    output = tmp_path / "cuda.csv"
    command = [sys.executable, "benchmarks/static_cuda.py", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with output.open() as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"].startswith("delta_")]
    assert len(rows) == 2 * 2 * 4 * 3
    for row in rows:
        assert row["spills"] == "0" and int(row["loads_128"]) >= 2, row
        if "alone" not in row["types"]:
            assert float(row["issue_floor_ms"]) < 0.8 * float(row["memory_floor_ms"]), row


def test_asking_for_cuda_without_a_toolkit_is_an_error(tmp_path):
    environment = {**os.environ, "LTP_SPARSE_EXT": "cuda", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "no CUDA toolkit; put nvcc on the PATH" in run.stderr
