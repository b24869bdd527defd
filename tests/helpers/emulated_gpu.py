"""A GPU that is emulated (`tests/ptx/emulator`): the PTX that nvcc and Triton make of the kernels, run on the CPU.

`EmulatedGpu.run` calls a function in a process of its own, in which CPU tensors are device memory and the backends
`compiled` and `triton` launch on the emulator (`helpers.emulated_device`). What the emulator reports is an error.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers import emulated_device
from helpers.builds import CACHE, built

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "ptx" / "emulator"
SM = emulated_device.DEFAULTS["sm"]
ARCHITECTURES = (SM, 80)


@cache
def _setup() -> dict[str, Any]:
    """The names of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


def cuda_home() -> Path | None:
    return _setup()["cuda_home"]()


def missing(backend: str | None) -> str | None:
    """What is not there to emulate the kernels of a backend (None: to emulate at all); None if all is."""
    if shutil.which("c++") is None:
        return "no C++ compiler"
    if backend == "compiled" and cuda_home() is None:
        return "no CUDA toolkit"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "no Triton"
    return None


GPU_BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name} as PTX: {reason}"))
    for name in ("compiled", "triton")
    for reason in [missing(name)]
]
COMPILED = GPU_BACKENDS[:1]


class EmulatedGpu:
    """The process starts with the first call, and again after one that ended it."""

    def __init__(self) -> None:
        self._folders = _emulator(), None if missing("compiled") else cuda_module()
        self._process: ProcessPoolExecutor | None = None
        self._loaded = {SM}

    def run(self, function: Callable[..., Any], *arguments: Any, **settings: int) -> Any:
        """What the function, which lies in a module, returns there. settings: fields of `emulated_device.Config`."""
        texts: list[Path] = []
        if (sm := settings.get("sm", SM)) not in self._loaded and not missing("compiled"):
            texts = [ptx(path.stem, sm) for path in _cuda_sources()]
        if self._process is None:
            self._process = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), emulated_device.start, self._folders
            )
        environment = {
            "LD_PRELOAD": str(self._folders[0] / "libptx.so"),
            "TRITON_CACHE_DIR": str(CACHE / "triton"),
            "TRITON_INTERPRET": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with mock.patch.dict(os.environ, environment):  # the process starts with the call
            if texts:
                self._process.submit(emulated_device.load_cuda, texts).result()
            future = self._process.submit(emulated_device.run, function, arguments, settings)
        self._loaded.add(sm)
        try:
            return future.result()
        except BrokenProcessPool:
            self._process, self._loaded = None, {SM}
            raise

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown()


_CXX = ["c++", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]


def _emulator() -> Path:
    flags = [*_CXX, "-O2", "-ffp-contract=off", "-frounding-math", "-pthread", "-Wl,-soname,libptx.so"]
    sources = [path for path in SOURCES.iterdir() if path.name != "cudart.cpp"]

    def compiled(unit: Path, folder: Path) -> Path:
        subprocess.run([*flags, "-c", "-o", folder / f"{unit.stem}.o", unit], check=True)
        return folder / f"{unit.stem}.o"

    def make(folder: Path) -> None:
        units = [path for path in sources if path.suffix == ".cpp"]
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            objects = list(executor.map(compiled, units, itertools.repeat(folder)))
        subprocess.run([*flags, "-o", folder / "libptx.so", *objects], check=True)

    return built("emulator", make, sources, flags)


def _cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def _depends() -> list[Path]:
    """What the module is compiled from."""
    return [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.parent.name != "cpu"]


def ptx(source: str, sm: int) -> Path:
    """The PTX of a CUDA source for an architecture, a file."""
    if sm == SM:
        return cuda_module() / f"{source}.ptx"
    nvcc, flags = cuda_home() / "bin" / "nvcc", [*_setup()["NVCC_FLAGS"], f"-arch=compute_{sm}"]

    def make(folder: Path) -> None:
        command = [nvcc, *flags, "--ptx", ROOT / "csrc" / "cuda" / f"{source}.cu", "-o", folder / f"{source}.ptx"]
        subprocess.run(command, check=True)

    return built(f"ptx-{source}", make, _depends(), nvcc, flags) / f"{source}.ptx"


def cuda_module() -> Path:
    """The module of setup.py, with PTX of SM for machine code and the emulator's runtime; the PTX lies beside it."""
    import pybind11

    home, flags = cuda_home(), [*_setup()["NVCC_FLAGS"], f"-gencode=arch=compute_{SM},code=compute_{SM}"]

    def compiled(source: Path, folder: Path) -> Path:
        kept = folder / source.stem  # of its own: all sources have files of some names
        kept.mkdir()
        command = [home / "bin" / "nvcc", *flags, "--keep", f"--keep-dir={kept}", "-c", source, "-o", kept / "out.o"]
        subprocess.run(command, check=True)
        (kept / f"{source.stem}.ptx").rename(folder / f"{source.stem}.ptx")
        return kept / "out.o"

    def make(folder: Path) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            objects = list(executor.map(compiled, _cuda_sources(), itertools.repeat(folder)))
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"], home / "include"]
        command = [*_CXX, "-Wno-attributes", *(f"-isystem{include}" for include in includes)]
        command += [ROOT / "csrc" / "bindings_cuda.cpp", *(ROOT / "csrc" / "cuda").glob("*.cpp")]
        command += [SOURCES / "cudart.cpp", *objects]
        # Its own runtime, whatever else the process has loaded; what that lacks shows when the module is imported. The
        # emulator is there before: the process is started with it.
        command += ["-Wl,-Bsymbolic", "-Wl,-z,now", f"-L{_emulator()}", "-lptx"]
        subprocess.run([*command, "-o", folder / "_C_cuda.so"], check=True)
        for kept in filter(Path.is_dir, folder.iterdir()):
            shutil.rmtree(kept)

    return built("cuda", make, [*_depends(), SOURCES / "cudart.cpp"], home, flags, pybind11.__version__)
