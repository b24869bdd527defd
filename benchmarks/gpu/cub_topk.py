"""CUB's DeviceTopK, compiled with nvcc where it is asked for: a peer of the selection, no part of the library.

CUB has it from CCCL 3.2 on; CUDA 13.0 comes with 3.0. The headers are looked for in the folder that CCCL_INCLUDE of the
environment names, in the installed package nvidia-cuda-cccl (13.2 or later), and in the toolkit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cu")
HEADER = "cub/device/device_topk.cuh"
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1}  # `Weight` in the source


class UnavailableError(RuntimeError):
    """Compiler or headers are missing or do not fit; the message says which."""


def compiler() -> Path:
    places = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if (found := shutil.which("nvcc", path=os.pathsep.join(places))) is None:
        raise UnavailableError("no nvcc in CUDA_HOME or on the PATH")
    return Path(found).resolve()


def include() -> Path:
    """The first folder that has CUB's top-k."""
    named, package = os.environ.get("CCCL_INCLUDE"), importlib.util.find_spec("nvidia")
    installed = (package.submodule_search_locations if package else None) or []
    folders = [Path(named)] if named else []
    folders += [folder for place in installed for folder in sorted(Path(place).glob("*/include/cccl"))]
    folders += [home / "include" / "cccl" for home in (compiler().parents[1], Path("/usr/local/cuda"))]
    if (found := next((folder for folder in folders if (folder / HEADER).exists()), None)) is None:
        places = ", ".join(map(str, folders))
        raise UnavailableError(f"no {HEADER} in {places}: install nvidia-cuda-cccl>=13.2, or set CCCL_INCLUDE")
    return found


def version() -> str:
    """CCCL's version, e.g. "3.5.0", or why there is none to compare with."""
    try:
        text = (include() / "cuda/std/__cccl/version.h").read_text()
    except (UnavailableError, OSError) as error:
        return f"skipped: {error}"
    number = int(re.search(r"define CCCL_VERSION (\d+)", text)[1])
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


class CubTopK:
    """target: the machine that it is compiled for, e.g. "sm_90".

    Raises:
        UnavailableError: it cannot be compiled here.
    """

    def __init__(self, target: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/cub_topk.so"
            flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", f"-arch={target}", f"-I{include()}"]
            command = [str(compiler()), *flags, "-o", library, str(SOURCE)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise UnavailableError(f"nvcc fails on {SOURCE.name}: {made.stderr.strip()[:500]}")
            self.binding = ctypes.CDLL(library)
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.binding.cub_topk.argtypes = [
            pointer, pointer, ctypes.c_int, size, pointer, size, pointer, ctypes.POINTER(ctypes.c_size_t), pointer
        ]  # fmt: skip
        self.binding.cub_topk_error.restype = ctypes.c_char_p

    @staticmethod
    @cache
    def on(device: torch.device) -> CubTopK:
        """Compiled for this device.

        Raises:
            UnavailableError: it is not a CUDA device, or CUB cannot be compiled here.
        """
        if device.type != "cuda":
            raise UnavailableError("needs a CUDA device")
        major, minor = torch.cuda.get_device_capability(device)
        return CubTopK(f"sm_{major}{minor}")

    def __call__(self, k: int, initial: Tensor, tuned: Tensor | None = None) -> Tensor:
        """The k largest |tuned - initial|, or the k largest values where `tuned` is not given; in no order.

        initial, tuned: [n] float32, or both bfloat16 and tuned given; contiguous, on the device
        returns:        [k] float32
        """
        found = torch.empty(k, device=initial.device)
        stream, needed = torch.cuda.current_stream(initial.device).cuda_stream, ctypes.c_size_t()
        other = None if tuned is None else tuned.data_ptr()

        def call(temporary: int | None) -> None:
            status = self.binding.cub_topk(
                initial.data_ptr(), other, WEIGHTS[initial.dtype], initial.numel(), found.data_ptr(), k, temporary,
                needed, stream,
            )  # fmt: skip
            if status:
                raise RuntimeError(f"cub_topk: {self.binding.cub_topk_error(status).decode()}")

        call(None)
        temporary = torch.empty(needed.value, dtype=torch.uint8, device=initial.device)
        call(temporary.data_ptr())
        return found
