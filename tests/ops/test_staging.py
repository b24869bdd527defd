"""Pieces on their way to a device: order, contents, reading ahead, errors. On a GPU: tests/backends/test_gpu.py."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from helpers.bits import same_bits
from safetensors.torch import save_file

import ltp_sparse as ls
from ltp_sparse.ops import sources
from ltp_sparse.ops.staging import SLOTS, Piece, staged
from ltp_sparse.testing import random_weights, tuned_weights, xlmr_shapes
from ltp_sparse.tickets.bits import TILE

CPU = torch.device("cpu")
TENSORS = [
    [torch.randn(size), torch.randn(size).to(dtype)]
    for size, dtype in ((70, torch.float32), (0, torch.bfloat16), (3, torch.float16), (64, torch.bfloat16))
]
ROOM = [280, 280]


class Log:
    """Pieces that note when they are read and released."""

    def __init__(self, tensors):
        self.events, self.threads = [], set()
        self.pieces = [
            Piece(lambda i=i: self.note("read", i) or tensors[i], lambda i=i: self.note("release", i))
            for i in range(len(tensors))
        ]

    def note(self, what, i):
        self.events.append((what, i))
        self.threads.add(threading.current_thread())


def test_pieces_come_in_order_and_are_released_once():
    log = Log(TENSORS)
    for found, expected in zip(staged(log.pieces, ROOM, CPU), TENSORS, strict=True):
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(found, expected, strict=True) if len(b))
    assert log.events == [(what, i) for i in range(len(TENSORS)) for what in ("read", "release")]
    assert threading.current_thread() not in log.threads


def test_one_piece_is_read_ahead_and_no_more():
    log = Log([[torch.full((4,), float(i))] for i in range(10)])
    for i, (found,) in enumerate(staged(log.pieces, [16], CPU)):
        while ("release", min(i + SLOTS - 1, 9)) not in log.events:
            pass  # the thread reads it while this piece is worked on
        assert ("read", i + SLOTS) not in log.events
        assert found.tolist() == [i] * 4


def test_no_pieces():
    assert list(staged([], [], CPU)) == []


def test_an_error_is_raised_in_its_place_and_the_thread_ends():
    def fail():
        raise OSError("the disk is gone")

    log = Log(TENSORS)
    log.pieces[2] = Piece(fail, lambda: None)
    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(len(tensors) for tensors in staged(log.pieces, ROOM, CPU))
    assert len(found) == 2
    assert not any(thread.is_alive() for thread in log.threads)


def test_a_reader_that_stops_early_leaves_no_thread():
    log = Log(TENSORS)
    pieces = staged(log.pieces, ROOM, CPU)
    next(pieces)
    pieces.close()
    assert not any(thread.is_alive() for thread in log.threads)


@pytest.mark.parametrize("large", [False, True])
def test_a_staged_selection_has_the_bits_of_one_in_place(large, tmp_path, monkeypatch):
    shapes = {**xlmr_shapes(layers=2, hidden=16, intermediate=40, vocabulary=60, positions=9), "big": (700, 301)}
    initial = random_weights({name: torch.Size(shape) for name, shape in shapes.items()})
    tuned = tuned_weights(initial, untouched_rows=0.3)
    tuned["big"] = tuned["big"].bfloat16()
    for name, side in (("initial", initial), ("tuned", tuned)):
        save_file(side, tmp_path / f"{name}.safetensors")
    pair = tmp_path / "initial.safetensors", tmp_path / "tuned.safetensors"
    expected = ls.select(*pair, density=0.2)

    of, calls = sources.Reader.of, []
    monkeypatch.setattr(sources.Reader, "of", lambda tensor: replace(of(tensor), device="elsewhere"))
    monkeypatch.setattr(sources, "staged", lambda *a: calls.append(a) or staged(*a))
    monkeypatch.setattr(sources, "_STAGED", TILE)
    if large:
        monkeypatch.setattr(ls.selection, "LARGE", 0)
    ticket = ls.select(*pair, density=0.2)
    assert calls and ticket == expected and ticket.metadata == expected.metadata
