"""Raw calls of the operators with whatever arguments: an error that says what was expected, never a crash or a write
beyond the tensors."""

import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ALL_BACKENDS, Unpacked, using

import ltp_sparse as ls
from ltp_sparse import backends, ops
from ltp_sparse.backends import checks, choice
from ltp_sparse.backends.arguments import Tensors, Tiles
from ltp_sparse.optim.launch import pieces_of
from ltp_sparse.testing import update_problem
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable
from ltp_sparse.weights import names
from ltp_sparse.weights.tensors import check_plain_tensor

OPS = torch.ops.ltp_sparse
ERRORS = (ValueError, TypeError, RuntimeError)


def random_sets() -> list[IndexSet]:
    """Every encoding, tiles that are not whole, a parameter of several tiles."""
    torch.manual_seed(0)
    sizes, densities = (TILE + 90, 700, 300, 1000), (0.3, 1.0, 0.02, 0.4)
    return [IndexSet.from_mask(torch.rand(n) < d) for n, d in zip(sizes, densities, strict=True)]


class Call:
    """Right arguments of all operators, by name, to be spoilt."""

    def __init__(self) -> None:
        table = TileTable.build(random_sets(), ranks=True)
        self.table, k, n = table, table.k, len(table.sizes)
        self.update = {
            "params": [torch.randn(size) for size in table.sizes],
            "grads": [torch.randn(size) for size in table.sizes],
            "exp_avg": torch.zeros(k),
            "exp_avg_sq": torch.zeros(k),
            "scales": None,
            "master": None,
            **self.index(),
            "coefficients": ops.adamw_coefficients(torch.ones(n), lr=0.1),
            "anchor": None,
            "stochastic": False,
            "packed": False,
        }

    def index(self) -> dict:
        return {name: getattr(self.table, name).clone() for name in ("tiles", "words", "ranks", "positions")}

    def arguments(self, op: str) -> dict:
        own = dict(self.update)
        if op == "masked_adamw_":
            return own
        if op == "masked_sum_squares":
            return {name: own[name] for name in own if name not in ("exp_avg", "exp_avg_sq", "scales", "stochastic")}
        return {"grads": own["grads"], "out": torch.zeros(self.table.k), **self.index(), "accumulate": False}


OPERATORS = ("masked_adamw_", "masked_sum_squares", "masked_pack_")


def call(op: str, arguments: dict) -> None:
    getattr(OPS, op)(**arguments)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
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
    with pytest.raises(ValueError, match="counts"):
        IndexSet.from_bitmap(words, 1000, torch.tensor([400]))
    with pytest.raises(ValueError, match="counts"):
        IndexSet.from_bitmap(words, 1000, torch.tensor([500.0]))
    table = TileTable.build([IndexSet(1000, Encoding.BITMAP, words, torch.tensor([400]))])
    with pytest.raises(ValueError, match="ACTIVE must be the bits"):
        ops.masked_pack_([torch.ones(1000)], torch.zeros(400), table)


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


