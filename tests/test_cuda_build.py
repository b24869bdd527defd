"""The CUDA extension builds where a toolkit is: no spills, within the registers of its thread blocks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v", "-c"]


def test_kernels_do_not_spill(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit: nvcc is not on the PATH")
    source = ROOT / "csrc" / "cuda" / "masked_adamw.cu"
    run = subprocess.run(["nvcc", *FLAGS, str(source), "-o", str(tmp_path / "k.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", run.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", run.stderr)]
    assert len(registers) == 27  # 3 x 8 storage types for update, coded update and sum, and 3 for packing
    assert max(registers) <= 64, "eight thread blocks of 128 a processor are to be resident"
    assert spills and set(spills) == {0}


def test_asking_for_cuda_without_a_toolkit_is_an_error(tmp_path):
    environment = {**os.environ, "LTP_SPARSE_EXT": "cuda", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "no CUDA toolkit; put nvcc on the PATH" in run.stderr
