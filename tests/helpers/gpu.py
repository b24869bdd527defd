"""The device of the GPU tests, and what only a GPU has.

LTP_SPARSE_TEST_DEVICE=cpu runs the bodies of these tests without one: a graph is then the run itself, a stream nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from ltp_sparse import backends

DEVICE = torch.device(os.environ.get("LTP_SPARSE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device")
GPU_BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name in (("triton", "compiled") if ON_GPU else ("compiled",))
    for reason in [backends.unavailable_reason(name, DEVICE)]
]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Replays of a run, which has run before and does not run now."""
    if not ON_GPU:
        return run
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def side_stream() -> AbstractContextManager[object]:
    """What is launched here waits for nothing that was launched before."""
    return torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext()


def keep_busy(cycles: int = 200_000_000) -> None:
    """The current stream, for a tenth of a second."""
    if ON_GPU:
        torch.cuda._sleep(cycles)


@contextmanager
def waits() -> Iterator[list[warnings.WarningMessage]]:
    """The waits of the host for the device; none on the CPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mode = torch.cuda.get_sync_debug_mode() if ON_GPU else 0
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode(mode)
    found[:] = [wait for wait in found if "synchroniz" in str(wait.message)]


def reserved() -> int:
    """Bytes that the allocator holds."""
    return torch.cuda.memory_reserved() if ON_GPU else 0
