"""Digests identify the bits of a tensor or the content of a file. Only this module defines how they are computed.

They protect against mistakes, such as another base model or a damaged file, but not against attackers: XXH3 is not a
cryptographic hash, but it runs at the speed of memory.

A digest is "xxh3:" and 32 hexadecimal digits of XXH3 with 128 bits. The digest of a tensor is computed from its dtype,
its shape and the digests of its tiles, and the digest of a tile from its bytes in row-major order, padded with zeros to
whole kilobytes. So tiles can be read in any order, by several threads, on a GPU, or by a pass that reads them anyway.

Earlier versions wrote SHA-256 without a tag, whole or cut to 32 digits. To compare with such a digest, pass it as
`like`, and the result is computed in the same way.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import xxhash
from torch import Size, Tensor

from ltp_sparse.weights.tensors import TILE, check_plain_tensor, flat_piece

_TAG = "xxh3:"
_KNOWN = re.compile(f"({_TAG})?[0-9a-f]{{32}}|[0-9a-f]{{64}}")
_BLOCK = 1024  # bytes; a tile is filled up to whole ones
_SPAN = 32 * TILE  # entries that a thread digests at a time

EARLIER = "0" * 32
"""Any digest of an earlier version, to be passed as `like` for file names that must not change between versions."""

BYTES = 16
"""Size of the digest of a tile: two little-endian words of 64 bits, the lower one first."""

on_device: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {}
"""Type of a device -> function that computes the digests of the tiles of contiguous tensors there, int64 [T, 2].

`ltp_sparse.backends` adds its functions; tensors on other devices are copied to the host.
"""


class Pieces(Protocol):
    """A tensor that is read piece by piece, by several threads."""

    dtype: torch.dtype
    shape: Size

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the row-major order, contiguous."""

    def release(self, start: int, stop: int) -> None:
        """Called when the originals are no longer needed; raises if they were changed meanwhile."""


def is_known(digest: object) -> bool:
    """Whether this is a digest that this version can compare."""
    return isinstance(digest, str) and _KNOWN.fullmatch(digest) is not None


def is_old(digest: str | None) -> bool:
    """Whether the digest is of an earlier version."""
    if digest is not None and not is_known(digest):
        raise ValueError(f"{digest!r} is no digest that this version of ltp_sparse knows; update it")
    return digest is not None and not digest.startswith(_TAG)


class Hash:
    """The digest of bytes and tensors, one after the other.

    Args:
        like: a digest that it will be compared with; None: the current kind.
    """

    def __init__(self, like: str | None = None) -> None:
        self._kept = len(like) if like is not None and is_old(like) else None
        self._hash: Any = xxhash.xxh3_128() if self._kept is None else hashlib.sha256()

    def update(self, data: bytes | Tensor) -> Hash:
        """Adds bytes, or the bits of a tensor in row-major order; its dtype and shape are not included."""
        for block in [data] if isinstance(data, bytes) else host_blocks(data):
            self._hash.update(block)
        return self

    def digest(self) -> str:
        """The digest of everything added so far."""
        return _TAG + self._hash.hexdigest() if self._kept is None else self._hash.hexdigest()[: self._kept]


