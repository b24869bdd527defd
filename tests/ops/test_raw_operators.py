"""Raw calls of the operators with whatever arguments: an error that says what was expected, never a crash or a write
beyond the tensors."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.backends import SLOW_ON_TRITON, Unpacked, using
from helpers.raw_operators import ERRORS, OPERATORS, Call, call, guarded, intact

import ltp_sparse as ls
from ltp_sparse import backends, ops
from ltp_sparse.backends import checks, choice
from ltp_sparse.backends.arguments import Tensors, Tiles
from ltp_sparse.optim.launch import pieces_of
from ltp_sparse.testing import update_problem
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable
from ltp_sparse.weights import digests
from ltp_sparse.weights.tensors import check_plain_tensor

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("backend", SLOW_ON_TRITON)
@pytest.mark.parametrize("op", OPERATORS)
def test_right_arguments_pass(op, backend):
    with using(backend):
        call(op, Call().arguments(op))


def spoilt_rows() -> dict[str, tuple]:
    """Name -> (row, column, value) of a table that cannot be."""
    big = 2**62
    cases = {f"{column.name.lower()}-{value}": (1, column, value) for column in Column for value in (-1, big, -big)}
    cases |= {
        "param-beyond": (-1, Column.PARAM, 4),
        "param-out-of-order": (0, Column.PARAM, 1),
        "length-beyond-the-parameter": (1, Column.LENGTH, 91),
        "length-of-two-tiles": (0, Column.LENGTH, 2 * TILE),
        "start-on-the-tile-before": (1, Column.START, TILE - 1),
        "active-none": (2, Column.ACTIVE, 0),
        "active-more": (0, Column.ACTIVE, TILE),
        "slot-later": (1, Column.SLOT, 5),
        "index-odd": (1, Column.INDEX, 2049),
        "index-later": (1, Column.INDEX, 2050),
        "encoding-unknown": (0, Column.ENCODING, 3),
        "encoding-other": (0, Column.ENCODING, int(Encoding.LIST16)),
        "block-later": (1, Column.BLOCK, 999),
    }
    return cases


def test_arguments_go_by_position_and_an_empty_tensor_is_none():
    """As programs wrote them before there were optional arguments."""
    results = []
    for missing in (None, torch.empty(0)):
        u = Call().update
        index = [u[name] for name in ("tiles", "words", "ranks", "positions")]
        grads = [*u["grads"][:-1], missing]
        torch.ops.ltp_sparse.masked_adamw_(
            u["params"], grads, u["exp_avg"], u["exp_avg_sq"], missing, missing, *index, u["coefficients"], missing,
            False, False,
        )  # fmt: skip
        squares = torch.ops.ltp_sparse.masked_sum_squares(
            u["params"], grads, missing, *index, u["coefficients"], missing, False
        )
        out = torch.zeros(len(u["exp_avg"]))
        torch.ops.ltp_sparse.masked_pack_(grads, out, *index, False)
        results.append([*u["params"], u["exp_avg"], squares, out])
    assert all(map(torch.equal, *results)) and results[0][-1].any() and results[0][4].any()


@pytest.mark.parametrize(("row", "column", "value"), spoilt_rows().values(), ids=spoilt_rows())
def test_tables_that_cannot_be_are_refused(row, column, value):
    for op in OPERATORS:
        arguments = Call().arguments(op)
        arguments["tiles"][row, column] = value
        with using("compiled"), pytest.raises(ValueError, match="tile table|reaches to"):
            call(op, arguments)


@pytest.mark.parametrize(
    ("what", "spoil", "message"),
    [
        ("words", lambda t: t[1].logical_not_(), "ACTIVE must be the bits"),
        ("words", lambda t: t[-1].fill_(-1), "ACTIVE must be the bits|past its end"),
        ("ranks", lambda t: t[3].add_(1), "ranks do not count"),
        ("positions", lambda t: t[:2].copy_(t[:2].flip(0)), "must ascend"),
        ("positions", lambda t: t[-1].fill_(300), "past its end"),
        ("positions", lambda t: t[-1].fill_(-1), "past its end"),
    ],
)
def test_indices_that_cannot_be_are_refused(what, spoil, message):
    for op in OPERATORS:
        arguments = Call().arguments(op)
        with using("compiled"):
            call(op, arguments)
            spoil(arguments[what])  # in place: a table that was known good is read again
            with pytest.raises(ValueError, match=message):
                call(op, arguments)


@pytest.mark.parametrize(
    ("what", "at", "value"),
    [
        *[("tiles", (0, column), 2**40) for column in Column if column not in (Column.SLOT, Column.BLOCK)],
        ("tiles", (-1, Column.START), 1),
        ("tiles", (1, Column.LENGTH), 91),
        ("words", (0,), 2**31 - 1),
        ("positions", (-1,), 300),
        ("positions", (0,), 32_767),
    ],
    ids=str,
)
def test_memory_that_changes_behind_torch_is_not_followed(what, at, value):
    """A table that was read before, changed where torch does not count it: the kernels look once more at every tile."""
    for op in OPERATORS:
        arguments, guards = Call().arguments(op), []
        for name, given in arguments.items():
            if isinstance(given, torch.Tensor):
                arguments[name], whole = guarded(given)
                guards.append((arguments[name], whole))
            elif isinstance(given, list):
                guards += (pairs := [guarded(tensor) for tensor in given])
                arguments[name] = [inner for inner, _ in pairs]
        with using("compiled"):
            call(op, arguments)
            arguments[what].numpy()[at] = value
            with pytest.raises(ValueError, match="of the tile table"):
                call(op, arguments)
        assert all(intact(*guard) for guard in guards)


def test_index_sets_whose_counts_are_wrong_do_not_get_through():
    words = IndexSet.from_mask(torch.arange(1000) % 2 == 0).bitmap()
    table = TileTable.build([IndexSet(1000, Encoding.BITMAP, words, torch.tensor([400]), 400)])
    with pytest.raises(ValueError, match="ACTIVE must be the bits"):
        ops.masked_pack_([torch.ones(1000)], torch.zeros(400), table)


def test_a_missing_output_is_refused():
    table = TileTable.build([IndexSet.from_mask(torch.arange(1000) % 2 == 0)])
    with pytest.raises(TypeError, match="masked_pack_: out must be a tensor, got None"):
        ops.masked_pack_([torch.ones(1000)], None, table)


def test_memory_that_is_written_twice_is_refused():
    for first, second in (("exp_avg", "exp_avg_sq"), ("exp_avg", "master"), ("master", "exp_avg_sq")):
        arguments = Call().arguments("masked_adamw_")
        both = torch.zeros(len(arguments["exp_avg"]) + 1)
        arguments[first], arguments[second] = both[1:], both[:-1]
        with pytest.raises(ValueError, match="share memory"):
            call("masked_adamw_", arguments)
    table = TileTable.build([IndexSet.full(6)] * 2)
    state, rows = [torch.zeros(12), torch.zeros(12)], ops.adamw_coefficients(torch.ones(2), lr=0.1)
    flat, grads = torch.zeros(12), [torch.ones(6)] * 2
    ls.masked_adamw_([flat[:6], flat[6:]], grads, *state, table, rows)
    for params in ([flat[:6]] * 2, [flat[:6], flat[5:11]], [flat[::2]] * 2, [flat[:6], torch.zeros(1).expand(6)]):
        with pytest.raises(ValueError, match="share memory"):
            ls.masked_adamw_(params, grads, *state, table, rows)


@pytest.mark.slow
@pytest.mark.skipif(backends.unavailable_reason("compiled", torch.device("cpu")) is not None, reason="not compiled")
def test_no_call_by_chance_crashes_or_writes_beyond_its_tensors():
    """In a process of its own, which a crash would end."""
    count = 1500
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-W", "ignore", "-m", "helpers.raw_operators", "0", str(count), str(log)]
        run = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
        assert run.returncode == 0, f"case {log.read_text().split()[-1]}: {run.returncode}\n{run.stderr}"
    assert int(run.stdout) > count // 2, "the cases are too tame"


# --- passes of the selection ---


def test_passes_refuse_what_does_not_fit():
    tuned, flag = [torch.randn(100)], torch.zeros(1, dtype=torch.int64)
    long = torch.zeros(1, dtype=torch.int64)
    passes = Unpacked(backends.resolve(torch.device("cpu")))
    with pytest.raises(ValueError, match=r"histogram must be torch.int64 \[1, 32768\]"):
        passes.delta_histogram([], tuned, [0], None, torch.zeros(1, 100, dtype=torch.int64), flag)
    with pytest.raises(ValueError, match="group 3"):
        passes.delta_histogram([], tuned, [3], None, torch.zeros(1, 32768, dtype=torch.int64), flag)
    with pytest.raises(ValueError, match=r"keys must be torch.int32 \[1, 16\]"):
        passes.sample_keys([], tuned, long, long, torch.zeros(3, dtype=torch.int32))
    room = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int16)
    band = [long + 1, long + 9, torch.zeros(2, dtype=torch.int32), [0], long, long, None, *room, long, flag, flag]
    with pytest.raises(ValueError, match="the 4 words of tensor 0"):
        passes.delta_band([], tuned, [0], *band)
    candidates = [*room, long, long + 1, long]
    with pytest.raises(ValueError, match="cut must be"):
        passes.take_above(*candidates, long.float(), torch.zeros(4, dtype=torch.int32), long, long, long)
    with pytest.raises(ValueError, match="take must be"):
        passes.take_ties(*candidates, long, torch.zeros(4, dtype=torch.int32), long, torch.zeros(0).long())


# --- subclasses ---


def strange_tensors() -> dict[str, torch.Tensor]:
    from torch._subclasses import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    with FakeTensorMode():
        fake = torch.ones(6)
    freed = torch.ones(7)[1:]
    freed.untyped_storage().resize_(0)
    return {
        "wrapper": TwoTensor(torch.ones(6), torch.ones(6)),
        "fake": fake,
        "meta": torch.ones(6, device="meta"),
        "sparse": torch.ones(6).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(4)], layout=torch.jagged),
        "freed": freed,
    }


@pytest.mark.parametrize("kind", strange_tensors())
def test_tensors_without_plain_memory_are_refused_everywhere(kind):
    tensor = strange_tensors()[kind]
    table, rows = TileTable.build([IndexSet.full(6)]), ops.adamw_coefficients(torch.ones(1), lr=0.1)

    def update(**changed: torch.Tensor) -> None:
        own = {"param": torch.ones(6), "grad": torch.ones(6), "exp_avg": torch.zeros(6), **changed}
        ls.masked_adamw_([own["param"]], [own["grad"]], own["exp_avg"], torch.zeros(6), table, rows)

    update()
    for name in ("param", "grad", "exp_avg"):
        with pytest.raises(ERRORS):
            update(**{name: tensor})
    with pytest.raises(ERRORS):
        ls.topk_delta([], [tensor], 1)
    with pytest.raises(ERRORS):
        ops.masked_pack_([tensor], torch.zeros(6), table)
    with pytest.raises(TypeError, match="fingerprint: 'w'"):
        digests.fingerprint({"w": tensor})


def test_subclasses_that_only_carry_attributes_pass():
    class Labelled(torch.Tensor):
        pass

    check_plain_tensor(torch.ones(3).as_subclass(Labelled), "it")
    check_plain_tensor(torch.nn.Parameter(torch.ones(3)), "it")
    plain = digests.fingerprint({"w": torch.ones(3)})
    assert digests.fingerprint({"w": torch.ones(3).as_subclass(Labelled)}) == plain
    assert digests.fingerprint({"w": torch._neg_view(-torch.ones(3))}) == plain


# --- one decision per step ---


def test_a_step_is_served_by_one_backend(monkeypatch):
    """A table of choices that changes with the density: norm, packing and update go by that of all parameters."""
    rows = [["masked_adamw_", "float32", 0.01, {"triton": 1.0}], ["masked_adamw_", "float32", 0.5, {"reference": 1.0}]]
    monkeypatch.setattr(choice, "choices", lambda: {"cpu": {"measured": True, "source": "test", "rows": rows}})
    choice._orders.cache_clear()
    try:
        used, choose = [], ops._serving
        monkeypatch.setattr(ops, "_serving", lambda *a: used.append(choose(*a).name) or choose(*a))
        for density, expected in ((0.02, "triton"), (0.6, "reference")):
            if backends.unavailable_reason(expected, torch.device("cpu")):
                continue
            for gradients in ("dense", "packed"):
                used.clear()
                torch.manual_seed(0)
                model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
                masks = {name: torch.rand(p.shape) < density for name, p in model.named_parameters()}
                masks["0.bias"][:] = True  # a part of its own density
                ticket = ls.Ticket.from_masks(masks)
                opt = ls.MaskedAdamW(model, ticket, max_grad_norm=1.0, gradients=gradients)
                model(torch.ones(3, 40)).sum().backward()
                opt.step()
                assert set(used) == {expected} and len(used) >= 2
    finally:
        choice._orders.cache_clear()


def test_parts_of_a_table_keep_its_density():
    problem = update_problem({"a": (300, 300), "b": (70,)}, density=0.1)
    table = problem.table
    assert table.density == table.k / sum(table.sizes)
    assert {piece.table.density for piece in pieces_of(table, 10)} == {table.density}
    assert replace(table, counts=(1,)).density == table.density
    tiles = Tiles(table.tiles, table.words, table.ranks, table.positions, Tensors())
    assert checks.table_facts("it", tiles) is checks.table_facts("it", tiles)
