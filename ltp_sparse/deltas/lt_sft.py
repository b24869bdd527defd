"""Files of LT-SFT: reads `pytorch_diff.bin` into a `SparseDelta` and writes it.

The file is a pickled dict. "diffs": name -> {"size": shape, "index_steps": list of the first differences of sorted flat
indices, in which the first dimension runs fastest, "values": deltas}. "abs": name -> whole tensors, such as a head.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, nn

from ltp_sparse.deltas.delta import SparseDelta, base_fingerprint
from ltp_sparse.deltas.entries import gather_all
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.files import atomic_path
from ltp_sparse.weights.names import Named, canonical_parameters, match_names, strip_wrappers
from ltp_sparse.weights.reading import FileFormatError, Place, reader

FILE = "pytorch_diff.bin"
SMALLEST = 1e-7
"""LT-SFT leaves out entries that changed by at most this much."""


@reader("LT-SFT")
def read_lt_sft(path: str | os.PathLike[str], model: nn.Module) -> SparseDelta:
    """Reads an LT-SFT file.

    Whole tensors of the file ("abs", e.g. a head that the model lacks) become the `dense` of the delta. Only tensors
    and numbers are unpickled. A file that would run code is refused.

    Args:
        path: the file or its folder.
        model: the base model at its initial weights, without deltas. The file has differences only; values and
            originals of the delta are computed from these weights.

    Returns:
        The delta.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is damaged, of another kind, or made for another model.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    content = _unpickled(path)
    if not isinstance(content, dict) or not set(content) & {"diffs", "abs"}:
        raise FileFormatError(
            path, f"expected a dict with 'diffs' and 'abs' as LT-SFT writes it, got {type(content).__name__}"
        )
    parameters = canonical_parameters(model)
    parts = {part: _named(content.get(part), parameters, path, part) for part in ("diffs", "abs")}
    if twice := [name for name in parts["diffs"] if name in parts["abs"]]:
        raise FileFormatError(path, "it has both a difference and a whole tensor", f"{twice[0]!r}")
    try:
        match_names(parts["diffs"], parameters, what="read_lt_sft", where="the model")
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    sets, shapes, moved = {}, {}, {}
    for name in (name for name in parameters if name in parts["diffs"]):  # in canonical order
        where = Place(path, repr(name))
        indices, deltas, size = _decoded(parts["diffs"][name], where)
        if size != parameters[name].shape:
            raise where.error(f"has shape {list(size)}, in the model {list(parameters[name].shape)}")
        sets[name], shapes[name] = IndexSet.from_indices(indices, size.numel()).compact(), size
        moved[name] = deltas
    originals = {name: held.cpu() for name, held in gather_all({n: parameters[n] for n in sets}, sets).items()}
    values = {name: (held.float() + moved[name]).to(held.dtype) for name, held in originals.items()}
    dense = {name: _tensor(tensor, Place(path, repr(name))).clone() for name, tensor in parts["abs"].items()}
    ticket = Ticket(sets, shapes, {"method": "lt-sft", "source": path.name}, base_fingerprint(model, sets))
    return SparseDelta(ticket, values, originals, dense, {"method": "lt-sft", "source": path.name})


def write_lt_sft(delta: SparseDelta, path: str | os.PathLike[str]) -> None:
    """Writes a delta as a file of LT-SFT, atomically. Entries that changed by at most `SMALLEST` are left out, as
    there.

    Args:
        delta: a delta with originals.
        path: the file, or a folder to write `pytorch_diff.bin` into.

    Raises:
        ValueError: the delta has no originals, so its differences are unknown.
    """
    if missing := [name for name in delta.values if name not in delta.originals]:
        raise ValueError(f"write_lt_sft: expected a delta with originals, but it has none of {missing[0]!r}")
    diffs = {}
    for name, values in delta.values.items():
        moved = values.float() - delta.originals[name].float()
        kept = moved.abs() > SMALLEST
        size = delta.ticket.shapes[name]
        indices = delta.ticket.indices(name).to(torch.int64)[kept]
        order = (columns := _transposed(indices, size)).argsort()
        steps = torch.diff(columns[order], prepend=columns.new_zeros(1))
        dtype = torch.int32 if size.numel() <= 2**31 else torch.int64
        diffs[name] = {"size": size, "index_steps": steps.to(dtype), "values": moved[kept][order]}
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    with atomic_path(path) as temporary:
        torch.save({"diffs": diffs, "abs": dict(delta.dense)}, temporary)


