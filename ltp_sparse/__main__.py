"""`python -m ltp_sparse`: versions and backends, with the reason where one is missing."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from ltp_sparse import __version__, backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    print(f"ltp_sparse {__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    print(
        ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "transformers", "datasets", "safetensors"))
    )
    if isa := backends.isa():
        print(f"compiled for {isa} on this processor")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        chosen = backends.resolve(torch.device(device)).name
        print(f"\n{device} tensors:")
        for name, status in backends.available_backends(device).items():
            print(f"  {name:<10} {status}{'  <- used' if name == chosen else ''}")


if __name__ == "__main__":
    main()
