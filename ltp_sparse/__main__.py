"""`python -m ltp_sparse`: versions, backends (with the reason where one is missing), and the choices of `auto`."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from itertools import groupby

import torch

from ltp_sparse import __version__, backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _served(device: torch.device) -> dict[tuple[str, str], list[tuple[float, str]]]:
    """(operation, dtype) -> (density, the backend that serves it), for all rows of the table."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for op, dtype, density, _ in backends.choices()[device.type]["rows"]:
        name = backends.resolve(device, op, getattr(torch, dtype), density).name
        found.setdefault((op, dtype), []).append((density, name))
    return found


def _by_density(cells: list[tuple[float, str]]) -> str:
    """Neighbouring densities of one backend together, e.g. "triton to 0.05, compiled to 1"."""
    groups = [(name, [density for density, _ in group]) for name, group in groupby(cells, key=lambda cell: cell[1])]
    return groups[0][0] if len(groups) == 1 else ", ".join(f"{name} to {found[-1]:g}" for name, found in groups)


def _print_device(device: torch.device) -> None:
    print(f"\n{device} tensors:")
    try:
        served = _served(device)
    except backends.BackendUnavailable as error:
        print(f"  {error}")
        served = {}
    used = {name for cells in served.values() for _, name in cells}
    for name, status in backends.available_backends(device).items():
        print(f"  {name:<10} {status}{'  <- used' if name in used else ''}")
    if backends.chosen() != "auto":
        print(f"  chosen by hand: {backends.chosen()}")
        return
    section = backends.choices()[device.type]
    print(f"  auto's choice, {'measured' if section['measured'] else 'not measured'} ({section['source']}):")
    for op in backends.OPERATIONS:
        lines = {dtype: _by_density(cells) for (of, dtype), cells in served.items() if of == op}
        for line in dict.fromkeys(lines.values()):
            print(f"  {op:<14} {', '.join(dtype for dtype in lines if lines[dtype] == line)}: {line}")


def main() -> None:
    print(f"ltp_sparse {__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    others = ("triton", "transformers", "datasets", "safetensors")
    print(f"torch {torch.__version__}", *(f"{name} {_version(name)}" for name in others), sep=", ")
    if isa := backends.isa():
        print(f"compiled for {isa} on this processor")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        _print_device(torch.device(device))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # of the environment
        sys.exit(f"ltp_sparse: {error}")
