"""The phases of the two commands on a GPU, the most important ones first, in case the time runs out."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cub_topk
import torch
from sources import ROOT

HERE = Path(__file__).parent
INSTALLED = ROOT / "build" / "gpu"
NCU = "ncu.csv"
TRAIN_STEP = "train_step.csv"
BACKENDS = ("compiled", "triton")
GPU_TESTS = "tests/backends/test_gpu.py"
OTHER_TESTS = (GPU_TESTS, "tests/optim/test_pull.py", "tests/backends/test_triton_kernels.py")
SMOKE = "bits_of_the_reference and dense and not f16-f32 or selection_bits"
SMALL = "bits and bf16 and (bitmap and dense and (plain or 8bit-stochastic) or levels and sample)"
"""Expressions for pytest -k: one case for each kernel, encoding and dtype; and the cases for compute-sanitizer."""
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "LaunchStats")
"""Sections of Nsight Compute."""


class Phase(NamedTuple):
    """A command with a time limit.

    Attributes:
        measures: start the command again after a crash, to continue behind the provider that crashed
    """

    name: str
    seconds: float
    command: Sequence[object]
    measures: bool = False


class Plan:
    def __init__(self, device: str, folder: Path) -> None:
        self.folder, self.on = folder, ("--device", device, "--folder", folder)

    def script(self, name: str, seconds: float, script: str, *options: object) -> Phase:
        return Phase(name, seconds, (sys.executable, HERE / script, *options, *self.on))

    def measuring(self, who: str, grid: str, seconds: float) -> Phase:
        phase = self.script(f"measure {who}, {grid} cells", seconds, "measure.py", who, "--grid", grid)
        return phase._replace(measures=True)

    def launches(self, backend: str, *options: str) -> Phase:
        return self.script(f"launches, {backend}", 45, "launches.py", backend, *options)

    def report(self) -> Phase:
        return Phase("report", 20, (sys.executable, HERE / "report.py", self.folder))

    def train_step(self) -> Phase:
        script = ROOT / "benchmarks" / "bench_train_step.py"
        return Phase("training step", 100, (sys.executable, script, "--out", self.folder / TRAIN_STEP))

    def build(self) -> Phase:
        """Builds the package with the CUDA module alone, for this GPU, in a folder apart from the environment."""
        places = ("--build-lib", INSTALLED, "--build-temp", INSTALLED / "temporary")
        settings = ["LTP_SPARSE_EXT=cuda-only"]
        if torch.cuda.is_available():
            settings.append("LTP_SPARSE_CUDA_ARCH={}{}".format(*torch.cuda.get_device_capability()))
        command = ("env", *settings, sys.executable, "setup.py", "-q", "build", "--force", *places)
        return Phase("build", 120, command)

    def testing(self, name: str, seconds: float, files: Sequence[str], chosen: str, under: Sequence[str] = ()) -> Phase:
        # -P: import the built package, not the sources here
        # addopts: without pytest-timeout, its setting is an error under --strict-config
        pytest = (sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra")
        parallel = ("-n", "8") if importlib.util.find_spec("xdist") and not under else ()
        return Phase(name, seconds, (*under, *pytest, *files, "-k", chosen, *parallel))

    def sanitizing(self, tool: str) -> Phase:
        # without torch's memory pool, an access beyond a tensor is also one beyond an allocation
        under = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool)
        return self.testing(tool, 40, [GPU_TESTS], SMALL, (*under, "--error-exitcode", "1"))

    def ncu(self) -> Phase:
        options = ("--profile-from-start", "off", "--clock-control", "none", "--nvtx", "--csv", "--page", "raw")
        sections = [part for section in SECTIONS for part in ("--section", section)]
        watched = self.launches(BACKENDS[0], "--model", "encoder", "--watched").command
        return Phase("ncu", 60, ("ncu", *options, *sections, "--log-file", self.folder / NCU, *watched))

    def first(self) -> list[Phase]:
        """Seven minutes."""
        order = (BACKENDS[0], "peers", *BACKENDS[1:])
        cub = [] if cub_topk.version().startswith("skipped") else [self.measuring("cub", "core", 40)]
        return [
            self.build(),
            self.script("floors", 30, "floors.py"),
            self.testing("tests of bits", 60, [GPU_TESTS], SMOKE),
            *(self.measuring(who, "first", 40) for who in order),
            *map(self.launches, BACKENDS),
            *(self.measuring(who, "core", 60) for who in order),
            *cub,
            self.report(),
            *([self.ncu()] if shutil.which("ncu") else []),
            self.testing("all other GPU tests", 90, OTHER_TESTS, f"not ({SMOKE})"),
            *(map(self.sanitizing, ("memcheck", "racecheck")) if shutil.which("compute-sanitizer") else ()),
            self.measuring("kthvalue", "first", 20),
            self.report(),
        ]

    def second(self) -> list[Phase]:
        """Five minutes."""
        measured = [self.measuring(who, "full", 80) for who in (BACKENDS[0], "peers", *BACKENDS[1:])]
        return [self.build(), self.script("floors", 30, "floors.py"), *measured, self.train_step(), self.report()]

    def trial(self) -> list[Phase]:
        """The phases that run without a GPU, on a tiny model."""
        measured = [self.measuring(who, "tiny", 300) for who in ("compiled", "peers", "kthvalue")]
        launches = self.launches("compiled", "--model", "tiny")
        phases = [self.script("floors", 30, "floors.py"), *measured, launches, self.report()]
        return [phase._replace(seconds=300) for phase in phases]