FUZZ = """
import random, sys, torch
import test_raw_operators as t
torch.set_num_threads(1)
seed, count, log = int(sys.argv[1]), int(sys.argv[2]), open(sys.argv[3], "w", buffering=1)
refused = wrote = 0
t.ls.use_backend("compiled")
for number in range(seed, seed + count):
    log.write(f"{number}\\n")
    outcome, intact = t.try_one(number)
    assert intact, f"case {number} wrote beyond its tensors"
    refused += outcome
print(refused)
"""


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of a tensor between canaries, and all that memory as bytes."""
    room = 4096
    whole = torch.full((tensor.nbytes + 2 * room,), 0x5A, dtype=torch.uint8)
    inner = whole[room : room + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return inner.copy_(tensor), whole


def intact(inner: torch.Tensor, whole: torch.Tensor) -> bool:
    room = (len(whole) - inner.nbytes) // 2
    return bool((whole[:room] == 0x5A).all() and (whole[len(whole) - room :] == 0x5A).all())


def strange(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor in its place: of another size, dtype, shape or stride, or with other numbers."""
    n = tensor.numel()
    whole = tensor.is_contiguous() and not tensor.is_meta
    if rng.random() < 0.4 and not tensor.is_floating_point() and n and whole:
        spoilt = tensor.clone()
        at = rng.randrange(n)
        spoilt.view(-1)[at] = rng.choice([-1, 0, 1, 3, int(spoilt.view(-1)[at]) + 1, torch.iinfo(tensor.dtype).max])
        return spoilt
    if not whole:
        return tensor
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int16, torch.int64, torch.bool)
    return rng.choice(
        [
            lambda: tensor.reshape(-1)[: rng.randrange(n + 1)],
            lambda: torch.cat([tensor.reshape(-1)] * 2),
            lambda: tensor.to(rng.choice(dtypes)),
            lambda: torch.empty(0, dtype=tensor.dtype),
            lambda: torch.zeros(2 * n, dtype=tensor.dtype)[::2].view_as(tensor) if n else tensor,
            lambda: tensor.reshape(-1, 1),
            lambda: torch.zeros((), dtype=tensor.dtype),
            lambda: torch.zeros(1, dtype=tensor.dtype).expand(n),
            lambda: tensor.to("meta"),
            lambda: torch.zeros(1, dtype=tensor.dtype).expand(2**40),
        ]
    )()


def try_one(number: int) -> tuple[bool, bool]:
    """(whether the call was refused, whether nothing was written beyond its tensors) of a call by chance."""
    rng = random.Random(number)
    if rng.random() < 0.2:
        sizes = [rng.randrange(1, 200) for _ in range(3)]
        arguments = {
            "initial": [torch.randn(n) for n in sizes],
            "tuned": [torch.randn(n) for n in sizes],
            "groups": [0, 1, 0],
            "k": [rng.choice([3, -1, 2**40, 2**63 - 1]), 1],
        }
        op = "topk_delta"
        arguments["groups"][rng.randrange(3)] = rng.choice([0, 1, 2, -1, 2**62])
    else:
        op = rng.choice(OPERATORS)
        arguments = CALL.arguments(op)
    guards = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name], whole = guarded(value)
            guards.append((arguments[name], whole))
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            pairs = [guarded(tensor) for tensor in value]
            arguments[name] = [inner for inner, _ in pairs]
            guards += pairs
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(
            [name for name, value in arguments.items() if value is not None and not isinstance(value, bool)]
        )
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            arguments[name] = strange(rng, value)
        elif value and isinstance(value[0], torch.Tensor):
            at = rng.randrange(len(value))
            value[at] = strange(rng, value[at])
            if rng.random() < 0.2:
                del value[at]
    for name, value in arguments.items():
        if isinstance(value, bool) and rng.random() < 0.3:
            arguments[name] = not value
    try:
        call(op, arguments)
        refused = False
    except ERRORS:
        refused = True
    return refused, all(intact(*guard) for guard in guards)


CALL = Call() if __name__ == "test_raw_operators" else None


@pytest.mark.skipif(backends.unavailable_reason("compiled", torch.device("cpu")) is not None, reason="not compiled")
def test_no_call_by_chance_crashes_or_writes_beyond_its_tensors():
    """In a process of its own, which a crash would end."""
    count = 1500
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-W", "ignore", "-c", FUZZ, "0", str(count), str(log)]
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
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
        names.fingerprint({"w": tensor})


def test_subclasses_that_only_carry_attributes_pass():
    class Labelled(torch.Tensor):
        pass

    check_plain_tensor(torch.ones(3).as_subclass(Labelled), "it")
    check_plain_tensor(torch.nn.Parameter(torch.ones(3)), "it")
    plain = names.fingerprint({"w": torch.ones(3)})
    assert names.fingerprint({"w": torch.ones(3).as_subclass(Labelled)}) == plain
    assert names.fingerprint({"w": torch._neg_view(-torch.ones(3))}) == plain


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
