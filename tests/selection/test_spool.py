"""Selection tensor by tensor, with a ticket on disk: the bits and files of the selection in memory, in less of it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers.backends import BACKENDS, using
from helpers.bits import DTYPES, same_bits
from helpers.process_memory import printed
from safetensors.torch import save_file

import ltp_sparse as ls
from ltp_sparse import selection
from ltp_sparse.cli import main
from ltp_sparse.ops import sources
from ltp_sparse.ops.routes import NonFiniteDelta
from ltp_sparse.selection import ShortTicket
from ltp_sparse.selection.by_tensor import Spool
from ltp_sparse.testing import random_weights, tuned_weights, xlmr_shapes
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import Encoding
from ltp_sparse.weights import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::ltp_sparse.selection.ShortTicket")

SHAPES = {**xlmr_shapes(layers=3, hidden=16, intermediate=40, vocabulary=60, positions=9), "roberta.big": (700, 301)}


@pytest.fixture
def large(monkeypatch):
    """Everything counts as too large for memory, and is read a tile at a time."""
    monkeypatch.setattr(selection, "LARGE", 0)
    monkeypatch.setattr(sources, "_PIECE", TILE)
    for module in (sources, checkpoints):
        monkeypatch.setattr(module, "VIEW", TILE)


@pytest.fixture
def versions():
    initial = random_weights({name: torch.Size(shape) for name, shape in SHAPES.items()})
    return initial, tuned_weights(initial, untouched_rows=0.3)


@pytest.fixture
def spools(monkeypatch):
    """The spools that were made."""
    made = []

    class Noted(Spool):
        def __init__(self, folder):
            super().__init__(folder)
            made.append(self)

    monkeypatch.setattr(selection, "Spool", Noted)
    return made


def saved(versions, folder):
    for name, tensors in zip(("initial", "tuned"), versions, strict=True):
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "initial.safetensors", folder / "tuned.safetensors"


def assert_same_ticket(ticket, expected):
    assert ticket == expected and ticket.names == expected.names
    assert ticket.metadata == expected.metadata and ticket.fingerprint == expected.fingerprint


BUDGETS = {
    "global": "global",
    "layer": "layer",
    "tensor": "tensor",
    "shares": {"embeddings": 0.001, r"layer\.0\.": 0.002, "big": 0.9},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_file_is_that_of_the_ticket_in_memory(backend, density, budget, versions, tmp_path, large, spools):
    paths = saved(versions, tmp_path)
    with using(backend):
        expected = ls.select(*versions, density=density, budget=budget)
        expected.save(tmp_path / "expected.safetensors")
        ticket = ls.select(*paths, density=density, budget=budget, output=tmp_path / "new" / "ticket.safetensors")
        assert len(spools) == (density > 0)
        assert_same_ticket(ticket, expected)
        assert_same_ticket(ls.select(*paths, density=density, budget=budget), expected)  # the index sets in memory
    written = (tmp_path / "new" / "ticket.safetensors").read_bytes()
    assert written == (tmp_path / "expected.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ticket.safetensors"]
    assert_same_ticket(ls.Ticket.load(tmp_path / "new" / "ticket.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_earliest_over_pieces_and_tensors(backend, dtype, versions, tmp_path, large):
    """Deltas of a few values only, and whole tensors of one."""
    levels = [{}, {}]
    for name, tensor in versions[0].items():
        steps = (tensor * 40).round().clamp(-2, 2)
        levels[0][name], levels[1][name] = torch.zeros_like(tensor).to(dtype), steps.to(dtype)
    levels[1]["roberta.big"].fill_(1)
    paths = saved(levels, tmp_path)
    with using(backend):
        for density in (0.05, 0.3, 0.7, 0.9):
            for budget in ("global", "tensor"):
                options = {"density": density, "budget": budget}
                assert_same_ticket(ls.select(*paths, **options), ls.select(*levels, **options))


@pytest.mark.slow
def test_random_cases_against_the_selection_in_memory(large, tmp_path):
    """Many sizes, ties and zeros, entries by the thousand, groups; from a score function, which is streamed, too."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for case in range(150):
        sizes = [draw(0, (3, 100, 3000)[draw(0, 3)]) for _ in range(draw(1, 6))] + [1]
        levels = (2, 10, 10**6)[draw(0, 3)]
        score = {
            f"layer.{i}.weight": torch.randint(-levels, levels + 1, (n,), generator=generator).float()
            for i, n in enumerate(sizes)
        }
        options = {"k": draw(0, sum(sizes) + 1), "budget": ("global", {r"layer\.0": 0.1, r"layer": 0.5})[draw(0, 2)]}

        def piece(name, start, stop, score=score):
            return score[name].view(-1)[start:stop]

        try:
            expected = ls.select(score, score=score, **options)
        except ValueError:  # a share of more than its pool
            with pytest.raises(ValueError, match="are requested from"):
                ls.select(score, score=piece, **options)
            continue
        output = tmp_path / "ticket.safetensors" if case % 2 else None
        assert_same_ticket(ls.select(score, score=piece, output=output, **options), expected)


def test_shortfall_and_nothing(versions, tmp_path, large):
    initial, _ = versions
    moved = {name: t + (torch.arange(t.numel()).view_as(t) % 7 == 0) for name, t in initial.items()}
    paths = saved((initial, moved), tmp_path)
    with pytest.warns(ShortTicket):
        ticket = ls.select(*paths, density=0.5, output=tmp_path / "ticket.safetensors")
    assert_same_ticket(ticket, ls.select(initial, moved, density=0.5))
    ticket = ls.select(paths[0], paths[0], density=0.5, output=tmp_path / "none.safetensors")
    assert ticket.k == 0 and ls.Ticket.load(tmp_path / "none.safetensors") == ticket


