"""A GPU that is emulated (`tests/ptx/emulator`): the PTX that nvcc and Triton make of the kernels, run on the CPU.

`EmulatedGpu.run` calls a function in a process of its own, in which CPU tensors are device memory and the backends
`compiled` and `triton` launch on the emulator (`helpers.emulated_device`). What the emulator reports is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers import emulated_device

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "ptx" / "emulator"
BUILD = ROOT / "build" / "ptx"
ARCHITECTURES = (90, 80)


@cache
def _setup() -> dict[str, Any]:
    """The names of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


def missing(backend: str | None) -> str | None:
    """What is not there to emulate the kernels of a backend (None: to emulate at all); None if all is."""
    if shutil.which("c++") is None:
        return "no C++ compiler"
    if backend == "compiled" and _setup()["cuda_home"]() is None:
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
        self._folders = _emulator(), None if missing("compiled") else _cuda_module()
        self._process: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, **settings: int) -> Any:
        """What the function, which lies in a module, returns there. settings: fields of `emulated_device.Config`."""
        if self._process is None:
            self._process = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), emulated_device.start, self._folders
            )
        environment = {
            "LD_PRELOAD": str(self._folders[0] / "libptx.so"),
            "TRITON_CACHE_DIR": str(BUILD / "triton"),
            "TRITON_INTERPRET": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with mock.patch.dict(os.environ, environment):  # the process starts with the call
            future = self._process.submit(emulated_device.run, function, arguments, settings)
        try:
            return future.result()
        except BrokenProcessPool:
            self._process = None
            raise

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown()


def _made(name: str, sources: Iterable[Path], flags: list[str], make: Callable[[Path], None]) -> Path:
    """build/ptx/name, filled by `make`, anew when sources or flags have changed."""
    texts = [" ".join(flags).encode(), *(path.read_bytes() for path in sorted(sources))]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()
    folder = BUILD / name
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / "digest"
        if not stamp.exists() or stamp.read_text() != digest:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            stamp.write_text(digest)
    return folder


_CXX = ["c++", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]


def _emulator() -> Path:
    flags = [*_CXX, "-O2", "-ffp-contract=off", "-frounding-math", "-pthread"]
    sources = [path for path in SOURCES.iterdir() if path.name != "cudart.cpp"]

    def make(folder: Path) -> None:
        units = [path for path in sources if path.suffix == ".cpp"]
        subprocess.run([*flags, "-o", folder / "libptx.so", *units], check=True)

    return _made("emulator", sources, flags, make)


def _cuda_module() -> Path:
    """The module of setup.py, with PTX alone for machine code and the emulator's runtime; the PTX lies beside it."""
    names = _setup()
    home, given = names["cuda_home"](), names["NVCC_FLAGS"]
    flags = [flag for before, flag in zip(["", *given], given, strict=False) if "-gencode" not in (before, flag)]
    for sm in ARCHITECTURES:
        flags += ["-gencode", f"arch=compute_{sm},code=compute_{sm}"]

    def make(folder: Path) -> None:
        objects = []
        for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
            objects.append(str(folder / f"{source.stem}.o"))
            command = [home / "bin" / "nvcc", *flags, "--keep", f"--keep-dir={folder}", "-c", source, "-o", objects[-1]]
            subprocess.run(command, check=True)
        import pybind11

        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"], home / "include"]
        command = [*_CXX, "-Wno-attributes", *(f"-isystem{folder}" for folder in includes)]
        command += [ROOT / "csrc" / "bindings_cuda.cpp", *(ROOT / "csrc" / "cuda").glob("*.cpp")]
        command += [SOURCES / "cudart.cpp", *objects]
        # its own runtime, whatever else the process has loaded; what that lacks shows when the module is imported
        command += ["-Wl,-Bsymbolic", "-Wl,-z,now", f"-L{_emulator()}", "-lptx", f"-Wl,-rpath,{_emulator()}"]
        subprocess.run([*command, "-o", folder / "_C_cuda.so"], check=True)

    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.parent.name != "cpu"]
    return _made("cuda", [*sources, SOURCES / "cudart.cpp"], [str(home), *flags], make)
