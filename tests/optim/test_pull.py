"""The L1 pull: values kept on the host and copied over in pieces give the bits of values kept on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.backends import ALL_BACKENDS, BACKENDS, using
from helpers.bits import same_bits
from torch import nn

import ltp_sparse as ls
from ltp_sparse.optim import launch
from ltp_sparse.optim.launch import pieces_of
from ltp_sparse.testing import random_weights
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.tile_table import Column, TileTable


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Parameters on the CPU are treated as if the host were elsewhere; `as_on_a_gpu(slots)` sets the piece."""
    monkeypatch.setattr(launch, "_is_host", lambda device: False)
    return lambda slots: monkeypatch.setattr(launch, "PIECE", slots)


class Net(nn.Module):
    """Parameters of one tile, of several, and of three entries; one in bfloat16 makes a launch of its own."""

    def __init__(self, big=300):
        super().__init__()
        self.embed = nn.Embedding(big, 400)
        self.body = nn.Linear(400, 20)
        self.low = nn.Linear(20, 20).bfloat16()
        self.head = nn.Linear(20, 3)

    def forward(self, ids):
        hidden = torch.tanh(self.body(self.embed(ids).mean(1)))
        return self.head(hidden + self.low(hidden.bfloat16()).float())


def step(model, optimizer, number):
    ids = torch.randint(model.embed.num_embeddings, (5, 6), generator=torch.Generator().manual_seed(number))
    ids = ids.to(model.embed.weight.device)
    optimizer.zero_grad()
    (10 * model(ids).square().sum()).backward()
    optimizer.step()


def make(place, *, density=0.6, big=300, device="cpu", **options):
    torch.manual_seed(0)
    model = Net(big).to(device)
    ticket = ls.Ticket.random(model, density=density, seed=1, pool=["embed", "body", "low"])
    dense = [{"params": list(model.head.parameters()), "pull": 0.02}]
    return model, ls.MaskedAdamW(model, ticket, lr=1e-2, dense=dense, pull=0.03, pull_on=place, **options)


def assert_same(first, second):
    (model, opt), (other, theirs) = first, second
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert same_bits(p, q), name
    a, b = opt.state_dict()["state"], theirs.state_dict()["state"]
    for index, state in a.items():
        for key, tensor in state.items():
            assert torch.equal(tensor, b[index][key]), (index, key)


MODES = {
    "plain": {},
    "clip": {"max_grad_norm": 0.05},
    "8bit": {"states": "8bit", "max_grad_norm": 0.05},
    "stochastic": {"rounding": "stochastic"},
    "packed": {"gradients": "packed", "max_grad_norm": 0.05},
    "packed-8bit": {"gradients": "packed", "states": "8bit"},
}


