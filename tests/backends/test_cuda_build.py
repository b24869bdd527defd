"""The CUDA extension builds where a toolkit is: no spills, within the registers of its thread blocks."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers.builds import built
from helpers.emulated_gpu import cuda_home, missing, ptx

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UPDATES = ("masked_adamw", "masked_adamw_8bit", "masked_gradients")
SELECTIONS = ("sm_90", pytest.param("sm_80", marks=pytest.mark.ptx))  # the second costs 14 s of compiling
COMPILED = (
    *((source, "sm_90") for source in ("topk_delta", *UPDATES)),
    pytest.param("topk_delta", "sm_80", marks=pytest.mark.ptx),
)
# kernels of a source: of the update, 3 x 8 storage types with a master or without, and one with stochastic rounding for
# each gradient of bfloat16, all that with an anchor or without, and the one that prepares a step; sums by gradients
# alone, and with an anchor also by values; packing, 3 gradients, added or not; 4 x 3 for either pass over the weights
# and for the end of a search, 2 for samples and 3 for candidates
KERNELS = {"masked_adamw": 39, "masked_adamw_8bit": 38, "masked_gradients": 22, "topk_delta": 41}
REGISTERS = {"masked_adamw": 80, "masked_adamw_8bit": 96, "masked_gradients": 56, "topk_delta": 64}
"""A thread, at most, of the 65,536 of a processor: six thread blocks of 128 threads (updates), five (8-bit moments,
which have eight entries on the way), nine (gradients), four of 256 (band) or one of 1,024 (histogram, samples,
candidates) find room."""


@pytest.fixture(scope="module")
def figures() -> Callable[[str, str], tuple[str, list[dict]]]:
    """(source, target) -> what ptxas says of it, and a row per kernel."""
    pytest.importorskip("triton")  # brings the disassembler
    if (reason := missing("compiled")) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import static_cuda

    @cache
    def figures(source: str, target: str) -> tuple[str, list[dict]]:
        def count(folder: Path) -> None:
            ptxas = [cuda_home() / "bin" / "ptxas", "-v", f"-arch={target}", "--generate-line-info"]
            command = [*ptxas, "-o", folder / "cubin", text]
            run = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
            (folder / "log").write_text(run.stderr)
            (folder / "rows.json").write_text(json.dumps(list(static_cuda.kernels(folder / "cubin", target))))

        text = ptx(source, int(target.removeprefix("sm_")))
        folder = built(f"cuda-figures-{source}", count, [text, Path(static_cuda.__file__)], target)
        return (folder / "log").read_text(), json.loads((folder / "rows.json").read_text())

    return figures


@pytest.mark.parametrize(("source", "target"), COMPILED)
def test_kernels_do_not_spill(figures, source, target):
    """Nor do they search at run time for the kind of memory that an address is in."""
    log, rows = figures(source, target)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
    stacks = [int(count) for count in re.findall(r"(\d+) bytes stack frame", log)]
    assert len(registers) == len(rows) == KERNELS[source]
    assert max(registers) <= REGISTERS[source]
    assert spills and set(spills) == set(stacks) == {0}
    assert {row["generic"] for row in rows} == {0}


@pytest.mark.parametrize("target", SELECTIONS)
def test_selection_is_bound_by_memory(figures, target):
    """By the static figures: instructions take less time than bytes, entries are loaded as vectors."""
    rows = [row for row in figures("topk_delta", target)[1] if row["kernel"].startswith("delta_")]
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        assert row["spills"] == 0 and row["loads_128"] >= 2, row
        if "alone" not in row["types"]:
            assert float(row["issue_floor_ms"]) < 0.8 * float(row["memory_floor_ms"]), row


@pytest.mark.parametrize("source", UPDATES)
def test_updates_wait_once_for_a_batch(figures, source):
    """All loads of a batch are on the way before the first is waited for; those of whole tiles are vectors of four."""
    rows = [row for row in figures(source, "sm_90")[1] if row["list_in_flight"]]
    assert len(rows) == KERNELS[source] - (source == "masked_adamw")  # but for that which prepares a step
    for row in rows:
        moments, coded, summed = (
            row["kernel"].startswith("masked_adamw_"),
            row["kernel"] == "masked_adamw_ 8-bit",
            row["kernel"] == "masked_sum_squares",
        )
        anchor, added = "anchor" in row["types"], "added" in row["types"]
        tensors = (4 + anchor) if moments else (1 + 2 * anchor) if summed else 1 + added
        listed, vectors = (8, 8) if coded else (4, 4 if moments or anchor else 8)
        found = [tuple(map(int, row[f"{kind}_in_flight"].split("/"))) for kind in ("list", "full")]
        loads = [coded + tensors * listed, coded + tensors * vectors // 4]  # coded: and the scales
        assert [n for _, n in found] == loads, row
        # a pass over gradients that reads three tensors in vectors may wait for two of them first
        assert [n for n, _ in found] >= [loads[0], loads[1] - (summed and anchor)], row
        assert row["generic"] == row["spills"] == 0, row
        per_listed, per_vector = map(float, row["instructions_per_entry"].split())
        assert per_vector < per_listed < (200 if coded else 90 if moments else 36), row
        assert not coded or per_vector < 145, row
        if not coded:
            issue, memory = (map(float, row[key].split()) for key in ("issue_floor_ms", "memory_floor_ms"))
            assert all(a < 0.7 * b for a, b in zip(issue, memory, strict=True)), row


def test_asking_for_cuda_without_a_toolkit_is_an_error(tmp_path):
    environment = {**os.environ, "LTP_SPARSE_EXT": "cuda", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "no CUDA toolkit; put nvcc on the PATH" in run.stderr


def test_architectures_are_chosen(monkeypatch):
    gencode = runpy.run_path(str(ROOT / "setup.py"))["gencode"]
    monkeypatch.delenv("LTP_SPARSE_CUDA_ARCH", raising=False)
    every = gencode()
    monkeypatch.setenv("LTP_SPARSE_CUDA_ARCH", "90")
    chosen = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    assert gencode() == chosen and chosen[0] in every and len(every) == 5
    for wrong in ("sm_90", "70", "90,"):
        monkeypatch.setenv("LTP_SPARSE_CUDA_ARCH", wrong)
        with pytest.raises(SystemExit, match="LTP_SPARSE_CUDA_ARCH must be numbers as in 80,90, none below 80"):
            gencode()
