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

from ltp_sparse.reading import FileFormatError, parse_json, reader

KEY = "ltp_sparse"
FORMAT_VERSION = 1


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


@reader("safetensors of ltp_sparse")
def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file written by `save`, verified against its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, damaged, of another kind or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {_a(kind)} written by ltp_sparse")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            # clones: a view of the mapped file would change, or fault, when the file is replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError) as error:
        raise FileFormatError(
            path, f"not a readable safetensors file ({error}); it may be truncated, copy it again"
        ) from error
    if header is None:
        raise FileFormatError(path, f"a safetensors file, but not one of ltp_sparse; expected {_a(kind)}")
    metadata = parse_json(header, path, "metadata")
    if not isinstance(metadata, dict) or not {"checksum", "kind", "format"} <= set(metadata):
        raise FileFormatError(path, "no checksum, kind and format in it; copy the file again", "metadata")
    checksum, found, version = metadata.pop("checksum"), metadata["kind"], metadata["format"]
    if _checksum(tensors, metadata) != checksum:
        raise FileFormatError(path, "the checksum does not match its content; the file is damaged, copy it again")
    if found != kind:
        raise WrongKind(path, kind, str(found))
    if version != FORMAT_VERSION:
        raise FileFormatError(
            path, f"format {version} is not the format {FORMAT_VERSION} of this version; update ltp_sparse"
        )
    return tensors, metadata


@contextmanager
def understanding(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turns what goes wrong while the content of an intact file is taken apart into one kind of error."""
    try:
        yield
    except FileFormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        told = str(error) if type(error) is ValueError else repr(error)
        raise FileFormatError(path, f"its content is not that of {_a(kind)} of ltp_sparse ({told})") from error


def checked_metadata(what: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of metadata that a file can hold; a TypeError names the key that JSON cannot."""
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        try:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{what}: metadata[{key!r}] must be what JSON can hold (texts, numbers, lists, mappings), "
                f"got {type(value).__name__} ({error})"
            ) from error
    return metadata
