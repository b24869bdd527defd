"""The device of the GPU tests, and functions that only a GPU has.

LTP_SPARSE_TEST_DEVICE=cpu runs the bodies of these tests without a GPU, and without graphs and streams.
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
    """Captures a function that has run before; returns its replay."""
    if not ON_GPU:
        return run
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def side_stream() -> AbstractContextManager[object]:
    """A stream that does not wait for earlier launches."""
    return torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else nullcontext()


def keep_busy(cycles: int = 200_000_000) -> None:
    """Keeps the current stream busy for a tenth of a second."""
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
