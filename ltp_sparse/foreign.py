"""LT-SFT's files: `pytorch_diff.bin` read into a `SparseDelta`, and written from one (METHODS.md 5).

The file is a pickled dict. "diffs": name -> {"size": shape, "index_steps": first differences of sorted flat indices,
in which the first dimension runs fastest, "values": deltas}; "abs": name -> whole tensors, such as a head.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from ltp_sparse.delta import SparseDelta, base_fingerprint, gather
from ltp_sparse.encoding import IndexSet
from ltp_sparse.files import atomic_path
from ltp_sparse.names import canonical_parameters, match_names, strip_wrappers
from ltp_sparse.ticket import Ticket

FILE = "pytorch_diff.bin"
SMALLEST = 1e-7
"""LT-SFT leaves out entries that moved by no more than this."""


def read_lt_sft(path: str | os.PathLike[str], model: nn.Module) -> SparseDelta:
    """The delta of an LT-SFT file, or of the folder that holds it.

    model: the base model. The file has differences only: values and originals of the delta are made from its weights,
        which must be the initial ones, with no delta applied.

    Only tensors and numbers are unpickled; a file that wants to run code is refused.

    Raises FileNotFoundError, or ValueError: the file is damaged, not of this kind, or made for another model.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    content = _unpickled(path)
    if not isinstance(content, dict) or not isinstance(content.get("diffs"), dict):
        raise ValueError(
            f"{path}: expected a dict with 'diffs' and 'abs' as LT-SFT writes it, got {type(content).__name__}"
        )
    parameters = canonical_parameters(model)
    diffs = {strip_wrappers(name): diff for name, diff in content["diffs"].items()}
    match_names(diffs, parameters, what="read_lt_sft", where="the model")
    sets, shapes, values, originals = {}, {}, {}, {}
    for name in (name for name in parameters if name in diffs):  # in canonical order
        indices, deltas, size = _decoded(diffs[name], f"{path}: {name!r}")
        if size != parameters[name].shape:
            raise ValueError(f"{path}: {name!r} has shape {list(size)}, in the model {list(parameters[name].shape)}")
        sets[name], shapes[name] = IndexSet.from_indices(indices, size.numel()).compact(), size
        originals[name] = gather(parameters[name], sets[name]).cpu()
        values[name] = (originals[name].float() + deltas.float()).to(originals[name].dtype)
    dense = {strip_wrappers(name): tensor.clone() for name, tensor in (content.get("abs") or {}).items()}
    ticket = Ticket(sets, shapes, {"method": "lt-sft", "source": path.name}, base_fingerprint(model, sets))
    return SparseDelta(ticket, values, originals, dense, {"method": "lt-sft", "source": path.name})


def write_lt_sft(delta: SparseDelta, path: str | os.PathLike[str]) -> None:
    """Writes a delta as LT-SFT reads it, atomically; entries that moved by at most `SMALLEST` are left out, as there.

    path: the file, or a folder to write `pytorch_diff.bin` into
    Raises ValueError for a delta without originals, whose differences are not known.
    """
    if missing := [name for name in delta.values if name not in delta.originals]:
        raise ValueError(f"write_lt_sft: expected a delta with originals, it has none of {missing[0]!r}")
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


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {FILE} of LT-SFT")
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable file of tensors and numbers ({str(error).splitlines()[0]})"
        ) from error


def _numpy_numbers() -> list[Any]:
    """What pickled numpy scalars are made of: shapes in some files hold them."""
    import numpy as np

    scalar = np.int64(0).__reduce__()[0]
    return [scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("int32", "int64", "float32", "float64"))]


def _decoded(diff: Any, where: str) -> tuple[Tensor, Tensor, Size]:
    """(ascending row-major indices int64 [k], deltas [k] in their order, shape)"""
    if not isinstance(diff, Mapping) or {"size", "index_steps", "values"} - set(diff):
        raise ValueError(
            f"{where}: expected size, index_steps and values, got {diff if diff is None else sorted(diff)}"
        )
    size = Size(int(n) for n in diff["size"])
    steps, deltas = diff["index_steps"].view(-1), diff["values"].view(-1)
    if steps.numel() != deltas.numel():
        raise ValueError(f"{where}: {steps.numel():,} indices and {deltas.numel():,} values; they must be as many")
    columns = steps.to(torch.int64).cumsum(0)
    if columns.numel() and (int(columns[0]) < 0 or bool((steps[1:] <= 0).any()) or int(columns[-1]) >= size.numel()):
        raise ValueError(f"{where}: indices must ascend from 0 to below {size.numel():,}; the file is damaged")
    if not bool(torch.isfinite(deltas).all()):
        raise ValueError(f"{where}: a value is NaN or infinite; the file is damaged")
    indices = _transposed(columns, Size(reversed(size)))
    order = indices.argsort()
    return indices[order], deltas[order], size


def _transposed(indices: Tensor, size: Size) -> Tensor:
    """Flat row-major indices of a shape -> those of the same entries with the first dimension running fastest."""
    result, stride = torch.zeros_like(indices), 1
    rest, strides = indices, []
    for n in size:
        strides.append(stride)
        stride *= n
    for n, step in zip(reversed(size), reversed(strides), strict=True):
        result += rest % n * step
        rest = rest // n
    return result
