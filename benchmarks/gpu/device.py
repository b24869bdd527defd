"""The device of the GPU suite: timing, CUDA graphs, memory and profiles. The CPU stands in where there is no GPU."""

from __future__ import annotations

import ctypes
import importlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]
WARM_MS = 200  # an idle GPU needs this long to raise its clocks
PATIENCE_MS = 1000  # slower runs are timed in two rounds only
END = "the run has ended"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


class Launch(NamedTuple):
    """A kernel or copy on the device, or a wait of the host for it; times in microseconds."""

    name: str
    start: float
    us: float
    wait: bool = False


class Device:
    """The CPU, without graphs: for trying the suite without a GPU."""

    type = "cpu"
    cache = 1 << 20  # bytes written, and as many others read, between two runs: more than the size of the caches

    def __init__(self) -> None:
        self.torch = torch.device(self.type)
        self._written, self._read = (torch.zeros(self.cache // 4, device=self.torch) for _ in range(2))

    def prepared(self, provider: str, run: Run, graph: bool) -> tuple[Run, int | None]:
        """The function to verify and time instead of `run`: with `graph` a replay of it; and the nodes of the graph."""
        return run, None

    def synchronize(self) -> None:
        """Waits for the device; raises if it no longer answers, as after the crash of a kernel."""

    def warm(self) -> str:
        """Keeps the device busy until its clocks are high; returns the clocks."""
        return ""

    def elapsed(self, run: Run) -> float:
        """Milliseconds."""
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)

    def peak(self, run: Run) -> tuple[Any, int | None]:
        """The result of a run, and its peak of allocated bytes, including the result."""
        return run(), None

    def launches(self, run: Run) -> list[Launch]:
        """In the order of their start."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        outer = (event for event in profile.events() if event.cpu_parent is None)
        return sorted((_launch(event) for event in outer), key=lambda launch: launch.start)

    def watched(self, name: str, run: Run) -> None:
        """Runs with the profiler on, for Nsight Compute."""
        run()

    def flush(self) -> None:
        """Empties the caches. The reading evicts the written lines, so that the next run does not pay for them."""
        self._written.zero_()
        self._read.sum()

    def times(self, runs: list[tuple[Run, Run]], rounds: int) -> list[list[float]]:
        """Milliseconds of each run. The runs take turns, so that drift of the device affects all.

        Args:
            runs: (run, function called before it, not timed).
            rounds: timed rounds, after up to two others.
        """
        found: list[list[float]] = [[] for _ in runs]
        for number in range(-min(2, rounds), rounds):
            for (run, before), times in zip(runs, found, strict=True):
                before()
                self.flush()
                elapsed = self.elapsed(run)
                if number >= 0:
                    times.append(elapsed)
            if number >= 1 and sum(map(sum, found)) > PATIENCE_MS:
                break
        return found

    def host_ms(self, run: Run, before: Run) -> float:
        """Milliseconds of the host in a run, without the work of the device."""
        found = []
        for _ in range(5):
            before()
            self.synchronize()
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
        self.synchronize()
        return statistics.median(found)


class Cuda(Device):
    type = "cuda"
    cache = 1 << 28

    def prepared(self, provider: str, run: Run, graph: bool) -> tuple[Run, int | None]:
        run()
        if not graph:
            return run, None
        self.synchronize()
        captured = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(captured):
            run()
        nodes = ctypes.c_size_t()
        status = driver().cuGraphGetNodes(ctypes.c_void_p(captured.raw_cuda_graph()), None, ctypes.byref(nodes))
        captured.instantiate()
        return captured.replay, None if status else nodes.value

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def warm(self) -> str:
        """Returns SM and memory clock in MHz, read while the device is busy."""
        spent = 0.0
        while spent < WARM_MS:
            spent += self.elapsed(lambda: [self.flush() for _ in range(100)])
        for _ in range(1000):
            self.flush()
        clocks = smi("clocks.sm,clocks.mem")
        self.synchronize()
        return clocks

    def elapsed(self, run: Run) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def peak(self, run: Run) -> tuple[Any, int | None]:
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return result, torch.cuda.max_memory_allocated() - before

    def launches(self, run: Run) -> list[Launch]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            run()
            with torch.profiler.record_function(END):
                self.synchronize()
        events = profile.events()
        end = next(event.time_range.start for event in events if event.name == END)
        on_device = [_launch(event) for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        waits = [_launch(event)._replace(wait=True) for event in events if event.name in WAITS]
        waits = [wait for wait in waits if wait.start < end]
        return sorted(on_device + waits, key=lambda launch: launch.start)

    def watched(self, name: str, run: Run) -> None:
        self.synchronize()
        torch.cuda.profiler.start()
        with torch.cuda.nvtx.range(name):
            run()
            self.synchronize()
        torch.cuda.profiler.stop()


def _launch(event: Any) -> Launch:
    return Launch(event.name, event.time_range.start, event.time_range.elapsed_us())


def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def smi(query: str) -> str:
    """The output of nvidia-smi; "" if it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def named(name: str) -> Device:
    """The device for "cuda", "cpu", or the name of a module with a `Device`."""
    kinds = {"cuda": Cuda, "cpu": Device}
    return kinds[name]() if name in kinds else importlib.import_module(name).Device()