def test_an_error_leaves_no_file(versions, tmp_path, large):
    initial, tuned = versions
    tuned["roberta.big"][3, 1] = float("nan")
    paths = saved((initial, tuned), tmp_path)
    with pytest.raises(NonFiniteDelta, match="the delta of 'roberta.big' holds NaN"):
        ls.select(*paths, density=0.1, output=tmp_path / "new" / "ticket.safetensors")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("density", "encoding"), [(0.03, Encoding.LIST16), (0.2, Encoding.BITMAP)])
def test_a_ticket_on_disk_is_a_ticket(density, encoding, versions, tmp_path, large, spools):
    """What is looked at is read from the file, which lives as long as the ticket, whatever becomes of the output."""
    output = tmp_path / "ticket.safetensors"
    ticket = ls.select(*saved(versions, tmp_path), density=density, output=output)
    expected = ls.select(*versions, density=density)
    assert spools and ticket.sets["roberta.big"].encoding is encoding
    output.write_bytes(b"")
    output.unlink()
    spools.clear()
    for name in ticket.names:
        assert torch.equal(ticket.mask(name), expected.mask(name))
    assert copy.deepcopy(ticket) == expected and ~~ticket == expected and (ticket & expected) == expected
    ticket.save(tmp_path / "again.safetensors")
    assert ls.Ticket.load(tmp_path / "again.safetensors") == expected
    opt = ls.MaskedAdamW({n: torch.nn.Parameter(t) for n, t in versions[0].items()}, ticket)
    assert opt.active_entries == expected.k


@pytest.mark.parametrize("limit", ["bitmap", "ticket"])
def test_what_is_small_stays_in_memory(limit, versions, tmp_path, monkeypatch, spools):
    """A bitmap up to the limit is made at once; a small ticket of a large model takes the passes, and no file."""
    paths, calls = saved(versions, tmp_path), []
    bitmap = sum(8 * -(-t.numel() // 64) for t in versions[0].values())
    monkeypatch.setattr(selection, "LARGE", bitmap if limit == "bitmap" else bitmap - 1)
    by_tensor = selection.select_by_tensor
    monkeypatch.setattr(selection, "select_by_tensor", lambda *args: calls.append(args) or by_tensor(*args))
    ticket = ls.select(*paths, density=0.01, output=tmp_path / "ticket.safetensors")
    assert not spools and len(calls) == (limit == "ticket")
    assert_same_ticket(ticket, ls.select(*versions, density=0.01))
    if limit == "ticket":
        in_memory = ls.select(*paths, density=0.01)
        assert all(s.encoding is Encoding.LIST16 for s in in_memory.sets.values() if s.n > 2000 and s.k < s.n / 16)


def test_output_is_saved_whatever_is_selected(versions, tmp_path):
    ticket = ls.select(*versions, density=0.2, output=tmp_path / "ticket.safetensors")
    ticket.save(tmp_path / "expected.safetensors")
    assert (tmp_path / "ticket.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_the_command_spools(versions, tmp_path, large, spools, capsys):
    paths = saved(versions, tmp_path)
    output = tmp_path / "ticket.safetensors"
    command = ["select", "--initial", str(paths[0]), "--tuned", str(paths[1]), "--density", "0.2"]
    assert main([*command, "--output", str(output)]) == 0
    assert spools and ls.Ticket.load(output) == ls.select(*versions, density=0.2)
    captured = capsys.readouterr()
    assert f"written to {output}" in captured.out and "select: 100%" in captured.err


def test_a_spool_gives_back_what_it_took(tmp_path):
    tensors = [
        torch.arange(5, dtype=torch.int16), torch.empty(0, dtype=torch.int32), torch.randn(3_000_001),
        torch.tensor([7], dtype=torch.uint8), torch.arange(9), torch.randn(10).bfloat16(), torch.randn(40, 50).t(),
    ]  # fmt: skip
    with Spool(tmp_path) as spool:
        for tensor in tensors:
            spool.append(tensor)
        found = list(spool)
        assert not list(tmp_path.iterdir())
    for tensor, back in zip(tensors, found, strict=True):
        assert back.dtype == tensor.dtype and torch.equal(back, tensor.reshape(-1))
        assert back.data_ptr() % 8 == 0
    found[0][0] = 3  # of this process alone
    assert same_bits(found[2], tensors[2])


PEAK = """
import sys
import ltp_sparse as ls
from helpers.process_memory import anonymous_peak
from ltp_sparse import selection

selection.LARGE = int(sys.argv[4])

ls.select(sys.argv[1], sys.argv[1], density=0)  # code and pools that stay
with anonymous_peak() as peak:
    ticket = ls.select(sys.argv[1], sys.argv[2], density=0.6, output=sys.argv[3])
print(*peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_one_tensor(tmp_path):
    """The rest of the ticket, and of what finds it, is not in memory; nor is it when the ticket is saved."""
    tensors, n = 30, 2_000_000
    base = {f"layer.{i}.weight": torch.empty(n // 1000, 1000).normal_() for i in range(tensors)}
    save_file(base, tmp_path / "initial.safetensors")
    for tensor in base.values():
        tensor.add_(torch.empty(tensor.shape).normal_(), alpha=1e-3)
    save_file(base, tmp_path / "tuned.safetensors")
    peaks = {}  # with a spool, and without
    for limit in (0, 10**9):
        files = [tmp_path / name for name in ("initial.safetensors", "tuned.safetensors", f"{limit}.safetensors")]
        peaks[limit] = int(printed(PEAK, *files, limit))
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1000000000.safetensors").read_bytes()
    assert peaks[0] <= 0.205 * n + 8e6, f"{peaks[0] / 1e6:.1f} MB"
    assert peaks[0] < peaks[10**9] - tensors * n / 8 / 2