def _named(part: Any, parameters: Named[nn.Parameter], path: Path, key: str) -> dict[str, Any]:
    """A part of the file under canonical names; it can use any name of a tied parameter."""
    if not isinstance(part, dict | None) or not all(isinstance(name, str) for name in part or ()):
        raise FileFormatError(path, f"expected a dict of names, got {type(part).__name__}", repr(key))
    named: dict[str, Any] = {}
    for name, value in (part or {}).items():
        stripped = strip_wrappers(name)
        if (canonical := parameters.called(stripped) or stripped) in named:
            raise FileFormatError(path, f"a second name of {canonical!r}", f"{name!r}")
        named[canonical] = value
    return named


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {FILE} of LT-SFT")
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                _check_archive(path)
        with torch.serialization.safe_globals(_numpy_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileFormatError:
        raise
    except Exception as error:  # a damaged file can raise any exception here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileFormatError(path, f"not a readable file of tensors and numbers ({reason})") from error


def _check_archive(path: Path) -> None:
    """Verifies the checksums of the archive, which torch ignores, and refuses compressed archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or (
                sum(m.file_size for m in members) > path.stat().st_size
            ):
                raise FileFormatError(path, "a compressed archive, which torch.save never writes; unpack it")
            for member in members:
                # the only object that torch unpickles to more memory than the file has bytes
                if member.filename.endswith("data.pkl") and b"bytearray" in archive.read(member):
                    raise FileFormatError(path, "it allocates a bytearray; LT-SFT's files have none", member.filename)
            if (damaged := archive.testzip()) is not None:
                raise FileFormatError(path, "the checksum does not match; the file is damaged, copy it again", damaged)
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(path, f"not a readable file of torch.save ({error}); it may be truncated") from error


class _Array:
    """Replaces numpy arrays during unpickling: numpy would allocate memory before the check."""

    def __init__(self) -> None:
        self.values = np.empty(0, dtype=np.int64)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, raw = state
        values = np.frombuffer(raw, dtype=_plain(dtype))
        if math.prod(shape) != len(values):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(values)} values")
        self.values = values


def _plain(dtype: Any) -> np.dtype:
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise pickle.UnpicklingError(f"numbers of the type {dtype}")
    return dtype


def _scalar(dtype: Any, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype=_plain(dtype), count=1)[0]


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _numpy_numbers() -> list[Any]:
    """The classes in pickled numpy numbers and arrays, under the names of numpy 1 and 2; index steps contain them."""
    names: list[Any] = [(_Array, "numpy.ndarray"), np.dtype]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(_scalar, f"{module}.scalar"), (_reconstruct, f"{module}._reconstruct")]
    kinds = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
    return [*names, *(type(np.dtype(kind)) for kind in kinds)]


def _decoded(diff: Any, where: Place) -> tuple[Tensor, Tensor, Size]:
    """(ascending row-major indices int64 [k], deltas float32 [k] in their order, shape)"""
    if not isinstance(diff, Mapping) or {"size", "index_steps", "values"} - set(diff):
        raise where.error(f"expected size, index_steps and values, got {str(diff)[:80]}")
    size = Size(_integers(diff["size"], where).tolist())
    if any(n < 0 for n in size) or (total := math.prod(size)) >= 2**63:  # numel() would wrap around
        raise where.error(f"cannot have the shape {list(size)}")
    steps, deltas = _integers(diff["index_steps"], where), _flat(diff["values"], np.float32, where).float()
    if steps.numel() != deltas.numel():
        raise where.error(f"{steps.numel():,} indices and {deltas.numel():,} values; the numbers must be equal")
    columns = steps.cumsum(0)
    if columns.numel() and (
        int(columns[0]) < 0 or bool((columns[1:] <= columns[:-1]).any()) or int(columns[-1]) >= total
    ):
        raise where.error(f"indices must ascend from 0 to below {total:,}; the file is damaged")
    if not bool(torch.isfinite(deltas).all()):
        raise where.error("a value is NaN or infinite; the file is damaged")
    indices = _transposed(columns, Size(reversed(size)))
    order = indices.argsort()
    return indices[order], deltas[order], size


def _flat(numbers: Any, dtype: Any, where: Place) -> Tensor:
    """[k] from a tensor, an array, or a list (LT-SFT's, whose first item is a numpy number), which becomes `dtype`."""
    if isinstance(numbers, Tensor):
        return _tensor(numbers, where).reshape(-1)
    array = numbers.values if isinstance(numbers, _Array) else _listed(numbers, dtype, where)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _integers(numbers: Any, where: Place) -> Tensor:
    """int64 [k]"""
    found = _flat(numbers, np.int64, where)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise where.error(f"expected whole numbers, got {type(numbers).__name__}")
    return found.to(torch.int64)


def _listed(numbers: Any, dtype: Any, where: Place) -> np.ndarray:
    known = (int, np.integer) if dtype is np.int64 else (int, float, np.number)
    if not isinstance(numbers, list | tuple) or not all(
        issubclass(kind, known) and kind is not bool for kind in set(map(type, numbers))
    ):
        raise where.error(f"expected a list of numbers or a tensor, got {type(numbers).__name__}")
    try:
        return np.fromiter(numbers, dtype=dtype, count=len(numbers))
    except OverflowError as error:
        raise where.error(f"a number out of range ({error})") from error


def _tensor(tensor: Any, where: Place) -> Tensor:
    """A tensor of the file, checked to be plain and complete: a view could repeat a single stored number."""
    if not isinstance(tensor, Tensor):
        raise where.error(f"expected a tensor, got {type(tensor).__name__}")
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise where.error(f"expected a plain tensor, got one of {tensor.layout}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise where.error(f"the shape {list(tensor.shape)} has more entries than the file")
    return tensor


def _transposed(indices: Tensor, size: Size) -> Tensor:
    """Flat row-major indices of a shape -> indices of the same entries with the first dimension running fastest."""
    result, stride = torch.zeros_like(indices), math.prod(size)
    for n in reversed(size):
        stride //= max(n, 1)
        result += indices % n * stride
        indices = indices // n
    return result
