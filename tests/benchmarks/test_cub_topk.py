"""CUB as a peer of the selection: where its headers are looked for, what is said without them, and that it compiles."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import measure_topk_delta

    return measure_topk_delta


@pytest.fixture
def cub_topk(measure):
    import cub_topk

    return cub_topk


def headers(folder, version="3005000"):
    """A folder that looks like CCCL's."""
    for name, text in (
        ("cub/device/device_topk.cuh", ""),
        ("cuda/std/__cccl/version.h", f"#define CCCL_VERSION {version}"),
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    return folder


def test_headers_are_those_named_then_those_of_a_package(cub_topk, monkeypatch, tmp_path):
    named, package = headers(tmp_path / "named"), headers(tmp_path / "nvidia" / "cu13" / "include" / "cccl", "3002001")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(cub_topk.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(cub_topk, "compiler", lambda: tmp_path / "toolkit" / "bin" / "nvcc")
    monkeypatch.setenv("CCCL_INCLUDE", str(named))
    assert cub_topk.include() == named and cub_topk.version() == "3.5.0"
    monkeypatch.delenv("CCCL_INCLUDE")
    assert cub_topk.include() == package and cub_topk.version() == "3.2.1"


def test_what_is_missing_is_named(cub_topk, measure, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cub_topk.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cub_topk, "HEADER", "cub/device/no_such_header.cuh")
    monkeypatch.setenv("CCCL_INCLUDE", str(tmp_path))
    monkeypatch.setattr(cub_topk, "compiler", lambda: tmp_path / "bin" / "nvcc")
    with pytest.raises(cub_topk.UnavailableError, match=f"no_such_header.cuh in {tmp_path}.*nvidia-cuda-cccl>=13.2"):
        cub_topk.include()
    assert cub_topk.version().startswith("skipped: no cub/device/no_such_header.cuh")
    monkeypatch.undo()
    monkeypatch.setattr(cub_topk.shutil, "which", lambda name, path: None)
    with pytest.raises(cub_topk.UnavailableError, match="no nvcc"):
        cub_topk.compiler()
    assert measure.cub_on(torch.device("cpu")) is None
    printed = capsys.readouterr().out
    assert all(f"skipped: {measure.PEERS[key]} (needs a CUDA device)" in printed for key in ("cub", "cub_flat"))


def test_what_nvcc_says_is_passed_on(cub_topk, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cub_topk, "compiler", lambda: nvcc)
    monkeypatch.setattr(cub_topk, "include", lambda: tmp_path)
    with pytest.raises(cub_topk.UnavailableError, match="nvcc fails on cub_topk.cu: no such architecture"):
        cub_topk.CubTopK("sm_1")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_it_compiles_and_raises_what_cuda_reports(cub_topk, monkeypatch, target):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `make gpu` runs it")
    try:
        largest = cub_topk.CubTopK(target)
    except cub_topk.UnavailableError as error:
        if "nvcc fails" in str(error):
            raise
        pytest.skip(str(error))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    for weights in (torch.rand(10), torch.rand(10, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="cub_topk: .*"):
            largest(3, weights, weights)


def wrong(k, initial, tuned=None):
    return torch.ones(k)


def right(k, initial, tuned=None):
    keys = initial if tuned is None else (tuned.float() - initial.float()).abs_()
    return torch.topk(keys, k).values.flip(0)


@pytest.mark.parametrize("cell", [0, 1])
def test_its_results_are_checked_and_a_wrong_one_has_no_figures(measure, capsys, cell):
    cell = measure.TINY[cell]
    problem = measure.Problem(cell, torch.device("cpu"))
    bench = measure.Bench(problem.device, 2)
    k = int(cell.density * problem.n)
    for cub, verified in ((right, True), (wrong, False)):
        rows = measure.measure(cell, problem, bench, cub)
        assert {key for row in rows for key in row} <= {*measure.FIELDS}
        ours = next(row for row in rows if row["provider"].startswith("topk_delta"))
        for key in ("cub", "cub_flat"):
            (row,) = [row for row in rows if row["provider"] == measure.PEERS[key]]
            assert row["verified"] is verified and (row.get("p50_ms", 0) > 0) is verified and row["k"] == k
            assert (ours.get(f"ratio_to_{key}", 0) > 0) is verified
            assert f"ratio_to_{key}" in measure.FIELDS
    assert f"{measure.PEERS['cub']}: the result is not the exact one; nothing is timed" in capsys.readouterr().out


def test_the_check_takes_neither_fewer_nor_other_values(measure):
    problem = measure.Problem(measure.TINY[0], torch.device("cpu"))
    k = problem.n // 5
    found = torch.topk(problem.deltas(), k).values
    threshold = problem.threshold(k)
    assert problem.check_values(found, k, threshold)
    assert not problem.check_values(found[1:], k, threshold)
    twice = found.clone()
    twice[0] = twice[1]
    assert not problem.check_values(twice, k, threshold)


def test_a_peer_that_does_not_run_is_named(measure, capsys):
    def broken(k, initial, tuned=None):
        raise RuntimeError("cub_topk: out of memory")

    problem = measure.Problem(measure.TINY[0], torch.device("cpu"))
    rows = measure.measure(measure.TINY[0], problem, measure.Bench(problem.device, 2), broken)
    assert all(row["verified"] and "CUB" not in row["provider"] for row in rows)
    assert f"skipped: {measure.PEERS['cub']} (RuntimeError: cub_topk: out of memory)" in capsys.readouterr().out
