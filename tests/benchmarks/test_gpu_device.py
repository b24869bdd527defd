"""The CUDA device of the suite with stubs for torch.cuda and the driver, as a mistake in it would cost GPU time."""

import inspect
import subprocess
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, stop):
        return 1e3 * (stop.time - self.time)


class Graph:
    """A graph that must be instantiated before its replay."""

    def __init__(self, keep_graph):
        assert keep_graph
        self.ready = False

    def raw_cuda_graph(self):
        return 1234

    def instantiate(self):
        self.ready = True

    def replay(self):
        assert self.ready


class Driver:
    fetch = 64

    def cuGraphGetNodes(self, graph, nodes, count):
        assert (graph.value, nodes) == (1234, None)
        count._obj.value = 3
        return 0

    def cuCtxSetLimit(self, limit, value):
        assert limit == 5
        self.fetch = value.value
        return 0

    def cuCtxGetLimit(self, value, limit):
        assert limit == 5
        value._obj.value = self.fetch
        return 0


@pytest.fixture
def cuda(gpu, monkeypatch):
    """`device.Cuda` on the CPU."""
    device, driver, told = gpu("device"), Driver(), []

    @contextmanager
    def noted(name):
        told.append(name)
        yield

    for name, stub in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph: nullcontext(),
        "synchronize": lambda: told.append("synchronize"),
        "memory_allocated": lambda: 100,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 350,
        "profiler": SimpleNamespace(start=lambda: told.append("start"), stop=lambda: told.append("stop")),
        "nvtx": SimpleNamespace(range=noted),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(device, "driver", lambda: driver)
    monkeypatch.setattr(device.Cuda, "type", "cpu")
    monkeypatch.setattr(device.Cuda, "cache", 1 << 10)
    monkeypatch.setattr(device, "WARM_MS", 1)
    made = device.Cuda()
    made.told = told
    return made


def test_torch_has_what_is_stubbed():
    assert "keep_graph" in inspect.signature(torch.cuda.CUDAGraph.__new__).parameters
    assert all(hasattr(torch.cuda.CUDAGraph, name) for name in ("raw_cuda_graph", "instantiate", "replay"))
    assert all(hasattr(torch.cuda.profiler, name) for name in ("start", "stop")) and torch.cuda.nvtx.range
    assert all(hasattr(torch.cuda, name) for name in ("max_memory_allocated", "reset_peak_memory_stats", "graph"))


def test_a_step_is_captured_after_it_has_run(cuda):
    runs = []
    replay, nodes = cuda.prepared("step", lambda: runs.append(1), graph=True)
    assert nodes == 3 and len(runs) == 2
    replay()
    run, nodes = cuda.prepared("step", lambda: runs.append(1), graph=False)
    run()
    assert nodes is None and len(runs) == 4


def test_times_take_turns_between_flushes(cuda):
    turns = []
    runs = [(lambda: time.sleep(0.02), lambda: turns.append("a")), (lambda: None, lambda: turns.append("b"))]
    slow, fast = cuda.times(runs, 4)
    assert turns == ["a", "b"] * 6 and len(slow) == len(fast) == 4
    assert min(slow) >= 19 > min(fast)
    assert cuda.host_ms(lambda: None, lambda: None) < 19


def test_what_takes_long_has_two_rounds(cuda, gpu, monkeypatch):
    monkeypatch.setattr(gpu("device"), "PATIENCE_MS", 1)
    assert [len(times) for times in cuda.times([(lambda: time.sleep(0.002), lambda: None)], 12)] == [2]
    assert [len(times) for times in cuda.times([(lambda: None, lambda: None)], 1)] == [1]


def test_memory_launches_and_marks(cuda):
    assert cuda.peak(lambda: 7) == (7, 250)
    assert all(not launch.wait for launch in cuda.launches(lambda: torch.ones(3).sum()))
    cuda.watched("scene", lambda: cuda.told.append("run"))
    assert cuda.told[-6:] == ["synchronize", "start", "scene", "run", "synchronize", "stop"]


def test_clocks_are_read_while_it_works(cuda, monkeypatch):
    def run(command, **options):
        assert command[:2] == ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem"]
        return SimpleNamespace(stdout="1980, 3201\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert cuda.warm() == "1980, 3201"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    assert cuda.warm() == ""


def test_fetches_of_32_bytes_are_asked_for(cuda, gpu):
    floors = gpu("floors")
    assert floors.fetch_bytes() == 64 and floors.fetch_bytes(32) == 32 and floors.fetch_bytes() == 32
