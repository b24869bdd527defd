"""Processes of one group."""

import gc
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import multiprocessing

IMPORTED = [
    "pytest", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
    "ltp_sparse.deltas", "ltp_sparse.selection", "ltp_sparse.sync", "ltp_sparse.training.trainer",
]  # fmt: skip
"""Modules that are imported once for all processes of a test process. Each would need seconds to import them."""


def forks() -> BaseContext:
    """The context for forked processes; with a GPU, which does not survive a fork, for processes that start anew."""
    context = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def start(rank: Callable[..., Any], arguments: tuple[Any, ...], size: int) -> None:
    """Calls rank(number, *arguments) in `size` processes, forked from one that has done the slow imports.

    Raises:
        ProcessRaisedException: one of them failed; the others are ended.
    """
    get_context("forkserver").set_forkserver_preload(IMPORTED)
    multiprocessing.start_processes(rank, arguments, nprocs=size, start_method="forkserver")


def free_port() -> int:
    """A port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tell(rank: int, size: int, port: int) -> None:
    """Tells this process what torchrun tells a rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def leave_group():
    """Ends a rank. DDP's C++ side aborts the process now and then if a wrapped model outlives its process group."""
    gc.collect()
    torch.distributed.destroy_process_group()
