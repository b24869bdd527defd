"""Safe, atomic, checksummed files: safetensors with one metadata key of sorted JSON.

Nothing here unpickles. A file is written next to its destination and renamed in one step, so that an interrupted run
leaves either the old file or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ltp_sparse.weights.reading import FileFormatError, parse_json, reader

if TYPE_CHECKING:
    from torch import Tensor

    from ltp_sparse.weights.digests import Hash

KEY = "ltp_sparse"
FORMAT_VERSION = 2
"""2: checksums and fingerprints are XXH3. 1: SHA-256; such files can be read as well."""
_MOST_LINKS = 40
_LONGEST_NAME = 200  # bytes, of the 255 that file systems allow
_PIECE = 1 << 20  # bytes that stay in the cache between copying and digesting
_FULL = 1 << 16  # bytes; a disk with less free space counts as full
_KINDS = {"d": "a folder", "c": "a device", "b": "a device", "p": "a pipe", "s": "a socket"}
"""First letter of `stat.filemode` -> kind."""


class WrongKind(FileFormatError):
    """A file of ltp_sparse of another kind.

    Attributes:
        found: the kind of the file.
    """

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(path, f"expected {_a(expected)}, got {_a(found)}")
        self.found = found


def _a(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path to write to, in a temporary folder next to `path`. On success the file is moved to `path` in one
    step.

    Symbolic links stay and their target is replaced. An existing file keeps its mode and, where the system allows it,
    its owner. Leftovers of killed writes of this name are removed.

    Raises:
        OSError: `path` is no regular file, or cannot be written. An existing file is unchanged then.
    """
    target = destination(path)
    with _workplace(target) as temporary:
        yield temporary
        sync(temporary)
        _keep_owner_and_mode(target, temporary)
        temporary.replace(target)
        sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file of UTF-8 text by `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder next to `path` to fill. On success it replaces `path` in one step.

    Raises:
        OSError: `path` cannot be written, is a file, or is a folder that is not empty: nothing is overwritten.
    """
    target = Path(path).resolve()
    check_writable(target, folder=True)
    if any(target.iterdir()):
        raise OSError(errno.ENOTEMPTY, "expected a new or empty folder, but this one is not empty", str(path))
    with _workplace(target) as temporary:
        temporary.mkdir()
        temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            sync(file)
        sync_folder(temporary)
        temporary.replace(target)
        sync_folder(target.parent)


def destination(path: str | os.PathLike[str]) -> Path:
    """The regular file to which a path leads through symbolic links. It need not exist.

    Raises:
        OSError: the path leads to something else (a folder, a device, a pipe, a socket), or its links form a circle.
    """
    place = os.path.abspath(path)
    with _naming(Path(path)), suppress(FileNotFoundError):
        os.lstat(place)  # fails for a name that is too long and for a folder without access
    for _ in range(_MOST_LINKS):
        place = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
        # e.g. /dev/stdout, to which other processes can write
        if place.startswith("/proc/") and os.path.lexists(place):
            raise OSError(errno.EINVAL, "expected a regular file to write to, but this is an open stream", str(path))
        if not os.path.islink(place):
            break
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    else:
        raise OSError(errno.ELOOP, "its symbolic links lead in a circle", str(path))
    try:
        mode = os.lstat(place).st_mode
    except FileNotFoundError:
        return Path(place)
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.filemode(mode)[0], "something else")
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"expected a regular file to write to, but this is {kind}", str(path))
    return Path(place)


def check_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Checks before hours of work that a file, or files in a folder, can be written. Creates a missing folder.

    Args:
        path: the file, or with `folder` the folder.
        folder: whether `path` is a folder.

    Raises:
        OSError: they cannot.
    """
    if folder:
        place = Path(path)
        if os.path.exists(place) and not place.is_dir():  # exists() is False for a name that is too long
            raise NotADirectoryError(errno.ENOTDIR, "expected a folder to write to, but this is a file", str(path))
    else:
        place = destination(path).parent
    with _naming(Path(path)):
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes leftovers of killed writes from a folder, for one file name or all. Writes in progress are kept."""
    wanted = re.compile(rf"\.{'.+' if name is None else re.escape(_shortened(name))}\.[a-z0-9_]{{8}}\.tmp")
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if wanted.fullmatch(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                        if entry.is_dir():
                            shutil.rmtree(entry.path)
                        else:
                            os.unlink(entry.path)
                    finally:
                        os.close(handle)


def sync(file: Path) -> None:
    """Waits until a file is on disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _shortened(name: str) -> str:
    """A file name that leaves room for a prefix and a suffix. Long names are cut and made distinct by a digest."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME:
        return name
    return f"{encoded[:_LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:8]}"


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """Gives a path with the target's name in a new folder next to it, which is locked while its writer lives.

    It is a folder because some writers create further files next to the requested one.
    """
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        while True:
            place = target.parent / f".{_shortened(target.name)}.{secrets.token_hex(4)}.tmp"
            place.mkdir(mode=0o700)
            try:
                handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # swept between the two calls
                continue
            with suppress(OSError):  # on file systems without locks, nothing is swept
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists():
                break
            os.close(handle)
    try:
        with _naming(target, place):
            yield place / target.name
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def _keep_owner_and_mode(target: Path, temporary: Path) -> None:
    """Copies the mode of the file that is replaced, or sets the system's default for new files."""
    try:
        before = target.stat()
    except FileNotFoundError:
        probe = temporary.with_name("mode")  # the only way to learn the umask in a thread
        probe.touch()
        before = probe.stat()
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):
            os.chown(temporary, before.st_uid, before.st_gid)
    temporary.chmod(stat.S_IMODE(before.st_mode))


@contextmanager
def _naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns errors of writing a file or its temporary folder into an OSError that names the file."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        found = re.search(r"os error (\d+)", str(error))  # the form in messages of safetensors
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number is None and not isinstance(error, OSError) and temporary is not None:
            with suppress(OSError):  # torch.save does not say why it failed
                number = errno.ENOSPC if shutil.disk_usage(temporary.parent).free < _FULL else None
        where = getattr(error, "filename", None) or str(path)
        ours = where == str(path) or (temporary is not None and Path(where).is_relative_to(temporary))
        if not ours or (number is None and not isinstance(error, OSError)):
            raise
        why = str(error) if number is None else os.strerror(number)
        problem = f"cannot be written: {why[:1].lower()}{why[1:]}; an existing file is unchanged"
        raise OSError(number or errno.EIO, problem, str(path)) from error


def checksum_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, like: str | None = None
) -> str:
    """The checksum of JSON values and tensors; `like` as for `digests.Hash`."""
    from ltp_sparse.weights.digests import Hash

    found = Hash(like).update(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        found.update(_tensor_line(name, tensor)).update(tensor)
    return found.digest()


def _tensor_line(name: str, tensor: Tensor) -> bytes:
    """The description of a tensor that goes into a checksum with its bits."""
    return f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()


def verify(path: str | os.PathLike[str]) -> str:
    """Compares a file of `save` with its checksum, and returns the checksum. The file is mapped, not loaded.

    Raises:
        FileFormatError: the checksum differs, or `save` did not write the file.
    """
    path = Path(path)
    with _reading(path), safe_open(path, framework="pt") as file:
        metadata, checksum = _described((file.metadata() or {}).get(KEY), path, "file with a checksum")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = checksum_of(metadata, tensors, checksum)
    if found != checksum:
        raise FileFormatError(path, "the checksum does not match its content; the file is damaged")
    return checksum


def save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a checksummed safetensors file, atomically.

    Args:
        path: the file.
        kind: the kind of the file, such as "ticket", which `load` compares.
        tensors: name -> tensor.
        metadata: JSON values.
    """
    contiguous, header, _ = ready(kind, tensors, metadata)
    write(path, contiguous, header)


def to_bytes(kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The content of the file that `save` writes."""
    from safetensors.torch import save as save_bytes

    contiguous, header, _ = ready(kind, tensors, metadata)
    return save_bytes(contiguous, metadata={KEY: header})


def ready(kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[dict[str, Tensor], str, str]:
    """(contiguous tensors on the host, header, checksum in this header), ready for `write`."""
    metadata = {**metadata, "kind": kind, "format": FORMAT_VERSION}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = checksum_of(metadata, contiguous)
    return contiguous, json.dumps({**metadata, "checksum": checksum}, sort_keys=True), checksum


def write(path: str | os.PathLike[str], contiguous: dict[str, Tensor], header: str) -> None:
    """Writes the tensors and the header that `ready` has returned."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={KEY: header})


def claimed_kind(path: str | os.PathLike[str]) -> str | None:
    """The kind that the header of a safetensors file claims, unverified; "" for files of other programs.

    It is None for a file that cannot be read, so that the loader can report the reason.
    """
    try:
        with safe_open(path, framework="np") as file:  # imports no torch
            header = (file.metadata() or {}).get(KEY)
        return "" if header is None else str(json.loads(header)["kind"])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError):
        return None


@reader("safetensors of ltp_sparse")
def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file written by `save`, verified against its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, damaged, of another kind or of a newer format.
    """
    tensors, metadata, _ = load_verified(path, kind)
    return tensors, metadata


def load_verified(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """(tensors, metadata, checksum) of a file. Each tensor is copied once and digested piece by piece meanwhile."""
    from ltp_sparse.weights.digests import Hash

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {_a(kind)} written by ltp_sparse")
    with _reading(path), safe_open(path, framework="pt") as file:
        metadata, checksum = _described((file.metadata() or {}).get(KEY), path, kind)
        content = Hash(checksum).update(json.dumps(metadata, sort_keys=True).encode())
        copies = {name: _copied(name, file.get_tensor(name), content) for name in sorted(file.keys())}
        tensors = {name: copies[name] for name in file.keys()}  # noqa: SIM118
    _check_found(path, kind, metadata, content.digest() == checksum)
    return tensors, metadata, checksum


def from_bytes(content: bytes, path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `load` returns for a file with this content. `path`: its name, for messages."""
    from safetensors.torch import load as load_bytes

    path = Path(path)
    with _reading(path):
        tensors = load_bytes(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    metadata, checksum = _described(header.get(KEY), path, kind)
    _check_found(path, kind, metadata, checksum_of(metadata, tensors, checksum) == checksum)
    return tensors, metadata


def _described(header: str | None, path: Path, kind: str) -> tuple[dict[str, Any], str]:
    """(metadata, checksum) in the header of a file."""
    if header is None:
        raise FileFormatError(path, f"a safetensors file, but not one of ltp_sparse; expected {_a(kind)}")
    metadata = parse_json(header, path, "metadata")
    check_format(path, metadata)
    return metadata, metadata.pop("checksum")


def _check_found(path: Path, kind: str, metadata: Mapping[str, Any], intact: bool) -> None:
    if not intact:
        raise FileFormatError(path, "the checksum does not match its content; the file is damaged, copy it again")
    if metadata["kind"] != kind:
        raise WrongKind(path, kind, str(metadata["kind"]))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of reading a safetensors file into a FileFormatError."""
    try:
        yield
    except FileFormatError:
        raise
    except (SafetensorError, ValueError, RuntimeError, OSError, LookupError, TypeError, MemoryError) as error:
        raise FileFormatError(path, f"not a readable safetensors file ({error}); {cure(path)}") from error


def cure(path: Path) -> str:
    """What to do about a file that is no safetensors file, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        start = b""
    if start.startswith((b"PK\3\4", b"\x80\2\x8a")):
        return "it is pickled: pass what torch.load(..., weights_only=True) gives, or convert it to safetensors"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch the file by git lfs pull"
    return "it may be truncated, copy it again"


def check_format(path: Path, described: object) -> None:
    """Raises a FileFormatError unless it describes content of a format that this version reads."""
    from ltp_sparse.weights.digests import is_known

    if not isinstance(described, dict) or not {"checksum", "kind", "format"} <= set(described):
        raise FileFormatError(path, "no checksum, kind and format in it; copy the file again", "metadata")
    if (version := described["format"]) not in (1, FORMAT_VERSION):  # a newer one may have another checksum
        raise FileFormatError(
            path, f"format {version} is none that this version reads, 1 to {FORMAT_VERSION}; update ltp_sparse"
        )
    if not is_known(described["checksum"]):
        raise FileFormatError(path, "its checksum is none that this version knows; the file is damaged, copy it again")


def _copied(name: str, mapped: Tensor, content: Hash) -> Tensor:
    """A copy of a mapped tensor: a view would change, or fault, when the file is replaced."""
    own = mapped.new_empty(mapped.shape)
    content.update(_tensor_line(name, own))
    size = max(1, _PIECE // own.element_size())
    for to, piece in zip(own.view(-1).split(size), mapped.view(-1).split(size), strict=True):
        content.update(to.copy_(piece))
    return own


@contextmanager
def understanding(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turns errors of interpreting the content of an intact file into a FileFormatError."""
    try:
        yield
    except FileFormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise FileFormatError(path, f"its content is not that of {_a(kind)} of ltp_sparse ({reason})") from error


def checked_metadata(what: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of metadata, checked to be JSON.

    Raises:
        TypeError: a key or a value is not JSON; the message names it.
    """
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        try:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no string")
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{what}: metadata[{key!r}] must be JSON (strings, numbers, lists, mappings), "
                f"got {type(value).__name__} ({error})"
            ) from error
    return metadata
