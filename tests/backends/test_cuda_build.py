"""The CUDA extension builds where a toolkit is: no spills, within the registers of its thread blocks."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMPILED = (("topk_delta", "sm_90"), ("topk_delta", "sm_80"), ("masked_adamw", "sm_90"))
# kernels of a source: 3 x 8 storage types for update, coded update and sum, and 3 for packing; 4 x 3 for either pass
# over the weights and for the end of a search, 2 for samples and 3 for candidates
KERNELS = {"masked_adamw": 27, "topk_delta": 41}
REGISTERS = {"masked_adamw": 80, "topk_delta": 64}
"""A thread, at most, of the 65,536 of a processor: six thread blocks of 128 threads (updates, with the loads of four
entries on the way), four of 256 (band) or one of 1,024 (histogram, samples, candidates) then find room."""


@pytest.fixture(scope="module")
def static_cuda():
    pytest.importorskip("triton")  # brings the disassembler
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import static_cuda
    return static_cuda


@pytest.fixture(scope="module")
def cubins(once, static_cuda) -> Path:
    """A folder with every cubin of COMPILED and what ptxas says of it."""
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit: nvcc is not on the PATH")

    def compile_all(folder: Path) -> None:
        def compile_one(source: str, target: str) -> None:
            cubin = folder / f"{source}-{target}.cubin"
            log = static_cuda.compiled(ROOT / "csrc" / "cuda" / f"{source}.cu", target, cubin)
            cubin.with_suffix(".log").write_text(log)

        with ThreadPoolExecutor(2) as executor:
            list(executor.map(compile_one, *zip(*COMPILED, strict=True)))

    return once("cubins", compile_all)


@pytest.mark.parametrize(("source", "target"), COMPILED)
def test_kernels_do_not_spill(cubins, source, target):
    log = (cubins / f"{source}-{target}.log").read_text()
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    stacks = [int(count) for count in re.findall(r"(\d+) bytes stack frame", log)]
    assert len(registers) == KERNELS[source]
    assert max(registers) <= REGISTERS[source]
    assert spills and set(spills) == set(stacks) == {0}


def test_selection_is_bound_by_memory(cubins, static_cuda):
    """By the static figures: instructions take less time than bytes, entries are loaded as vectors."""
    rows = []
    for source, target in COMPILED:
        found = list(static_cuda.kernels(cubins / f"{source}-{target}.cubin", target))
        assert len(found) == KERNELS[source]
        rows += [row for row in found if row["kernel"].startswith("delta_")]
    assert len(rows) == 2 * 2 * 4 * 3
    for row in rows:
        assert row["spills"] == 0 and row["loads_128"] >= 2, row
        if "alone" not in row["types"]:
            assert float(row["issue_floor_ms"]) < 0.8 * float(row["memory_floor_ms"]), row


def test_asking_for_cuda_without_a_toolkit_is_an_error(tmp_path):
    environment = {**os.environ, "LTP_SPARSE_EXT": "cuda", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "no CUDA toolkit; put nvcc on the PATH" in run.stderr
