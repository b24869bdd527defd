"""Pieces of tensors on their way to a GPU: while it works on one, the next is read from disk and copied to it."""

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
    """read: gives the tensors of the piece, contiguous, on any device; release: told when they are copied."""

    read: Callable[[], Sequence[Tensor]]
    release: Callable[[], None]


def staged(pieces: Iterable[Piece], room: Sequence[int], device: torch.device) -> Iterator[list[Tensor]]:
    """The tensors of each piece, on the device, in order. They are valid until the next ones are asked for.

    A thread reads, one piece ahead. What is on the host goes through page-locked memory, so that the copy runs while
    the GPU computes.

    Args:
        pieces: what to read; an error of a piece is raised in its place.
        room: bytes of the largest tensor at each position of a piece.
        device: where the tensors are wanted. On the CPU they are copied, too.
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
                lane.synchronize()  # before the room on the device is given to others


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
        """Reads, and starts the copies. Runs in the thread."""
        if self.lane is not None:
            self.copied.synchronize()  # else the room on the host is still being read
            self.lane.wait_event(self.worked_on)  # else that on the device is
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
        """What is launched from now on finds the copies done."""
        if self.lane is not None:
            torch.cuda.current_stream(self.lane.device).wait_event(self.copied)

    def used(self) -> None:
        """What was launched so far is the last to look at the tensors."""
        if self.lane is not None:
            self.worked_on.record(torch.cuda.current_stream(self.lane.device))


def _as(room: Tensor, tensor: Tensor) -> Tensor:
    """The start of the room, in the shape and dtype of a tensor [m]."""
    return room[: tensor.nbytes].view(tensor.dtype)
