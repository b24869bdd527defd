"""Safe, atomic, checksummed files: safetensors with one metadata key of sorted JSON.

Nothing here unpickles. A file is written beside its destination and moved there in one step, so that an interrupted run
leaves either the old file or the new one.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

KEY = "ltp_sparse"
FORMAT_VERSION = 1


class FileFormatError(ValueError):
    """A file cannot be read as what it should be: truncated, damaged, foreign, or with content that makes no sense.

    Every reader of the library raises this and nothing else for the content of a file. (A file that is not there is a
    FileNotFoundError.)

    Args:
        path: the file.
        problem: what was expected, what came, what to do.
        place: where in the file, e.g. "line 3", "tensor 'w'" or "metadata"; None for the file as a whole.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str, place: str | None = None) -> None:
        super().__init__(f"{path}: {problem}" if place is None else f"{path}, {place}: {problem}")
        self.path = Path(path)
        self.problem = problem
        self.place = place

    def __reduce__(self) -> tuple[type[FileFormatError], tuple[Path, str, str | None]]:
        return FileFormatError, (self.path, self.problem, self.place)


class WrongKind(FileFormatError):
    """A file of ltp_sparse, but of another kind; found: which."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(path, f"expected {_a(expected)}, got {_a(found)}")
        self.found = found


def _a(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def host_blocks(tensor: Tensor) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """The bits of a tensor, row-major, some megabytes at a time; a block is good until the next is asked for."""
    tensor = tensor.detach()
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"expected a plain tensor, got a {type(tensor).__name__}, whose entries do not lie in its own memory; pass "
            "what it holds: full_tensor() or to_local() of a DTensor (select_sharded takes those), dequantize() of a "
            "quantised one"
        )
    # in blocks, so that copies of strided tensors and from other devices stay small
    blocks = [tensor] if tensor.is_contiguous() else tensor.split(max(1, (len(tensor) << 20) // tensor.numel()))
    for piece in (piece for block in blocks for piece in block.reshape(-1).split(1 << 20)):
        host = piece.cpu().contiguous()
        if host.nbytes:
            yield (ctypes.c_char * host.nbytes).from_address(host.data_ptr())


def hash_tensor(sha: hashlib._Hash, tensor: Tensor) -> None:
    """Feeds the bits of a tensor, row-major, into a hash; dtype and shape are the caller's."""
    for block in host_blocks(tensor):
        sha.update(block)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the folder of `path`; on success it is moved there in one step, on failure removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hash_tensor(sha, tensor)
    return sha.hexdigest()


def save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes `tensors` and `metadata` (JSON values) as a file of the given kind, e.g. "ticket"."""
    metadata = {**metadata, "kind": kind, "format": FORMAT_VERSION}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.dumps({**metadata, "checksum": _checksum(contiguous, metadata)}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={KEY: header})


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file written by `save`, verified against its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {_a(kind)} written by ltp_sparse")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            # clones: a view of the mapped file would change, or fault, when the file is replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}); it may be truncated, copy it again"
        ) from error
    if header is None:
        raise ValueError(f"{path}: a safetensors file, but not one of ltp_sparse; expected {_a(kind)}")
    try:
        metadata = json.loads(header)
        checksum = metadata.pop("checksum")
        found, version = metadata["kind"], metadata["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({error!r}); copy the file again") from error
    if _checksum(tensors, metadata) != checksum:
        raise ValueError(f"{path}: the checksum does not match its content; the file is damaged, copy it again")
    if found != kind:
        raise WrongKind(path, kind, found)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {version} is not the format {FORMAT_VERSION} of this version; update ltp_sparse"
        )
    return tensors, metadata


@contextmanager
def understanding(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turns what goes wrong while the content of an intact file is taken apart into one kind of error, a ValueError."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its content is not that of {_a(kind)} of ltp_sparse ({error!r})") from error
