"""CUB as a peer of the selection: where its headers are looked for, what is said without them, and that it compiles."""

from types import SimpleNamespace

import pytest
import torch

from ltp_sparse.tickets.index_set import IndexSet


@pytest.fixture
def cub_topk(gpu):
    return gpu("cub_topk")


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


def test_what_is_missing_is_named(cub_topk, monkeypatch, tmp_path):
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
    with pytest.raises(cub_topk.UnavailableError, match="needs a CUDA device"):
        cub_topk.CubTopK.on(torch.device("cpu"))


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


@pytest.fixture(params=[0, 1])
def problem(gpu, request):
    return gpu("selection").Problem(gpu("selection").TINY[request.param], gpu("device").Device())


def test_a_wrong_result_is_noticed(gpu, problem, monkeypatch):
    selection = gpu("selection")
    for name in (selection.CUB, selection.CUB_FLAT):
        monkeypatch.setattr(selection.CubTopK, "on", lambda device: right)
        selection.cub(problem, name).verify()
        monkeypatch.setattr(selection.CubTopK, "on", lambda device: wrong)
        with pytest.raises(gpu("harness").WrongResult, match="the result is not the exact one"):
            selection.cub(problem, name).verify()


def test_the_check_takes_neither_fewer_nor_other_values(problem):
    found = torch.topk(problem.deltas(), problem.k).values
    assert problem.check_values(found)
    assert not problem.check_values(found[1:])
    twice = found.clone()
    twice[0] += 1
    assert not problem.check_values(twice)


def test_selections_are_checked_entry_by_entry(gpu, problem):
    """Those of the library are right in their own order of names; one other entry is noticed."""
    selection = gpu("selection")
    for make in (selection.topk_delta, selection.by_histogram, selection.select):
        make(problem, "reference").verify()
    sets = selection.topk_delta(problem, "reference").run()
    masks = [index_set.mask() for index_set in sets]
    masks[0].view(-1)[masks[0].view(-1).int().argmin()] = True
    assert problem.check_sets(sets) and not problem.check_sets([IndexSet.from_mask(mask) for mask in masks])