@pytest.mark.parametrize("slots", [1, 50_000, 90_000, 1 << 24])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_from_the_host_give_the_same_bits(backend, mode, slots, as_on_a_gpu):
    """A tile at a time (slots 1), pieces that end inside a parameter, and all at once."""
    as_on_a_gpu(slots)
    with using(backend):
        first, second = make("device", **mode), make("host", **mode)
        assert len(second[1]._launches[0].pieces) > (1 if slots < 90_000 else 0)
        for number in range(4):
            for model, opt in (first, second):
                step(model, opt, number)
            if "max_grad_norm" in mode:
                assert torch.equal(first[1].grad_norm, second[1].grad_norm)
    assert_same(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_every_backend_takes_pieces(backend, as_on_a_gpu):
    """Small, for the interpreter: pieces of a tile each, of which there is one for each parameter."""
    as_on_a_gpu(1)
    with using(backend):
        pair = [make(place, big=12, max_grad_norm=0.05) for place in ("device", "host")]
        for model, opt in pair:
            step(model, opt, 0)
    assert_same(*pair)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_on_a_gpu_they_are_pinned(mode, monkeypatch):
    monkeypatch.setattr(launch, "PIECE", TILE)
    pair = [make(place, device="cuda", **mode) for place in ("device", "host")]
    for one in pair[1][1]._launches:
        assert one.anchor.is_pinned() and one.room.is_cuda
    for number in range(4):
        for model, opt in pair:
            step(model, opt, number)
    for (name, p), q in zip(pair[0][0].named_parameters(), pair[1][0].parameters(), strict=True):
        assert same_bits(p.cpu(), q.cpu()), name


def test_the_device_holds_a_piece_only(as_on_a_gpu):
    as_on_a_gpu(TILE)
    (_, on_device), (_, on_host) = make("device"), make("host")
    for launch_ in on_host._launches:
        assert launch_.room.numel() <= min(launch_.table.k, TILE)
        assert all(piece.slots.stop - piece.slots.start <= TILE for piece in launch_.pieces)
    rooms = sum(one.room.numel() for one in on_host._launches)
    assert on_device.state_bytes() - on_host.state_bytes() == 4 * (on_host.active_entries - rooms)


def test_resumed_on_the_other_side(as_on_a_gpu):
    """The state holds the values that the pull draws to, wherever they were."""
    as_on_a_gpu(TILE)
    whole = make("host", max_grad_norm=0.05)
    for number in range(6):
        step(*whole, number)
    for before, after in (("host", "device"), ("device", "host")):
        model, opt = make(before, max_grad_norm=0.05)
        for number in range(3):
            step(model, opt, number)
        resumed = copy.deepcopy(model)
        ticket = ls.Ticket.random(resumed, density=0.6, seed=1, pool=["embed", "body", "low"])
        dense = [{"params": list(resumed.head.parameters()), "pull": 0.02}]
        theirs = ls.MaskedAdamW(resumed, ticket, lr=1e-2, dense=dense, pull=0.03, pull_on=after, max_grad_norm=0.05)
        theirs.load_state_dict(copy.deepcopy(opt.state_dict()))
        for number in range(3, 6):
            step(resumed, theirs, number)
        assert_same((resumed, theirs), whole)


def test_copies_go_on(as_on_a_gpu):
    as_on_a_gpu(TILE)
    model, opt = make("host")
    step(model, opt, 0)
    twin, theirs = copy.deepcopy((model, opt))
    step(model, opt, 1)
    step(twin, theirs, 1)
    assert_same((model, opt), (twin, theirs))


def test_initial_values_are_those_at_construction():
    model, opt = make("device")
    before = {p: p.detach().clone() for p in model.parameters()}
    step(model, opt, 0)
    values = opt.initial_values()
    assert len(values) == 7 and all(p in before for p in values)
    ticket = ls.Ticket.random(Net(), density=0.6, seed=1, pool=["embed", "body", "low"])
    for name, p in model.named_parameters():
        wanted = before[p][ticket.mask(name)] if name in ticket.sets else before[p].flatten()
        assert torch.equal(values[p], wanted.float()), name
    assert ls.MaskedAdamW(Net(), ticket).initial_values() == {}
    with pytest.raises(ValueError, match='pull_on must be "device" or "host", got .disk.'):
        ls.MaskedAdamW(Net(), ticket, pull=0.1, pull_on="disk")


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("density", [0.03, 0.6, 1.0])
def test_pieces_cut_a_table_without_rest(density, states):
    shapes = {"a": (300, 700), "b": (63,), "c": (5,), "d": (2 * TILE,), "e": (1,)}
    tensors = random_weights(shapes)
    ticket = ls.Ticket.full(tensors) if density == 1 else ls.Ticket.random(tensors, density=density, seed=3)
    table = TileTable.build(list(ticket.sets.values()))
    for most in (1, TILE, TILE + 1, 3 * TILE, 1 << 40):
        pieces = list(pieces_of(table, most))
        assert sum(len(piece.table.tiles) for piece in pieces) == len(table.tiles)
        assert [piece.slots.start for piece in pieces] == [0, *(piece.slots.stop for piece in pieces[:-1])]
        assert pieces[-1].slots.stop == table.k and pieces[-1].blocks.stop == table.blocks
        assert [piece.blocks.start for piece in pieces] == [0, *(piece.blocks.stop for piece in pieces[:-1])]
        tiles = []
        for piece in pieces:
            assert piece.table.k == piece.slots.stop - piece.slots.start
            assert piece.table.k <= most or len(piece.table.tiles) == 1
            assert piece.table.blocks == piece.blocks.stop - piece.blocks.start
            back = piece.table.tiles.clone()
            back[:, Column.SLOT] += piece.slots.start
            back[:, Column.BLOCK] += piece.blocks.start
            tiles.append(back)
        assert torch.equal(torch.cat(tiles), table.tiles)
