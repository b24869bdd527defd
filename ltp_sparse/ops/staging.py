"""Staging for a GPU: while it works on one piece of a tensor, the next piece is read from disk and copied to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

SLOTS = 2


class Piece(NamedTuple):
    """A piece that is read later.

    Attributes:
        read: returns the tensors of the piece, contiguous, on any device.
        release: called when they have been copied.
    """

    read: Callable[[], Sequence[Tensor]]
    release: Callable[[], None]


def staged(pieces: Iterable[Piece], room: Sequence[int], device: torch.device) -> Iterator[list[Tensor]]:
    """Yields the tensors of each piece in order, on the device. They are valid until the next ones are asked for.

    A thread reads one piece ahead. Tensors on the host go through page-locked memory, so that the copy runs while the
    GPU computes.

    Args:
        pieces: the pieces to read. An error of a piece is raised where its tensors were due.
        room: bytes of the largest tensor at each position of a piece.
        device: where the tensors are wanted. They are copied on the CPU too.
    """
    lane = torch.cuda.Stream(device) if device.type == "cuda" else None
    if lane is not None:
        lane.wait_stream(torch.cuda.current_stream(device))
    slots = [_Slot(room, device, lane) for _ in range(SLOTS)]
    coming = iter(pieces)
    ahead: deque[tuple[_Slot, Future[list[Tensor]]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for slot, piece in zip(slots, coming, strict=False):
                ahead.append((slot, reader.submit(slot.fill, piece)))
            while ahead:
                slot, filled = ahead.popleft()
                tensors = filled.result()
                slot.wait()
                yield tensors
                slot.used()
                for following in islice(coming, 1):
                    ahead.append((slot, reader.submit(slot.fill, following)))
        finally:
            for _, filled in ahead:
                filled.cancel()
            reader.shutdown()
            if lane is not None:
                lane.synchronize()  # before the room on the device is freed


class _Slot:
    """Room for the tensors of one piece, on the host and on the device."""

    def __init__(self, room: Sequence[int], device: torch.device, lane: torch.cuda.Stream | None) -> None:
        self.lane = lane
        self.host = [
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=lane is not None, device="cpu") for nbytes in room
        ]
        self.there = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in room]
        if lane is not None:
            self.copied, self.worked_on = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, piece: Piece) -> list[Tensor]:
        """Reads a piece and starts its copies. Runs in the thread."""
        if self.lane is not None:
            self.copied.synchronize()  # the last copy may still read the room on the host
            self.lane.wait_event(self.worked_on)  # kernels may still read the room on the device
        filled = []
        with torch.cuda.stream(self.lane) if self.lane is not None else nullcontext():
            for host, there, tensor in zip(self.host, self.there, piece.read(), strict=True):
                if tensor.device.type == "cpu":
                    tensor = _as(host, tensor).copy_(tensor)
                filled.append(_as(there, tensor).copy_(tensor, non_blocking=True))
            if self.lane is not None:
                self.copied.record(self.lane)
        piece.release()
        return filled

    def wait(self) -> None:
        """Makes all later launches wait for the copies."""
        if self.lane is not None:
            torch.cuda.current_stream(self.lane.device).wait_event(self.copied)

    def used(self) -> None:
        """Marks the launches so far as the last ones that read the tensors."""
        if self.lane is not None:
            self.worked_on.record(torch.cuda.current_stream(self.lane.device))


def _as(room: Tensor, tensor: Tensor) -> Tensor:
    """The start of the room as a tensor with the shape and dtype of `tensor`, [m]."""
    return room[: tensor.nbytes].view(tensor.dtype)
