"""The bodies of the GPU tests run on the CPU, as a mistake in them would cost time on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltp_sparse import backends

ROOT = Path(__file__).parents[2]
CHOSEN = "not (f16 or list16 or master or full or (bf16 and plain))"
"""All tests, with some of their parameters."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bodies_of_the_gpu_tests_run_on_the_cpu():
    if (reason := backends.unavailable_reason("compiled", torch.device("cpu"))) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", CHOSEN]
    environment = {**os.environ, "LTP_SPARSE_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1"}
    command += ["tests/backends/test_gpu.py", "--durations=5"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert run.stdout.count("SKIPPED") == 1, "only what asks the allocator of a GPU"
