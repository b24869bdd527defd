"""The process of an emulated GPU: its memory, its CUDA runtime, Triton's driver, and what the emulator has to tell."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Config(ctypes.Structure):
    """As in tests/ptx/emulator/machine.h, which says what the fields are."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("random", "burst", "resident", "races", "sm", "processors", "shared")),
        ("first_block", ctypes.c_uint64),
        ("last_block", ctypes.c_uint64),
    ]


DEFAULTS = {
    "seed": 1, "random": 0, "burst": 64, "resident": 3, "races": 1, "sm": 90, "processors": 2, "shared": 232448,
    "first_block": 0, "last_block": 2**64 - 1,
}  # fmt: skip
config = Config(**DEFAULTS)
_library: Any = None
_cuda_ptx: list[str] = []


def start(emulator: Path, cuda: Path | None) -> None:
    """Makes this process the GPU's."""
    global _library
    import torch

    _library = ctypes.CDLL(str(emulator / "libptx.so"))
    for name in ("error", "reports", "statistics", "coverage"):
        getattr(_library, f"ptx_{name}").restype = ctypes.c_char_p
    _library.ptx_kernel.restype = ctypes.c_void_p
    torch.set_num_threads(1)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=config.processors)
    for name in ("frombuffer", "from_numpy"):  # memory of others: a copy to the device follows
        setattr(torch, name, _copying(getattr(torch, name)))
    if cuda is not None:
        load_cuda(sorted(cuda.glob("*.ptx")))
        spec = importlib.util.spec_from_file_location("_C_cuda", cuda / "_C_cuda.so")
        sys.modules["ltp_sparse._C_cuda"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    _serve_cpu_tensors()
    if importlib.util.find_spec("triton"):
        _drive_triton()


def run(function: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, int]) -> Any:
    """Calls the function on the device as it is set, and fails if there is anything to report."""
    _library.ptx_clear()
    configure(**DEFAULTS | settings)
    result = function(*arguments)
    found = [f"{what}: {count} times, first {first}" for what, (count, first) in reports().items()]
    assert not found, "\n".join(found)
    return result


def configure(**settings: int) -> None:
    for name, value in settings.items():
        setattr(config, name, value)
    _library.ptx_configure(ctypes.byref(config))


def load(ptx: str) -> int:
    """The number of a module."""
    number = _library.ptx_load(ptx.encode())
    if number < 0:
        raise RuntimeError(_library.ptx_error().decode())
    return number


def load_cuda(files: Iterable[Path]) -> None:
    """The PTX of the CUDA kernels, for one architecture."""
    texts = [path.read_text() for path in files]
    _cuda_ptx.extend(texts)
    for text in texts:
        load(text)


def launch(kernel: int, grid: tuple[int, ...], block: tuple[int, ...], shared: int, values: list[int]) -> None:
    """values: a number of at most 64 bits for each parameter."""
    wanted = _library.ptx_parameters(ctypes.c_void_p(kernel))
    if wanted != len(values):
        raise RuntimeError(f"a kernel of {wanted} parameters is launched with {len(values)}")
    slots = (ctypes.c_uint64 * len(values))(*(value % 2**64 for value in values))
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(slots) + 8 * i for i in range(len(values))))
    sizes = (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block)
    if _library.ptx_launch(ctypes.c_void_p(kernel), *sizes, shared, places):
        raise RuntimeError(_library.ptx_error().decode())


def only_kernel(module: int) -> int:
    return _library.ptx_kernel(module, None)


def reports() -> dict[str, tuple[int, str]]:
    """What is wrong, of which instruction -> (how often, the first time in full); equal bytes written twice are not."""
    return {what: found for what, found in json.loads(_library.ptx_reports()).items() if "benign" not in what}


def clear() -> None:
    """Forgets reports and statistics."""
    _library.ptx_clear()


def statistics() -> dict[str, dict[str, int]]:
    """Kernel -> counts of all its launches: the fields of `Statistics` in tests/ptx/emulator/machine.h."""
    return json.loads(_library.ptx_statistics())


def coverage() -> dict[str, dict[str, tuple[int, int]]]:
    """Architecture -> kernel -> (instructions that ran at least once, all)."""
    return json.loads(_library.ptx_coverage())


@contextmanager
def without(kernel: str, pattern: str, number: int | None = None) -> Iterator[None]:
    """The CUDA kernels whose names have a part run without the instructions that match; number: without one of them."""
    loaded = 0
    for text in _cuda_ptx:
        pieces = re.split(r"(?=\.entry )", text)
        spoilt = [_without(p, pattern, number) if kernel in p.split("(")[0] else p for p in pieces]
        if spoilt != pieces:
            load("".join(spoilt))
            loaded += 1
    assert loaded, f"no kernel {kernel} has {pattern}"
    try:
        yield
    finally:
        for _ in range(loaded):
            _library.ptx_unload()


def is_noticed(
    kernel: str, pattern: str, function: Callable[..., Any], arguments: tuple[Any, ...], number: int | None = None
) -> bool:
    """Whether it shows what CUDA kernels lack (see `without`) when the function is called: by an error, or a report."""
    with without(kernel, pattern, number):
        try:
            function(*arguments)
        except (AssertionError, RuntimeError):
            return True
        finally:
            found = reports()
            clear()
    return bool(found)


def _without(text: str, pattern: str, number: int | None) -> str:
    numbers = itertools.count()
    return re.sub(rf"\b{pattern}[^;]*;", lambda m: m[0] if number not in (None, next(numbers)) else "", text)


def _copying(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: function(*arguments, **options).clone()


def _serve_cpu_tensors() -> None:
    """The backends for a GPU, by their names, take CPU tensors."""
    from ltp_sparse.backends import choice, cuda, reference, triton

    modules = {"reference": reference, "compiled": cuda, "triton": triton}
    choice._module = lambda name, device: modules[name]
    triton.probe = lambda device: None


# --- Triton: its compiler up to PTX, and a driver that launches here ---


def _drive_triton() -> None:
    from triton import knobs
    from triton.runtime import driver

    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
    driver.set_active(_Driver())


def _stop_at_ptx(backend: Any = None, stages: dict[str, Any] | None = None, *more: Any) -> tuple[str, str]:
    """Without arguments, as Triton 3.7 calls it also: its part of the keys of Triton's caches."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return "ptx", "ptx"


class _Utils:
    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        module = load(ptx.decode())
        kernel = only_kernel(module)
        _library.ptx_opt_in(ctypes.c_void_p(kernel), shared)
        return module, kernel, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": config.shared, "multiprocessor_count": config.processors, "warpSize": 32}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        self.kinds = list(source.signature.values())
        self.block, self.shared = (32 * metadata.num_warps, 1, 1), metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: int, *more: Any) -> None:
        arguments = more[4:]  # behind metadata and hooks
        values = [
            (0 if value is None else value.data_ptr()) if kind.startswith("*") else int(value)
            for value, kind in zip(arguments, self.kinds, strict=True)
            if kind != "constexpr"
        ]
        launch(kernel, (x, y, z), self.block, self.shared, [*values, 0, 0])  # the scratch memory, none


class _Driver:
    """A driver whose devices are architectures."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return config.sm

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", config.sm, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")
