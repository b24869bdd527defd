"""Digests of whole tensors whose ranks hold shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ltp_sparse.weights.digests import BYTES, Pieces, digest, fingerprint, is_old, of_tiles, tile_digests_anywhere
from ltp_sparse.weights.sharding import Cut, is_sharded, local, spread, sum_over
from ltp_sparse.weights.tensors import TILE, check_plain_tensor, flat_piece


def whole_fingerprint(tensors: Mapping[str, Tensor | Pieces], like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Like `fingerprint`, but a DTensor gets the digest of the whole tensor. All of its ranks must call it.

    No rank holds the whole tensor at any time. Each rank digests the tiles in its rows, and the ranks exchange their
    digests. Only tiles that are cut between ranks are exchanged themselves; if a tensor is cut by columns, these are
    all of its tiles.

    Args:
        tensors: the same names in the same order on every rank.
        like: as for `fingerprint`.

    Raises:
        TypeError, ValueError: a tensor is not plain, or a DTensor is neither sharded nor replicated.
    """
    found = fingerprint({name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}, like)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and is_sharded(tensor):
            found[name] = _digest(name, tensor, (like or {}).get(name))
    return {name: found[name] for name in tensors}


def _digest(name: str, tensor: Tensor, like: str | None) -> str:
    cut, held = Cut.of(tensor, f"fingerprint: {name!r}"), local(tensor).detach()
    check_plain_tensor(held, f"fingerprint: {name!r}")
    tiles = -(-tensor.numel() // TILE)
    if is_old(like) or not cut.by_rows:
        return digest(tensor.dtype, tensor.shape, (_piece(tensor, cut, tile) for tile in range(tiles)), like)
    start, stop = cut.entries
    digests = torch.zeros(tiles, BYTES, dtype=torch.uint8, device=held.device)
    first, last = -(-start // TILE), tiles if stop == tensor.numel() else stop // TILE
    if first < last:
        own = tile_digests_anywhere(flat_piece(held, first * TILE - start, min(last * TILE, stop) - start))
        digests[first:last] = torch.frombuffer(bytearray(own), dtype=torch.uint8).view(-1, BYTES)
    sum_over(spread(tensor), digests)
    row = tensor.shape[1:].numel()
    ends = [end * row for _, end in cut.ranges[0]] if cut.ranges else []
    for tile in sorted({end // TILE for end in ends if end % TILE and end < tensor.numel()}):
        bits = tile_digests_anywhere(_piece(tensor, cut, tile))
        digests[tile] = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    return of_tiles({name: tensor}, digests)[name]


def _piece(tensor: Tensor, cut: Cut, tile: int) -> Tensor:
    """The entries of a tile, collected from all ranks."""
    start, stop, held = tile * TILE, min((tile + 1) * TILE, tensor.numel()), local(tensor).detach()
    inside, places = cut.find(torch.arange(start, stop, dtype=torch.int64, device=held.device))
    piece = torch.zeros(stop - start, dtype=tensor.dtype, device=held.device)
    piece[inside] = held.reshape(-1)[places]
    sum_over(spread(tensor), piece.view(torch.uint8))  # one rank has the bits of each entry, the others have zeros
    return piece