def host_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bits of a tensor in row-major order, some megabytes at a time. Each block is valid until the next one."""
    check_plain_tensor(tensor, "a tensor that is read bit by bit")
    tensor = _resolved(tensor)
    for start in range(0, tensor.numel(), 16 * TILE):
        piece = flat_piece(tensor, start, min(start + 16 * TILE, tensor.numel())).cpu()
        yield _bytes_of(piece)


def _resolved(tensor: Tensor) -> Tensor:
    """The tensor with its conjugation and sign in its bits, where torch may only have marked them."""
    return tensor.detach().resolve_conj().resolve_neg()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A view of the bytes of a contiguous tensor on the CPU. The tensor must outlive the view."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def tile_digests(tensor: Tensor) -> bytes:
    """The digests of the tiles of a contiguous tensor on the CPU, `BYTES` each."""
    tensor = _resolved(tensor)
    if not tensor.numel():
        return b""
    bits, step = _bytes_of(tensor), TILE * tensor.itemsize
    return b"".join(_tile_digest(bits[at : at + step]) for at in range(0, len(bits), step))


def tile_digests_anywhere(tensor: Tensor) -> bytes:
    """`tile_digests` of a tensor on any device: computed there if possible, else on all threads of torch."""
    plain = _resolved(tensor).contiguous()
    if plain.device.type in on_device:
        return bytes(_bytes_of(on_device[plain.device.type]([plain]).cpu()))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return b"".join(pool.map(lambda span: _tiles_of(plain, *span), _spans(plain)))


def _tile_digest(bits: memoryview) -> bytes:
    if not len(bits) % _BLOCK:
        return xxhash.xxh3_128_intdigest(bits).to_bytes(BYTES, "little")
    filled = xxhash.xxh3_128(bits)
    filled.update(bytes(-len(bits) % _BLOCK))
    return filled.intdigest().to_bytes(BYTES, "little")


def of_tiles(tensors: Mapping[str, Tensor | Pieces], tiles: Tensor) -> dict[str, str]:
    """Name -> digest, from the digests of all tiles of all tensors: int64 [T, 2]."""
    bits, found, at = bytes(_bytes_of(tiles.cpu())), {}, 0
    for name, tensor in tensors.items():
        end = at + BYTES * -(-tensor.shape.numel() // TILE)
        found[name] = _of_tiles(tensor.dtype, tensor.shape, bits[at:end])
        at = end
    return found


def _of_tiles(dtype: torch.dtype, shape: Sequence[int], tiles: bytes) -> str:
    return Hash().update(f"{dtype} {list(shape)} ".encode()).update(tiles).digest()


def digest(dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor], like: str | None = None) -> str:
    """The digest of a tensor that is passed in row-major pieces of any length.

    Args:
        dtype: its dtype.
        shape: its shape.
        pieces: its entries, on any device.
        like: as for `Hash`.
    """
    if is_old(like):
        sha = Hash(like).update(f"{dtype} {list(shape)} ".encode())
        for piece in pieces:
            sha.update(piece)
        return sha.digest()
    found, rest = [], torch.empty(0, dtype=dtype, device="cpu")
    for piece in pieces:
        flat = torch.cat([rest, piece.detach().reshape(-1).cpu()])
        whole = flat.numel() // TILE * TILE
        found.append(tile_digests(flat[:whole]))
        rest = flat[whole:]
    return _of_tiles(dtype, shape, b"".join([*found, tile_digests(rest)]))


def fingerprint(tensors: Mapping[str, Tensor | Pieces], like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> digest of the tensor. Digests of all weights identify a base model.

    It works on all threads of torch, or on the GPU.

    Args:
        tensors: name -> tensor, in memory or read piece by piece.
        like: name -> digest that the result will be compared with.

    Raises:
        TypeError: a tensor is of a subclass, sparse or without values; the message names it.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            check_plain_tensor(tensor, f"fingerprint: {name!r}")
    like = like or {}
    old = {name: like[name] for name in tensors if is_old(like.get(name))}
    found = _found_on_device({name: tensor for name, tensor in tensors.items() if name not in old})
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        shas = {
            name: pool.submit(digest, tensors[name].dtype, tensors[name].shape, _pieces_of(tensors[name]), earlier)
            for name, earlier in old.items()
        }
        tiles = {
            name: [pool.submit(_tiles_of, tensor, *span) for span in _spans(tensor)]
            for name, tensor in tensors.items()
            if name not in old and name not in found
        }
        found |= {name: sha.result() for name, sha in shas.items()}
        for name, spans in tiles.items():
            whole = b"".join(span.result() for span in spans)
            found[name] = _of_tiles(tensors[name].dtype, tensors[name].shape, whole)
    return {name: found[name] for name in tensors}


def _found_on_device(tensors: Mapping[str, Tensor | Pieces]) -> dict[str, str]:
    """Name -> digest of tensors on devices that can compute it, with one launch and one copy per device."""
    placed: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device.type in on_device:
            placed.setdefault(tensor.device, {})[name] = _resolved(tensor).contiguous()
    found: dict[str, str] = {}
    for device, there in placed.items():
        found |= of_tiles(there, on_device[device.type](list(there.values())))
    return found


def _spans(tensor: Tensor | Pieces) -> list[tuple[int, int]]:
    n = tensor.shape.numel()
    return [(start, min(start + _SPAN, n)) for start in range(0, n, _SPAN)]


def _pieces_of(tensor: Tensor | Pieces) -> Iterator[Tensor]:
    for span in _spans(tensor):
        if isinstance(tensor, Tensor):
            yield flat_piece(tensor, *span)
        else:
            yield tensor.piece(*span)
            tensor.release(*span)


def _tiles_of(tensor: Tensor | Pieces, start: int, stop: int) -> bytes:
    if isinstance(tensor, Tensor):
        return tile_digests(flat_piece(tensor, start, stop).cpu())
    found = tile_digests(tensor.piece(start, stop))
    tensor.release(start, stop)
    return found
