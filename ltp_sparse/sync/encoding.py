"""Encodes slots in few bytes, as their values or as changes from earlier ones.

The smaller of two forms is used:

* `VALUES`   the bits of every slot
* `CHANGES`  for every slot that differs, the number of equal slots before it, and its exclusive or with the earlier one

Integers are split into planes (all first bytes, all second bytes and so on), because a plane of upper bytes is nearly
all zeros. Planes of zeros are left out. Others are deflated with run lengths and Huffman codes only (`zlib.Z_RLE`):
they are close to random, so a search for repeated strings would take thirty times as long and find less.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

VALUES, CHANGES = "values", "changes"

_PROBE = 1 << 16  # bytes that are deflated to see whether a plane gets smaller
_PIECE = 1 << 18  # slots compared at a time
_HALF = 1 / 2  # share of changed slots up to which changes are always smaller than values
_UNSIGNED: dict[int, np.dtype] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}

Encoded = tuple[dict[str, Tensor], dict[str, Any]]


def as_integers(slots: Tensor) -> np.ndarray:
    """A view of the bits of a contiguous tensor on the CPU as unsigned integers."""
    assert sys.byteorder == "little"  # torch supports no other machines
    return slots.view(torch.uint8).numpy().view(_UNSIGNED[slots.element_size()])


def encode(slots: Tensor, earlier: Tensor | None) -> Encoded:
    """Encodes slots.

    Args:
        slots: [k] on the CPU, of any dtype.
        earlier: [k] of the same dtype, which the decoder must have, or None.

    Returns:
        (planes as uint8 tensors, facts for `decode` as JSON values)
    """
    new = as_integers(slots)
    if earlier is None:
        return _planes(VALUES, {"value": new})
    at, flips = _changes(new, as_integers(earlier))
    gaps = np.diff(at, prepend=-1) - 1
    smallest = np.min_scalar_type(int(gaps.max(initial=0)))  # unsigned, since no gap is negative
    found = [_planes(CHANGES, {"gap": gaps.astype(smallest), "flip": flips})]
    if at.size > _HALF * new.size:
        found.append(_planes(VALUES, {"value": new}))
    return min(found, key=lambda encoded: sum(plane.numel() for plane in encoded[0].values()))


def decode(planes: Mapping[str, Tensor], facts: Mapping[str, Any], earlier: Tensor | None, slots: Tensor) -> None:
    """Decodes the result of `encode`.

    Args:
        planes: name -> plane.
        facts: as `encode` has returned them.
        earlier: [k], as given to `encode`; it can be `slots` itself.
        slots: [k], filled with the decoded values.

    Raises:
        ValueError: planes and facts do not fit the number of slots.
    """
    form, counts, out = facts["form"], facts["counts"], as_integers(slots)
    if form not in (VALUES, CHANGES):
        raise ValueError(f"slots in the unknown form {form!r}")
    if form == VALUES:
        out[:] = _integers(planes, "value", counts, out.dtype, out.size)
        return
    if earlier is None:
        raise ValueError(f"slots in the form {form!r} without earlier ones")
    wide = next(size for size in _UNSIGNED if all(f"gap.{i}" not in planes for i in range(size, 8)))
    gaps = _integers(planes, "gap", counts, _UNSIGNED[wide], out.size)
    flips = _integers(planes, "flip", counts, out.dtype, out.size)
    if gaps.size != flips.size or (gaps.size and int(gaps.max()) >= out.size):
        raise ValueError(f"{gaps.size} gaps of {flips.size} changes do not fit {out.size} slots")
    at = gaps.astype(np.int64)
    at += 1
    np.cumsum(at, out=at)
    at -= 1
    if at.size and not 0 <= int(at[-1]) < out.size:
        raise ValueError(f"a change of slot {int(at[-1])} of {out.size}")
    if earlier is not slots:
        out[:] = as_integers(earlier)
    out[at] ^= flips


def _changes(new: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 positions where two arrays differ, exclusive or there), computed in pieces that fit the cache."""
    places, flips = [np.empty(0, np.int64)], [new[:0]]
    for start in range(0, new.size, _PIECE):
        flipped = new[start : start + _PIECE] ^ old[start : start + _PIECE]
        at = np.flatnonzero(flipped)
        places.append(at + start)
        flips.append(flipped[at])
    return np.concatenate(places), np.concatenate(flips)


def _planes(form: str, integers: Mapping[str, np.ndarray]) -> Encoded:
    planes = {}
    for name, array in integers.items():
        by_byte = array.view(np.uint8).reshape(array.size, array.itemsize)
        for i in range(array.itemsize):
            plane = np.ascontiguousarray(by_byte[:, i])
            if plane.any():
                planes[f"{name}.{i}"] = torch.from_numpy(np.frombuffer(_deflated(plane.tobytes()), np.uint8).copy())
    return planes, {"form": form, "counts": {name: array.size for name, array in integers.items()}}


def _integers(
    planes: Mapping[str, Tensor], name: str, counts: Mapping[str, Any], dtype: np.dtype, most: int
) -> np.ndarray:
    count = counts[name]
    if type(count) is not int or not 0 <= count <= most or (name == "value" and count != most):
        raise ValueError(f"{count!r} integers {name!r}, expected those of {most} slots")
    by_byte = np.zeros((count, dtype.itemsize), np.uint8)
    for i in range(dtype.itemsize):
        if (plane := planes.get(f"{name}.{i}")) is not None:
            by_byte[:, i] = np.frombuffer(_inflated(plane.numpy().tobytes(), count), np.uint8)
    return by_byte.reshape(-1).view(dtype)


def _deflated(plane: bytes) -> bytes:
    """The deflated plane, or the plane itself if that is not longer."""
    if len(_deflate(plane[:_PROBE])) > 0.97 * min(len(plane), _PROBE):
        return plane
    return min(_deflate(plane), plane, key=len)


def _deflate(content: bytes) -> bytes:
    machine = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return machine.compress(content) + machine.flush()


def _inflated(content: bytes, count: int) -> bytes:
    if len(content) == count:
        return content
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = machine.decompress(content, count + 1)
    except zlib.error as error:
        raise ValueError(f"a plane that cannot be inflated ({error})") from error
    if len(found) != count or not machine.eof:
        raise ValueError(f"a plane inflates to {len(found)} bytes or more, expected {count}")
    return found
