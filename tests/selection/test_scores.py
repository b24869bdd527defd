"""Scores: functions of pieces through the passes of the selection, and the ready-made ones against their formulas."""

import sys

import pytest
import torch
from helpers.backends import BACKENDS, using
from helpers.process_memory import printed
from safetensors.torch import save_file
from torch import nn

import ltp_sparse as ls
from ltp_sparse.ops import sources
from ltp_sparse.ops.routes import NonFiniteDelta
from ltp_sparse.selection import scores
from ltp_sparse.testing import random_weights
from ltp_sparse.tickets.bits import TILE

SHAPES = {"embedding": (700, 301), "layer.0.weight": (30, 7), "layer.0.bias": (30,), "layer.1.scale": ()}


@pytest.fixture
def weights():
    return random_weights(SHAPES)


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_function_of_pieces_gives_the_ticket_of_its_tensors(backend, budget, weights, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE", TILE)
    score = {name: torch.randn(t.shape).mul_(8).round_() for name, t in weights.items()}
    asked = []

    def piece(name, start, stop):
        asked.append(stop - start)
        return score[name].view(-1)[start:stop].bfloat16()

    with using(backend):
        expected = ls.select(weights, score=score, density=0.1, budget=budget)
        ticket = ls.select(weights, score=piece, density=0.1, budget=budget)
    assert ticket == expected and ticket.metadata == expected.metadata and ticket.fingerprint == expected.fingerprint
    assert max(asked) == TILE


@pytest.mark.parametrize(
    ("piece", "got"),
    [
        (lambda n: torch.zeros(n + 1), r"got torch.float32 \[31\]"),
        (lambda n: torch.zeros(n, dtype=torch.float64), "got torch.float64"),
        (lambda n: [0.0] * n, "got list"),
    ],
    ids=["size", "dtype", "type"],
)
def test_wrong_pieces_say_what_was_expected(piece, got):
    with pytest.raises(ValueError, match=rf"score\('a', 0, 30\) must return a float32.*of 30 entries, {got}"):
        ls.select({"a": torch.zeros(30)}, score=lambda name, start, stop: piece(stop - start), k=1)


def test_nonfinite_scores_name_their_parameter(weights):
    def score(name, start, stop):
        return torch.full((stop - start,), float("inf") if name == "layer.0.bias" else 1.0)

    with pytest.raises(NonFiniteDelta, match="'layer.0.bias' holds NaN or inf"):
        ls.select(weights, score=score, k=1)


@pytest.mark.parametrize("where", ["module", "mapping", "strided", "disk"])
def test_magnitude_takes_the_largest_weights(where, weights, tmp_path):
    source = weights
    if where == "module":
        source = nn.Linear(70, 40)
        weights = dict(source.named_parameters())
    elif where == "strided":
        source = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in weights.items()}
    elif where == "disk":
        source = tmp_path / "model.safetensors"
        save_file(weights, source)
    zeros = {name: torch.zeros_like(t) for name, t in weights.items()}
    ticket = ls.select(source, score=scores.magnitude(source), density=0.1)
    assert ticket == ls.select(zeros, weights, density=0.1)


class Net(nn.Module):
    """A sparse embedding, and a parameter that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, sparse=True)
        self.dense = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(4))

    def losses(self, batches=3):
        for seed in range(batches):
            g = torch.Generator().manual_seed(seed)
            tokens, labels = torch.randint(11, (5,), generator=g), torch.randint(3, (5,), generator=g)
            yield nn.functional.cross_entropy(self.dense(self.embedding(tokens)), labels)


FORMULAS = {
    "gradient_magnitude": lambda w, gradients: sum(g.abs() for g in gradients),
    "fisher": lambda w, gradients: sum(g**2 for g in gradients),
    "movement": lambda w, gradients: sum(-w * g for g in gradients).clamp(min=0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_accumulated_scores_are_their_formulas(name):
    net = Net()
    gradients = {parameter: [] for parameter, _ in net.named_parameters()}
    for loss in net.losses():
        net.zero_grad()
        loss.backward()
        for parameter, p in net.named_parameters():
            gradients[parameter].append(torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone())
    net.zero_grad()
    found = getattr(scores, name)(net, net.losses())
    assert all(p.grad is None for p in net.parameters())
    for parameter, p in net.named_parameters():
        torch.testing.assert_close(found[parameter], FORMULAS[name](p.detach(), gradients[parameter]))
    ticket = ls.select(net, score=found, k=9)
    assert ticket.k == 9 and ticket.counts("parameter")["unused"][0] == 0


def test_movement_follows_a_training_run():
    """The optimizer steps between the losses: weights that grew are positive."""
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pulls = torch.tensor([[1.0, -2.0, -3.0, 4.0]])  # towards larger, more negative, smaller, less negative

    def losses():
        for _ in range(3):
            loss = -(net.weight * pulls).sum()
            yield loss
            optimizer.zero_grad()
            (-(net.weight * pulls).sum()).backward()
            optimizer.step()

    found = scores.movement(net, losses())["weight"]
    assert found[0, 1] > found[0, 0] > 0 and found[0, 2:].tolist() == [0, 0]


def test_pools_and_frozen_parameters():
    net = Net()
    assert list(scores.fisher(net, net.losses(), pool=["dense"])) == ["dense.bias", "dense.weight"]
    net.dense.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="'dense.bias' does not require a gradient"):
        scores.fisher(net, net.losses())
    assert list(scores.fisher(net, net.losses(), pool=["dense.weight"])) == ["dense.weight"]


MEMORY = """
import sys, torch
import ltp_sparse as ls
from helpers.process_memory import forget_peak, status

def score(name, start, stop):
    return torch.arange(start, stop, dtype=torch.float32).sin_()

ls.select({"a": torch.zeros(2_000_000)}, score=score, density=0.2)
weights = {"a": torch.zeros(int(sys.argv[1]))}
forget_peak()
before = status()["VmRSS"]
ticket = ls.select(weights, score=score, density=0.2)
print(status()["VmHWM"] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_functions_need_no_tensor_of_the_size_of_the_model(monkeypatch):
    """Contract 2, with the pieces of 2 MB and what the function itself makes."""
    n = 40_000_000
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    peak = int(printed(MEMORY, n))
    assert peak <= 0.205 * n + 8e6, f"{peak / 1e6:.1f} MB"
