"""`select_sharded`: the ticket of one process, bit for bit, on 1 to 4 ranks and any sharding (contract 1).

All cases run in one group of four processes, which keep a record; a test reads what they say of its case.
"""

import json
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from helpers.process_memory import forget_peak, return_freed_memory, status
from helpers.ranks import leave_group, start
from helpers.selections import tune
from safetensors.torch import save_file
from torch import distributed, nn

import ltp_sparse as ls
from ltp_sparse.ops.routes import NonFiniteDelta
from ltp_sparse.selection import Shard, scores, select_sharded
from ltp_sparse.tickets.bits import TILE

WORLD = 4
SHAPES = {
    "roberta.embeddings.word_embeddings.weight": (3 * TILE // 100 + 7, 100),
    "roberta.encoder.layer.0.dense.weight": (50, 30),
    "roberta.encoder.layer.0.dense.bias": (50,),
    "roberta.encoder.layer.1.dense.weight": (3, 5, 7),
    "roberta.encoder.layer.1.scale": (),
    "roberta.encoder.layer.1.nothing": (0, 4),
}
KINDS = ("normal", "levels", "zeros", "bfloat16")
BUDGETS = ("global", "layer", "tensor", {"embeddings": 0.5, r"layer\.0": 0.1})


def versions(kind="normal", shapes=SHAPES):
    """(initial, tuned): normal deltas, heavy ties, mostly zeros, 16 bits."""
    g = torch.Generator().manual_seed(1)
    initial = {name: torch.randn(shape, generator=g) * 0.02 for name, shape in shapes.items()}
    tuned = {}
    for name, t in initial.items():
        delta = torch.randn(t.shape, generator=g) * 1e-3
        if kind == "levels":
            delta = torch.randint(-2, 3, t.shape, generator=g) * 2.0**-7
            t.mul_(64).round_().div_(64)
        elif kind == "zeros":
            delta *= torch.rand(t.shape, generator=g) < 0.1
        tuned[name] = t + delta
    if kind == "bfloat16":
        initial, tuned = ({name: t.bfloat16() for name, t in side.items()} for side in (initial, tuned))
    return initial, tuned


class Ranks:
    """What a case sees: this process among the first `size` ranks, and where to put files."""

    def __init__(self, group, rank, size, folder):
        self.group, self.rank, self.size, self.folder = group, rank, size, folder

    def cut(self, n, backwards=False):
        """This rank's range of n entries, cut unevenly: later ranges have more. Backwards: rank 0 has the last."""
        total = self.size * (self.size + 1) // 2
        at = [n * i * (i + 1) // (2 * total) for i in range(self.size)] + [n]
        part = self.size - 1 - self.rank if backwards else self.rank
        return at[part], at[part + 1]


def check(ranks, shard, expected):
    """The whole and the local ticket are those of one process."""
    whole = shard.gather()
    assert whole == expected and whole.names == expected.names
    assert whole.fingerprint == expected.fingerprint
    for name, part in shard.parts.items():
        assert (part.k, part.digest) == (expected.sets[name].k, expected.sets[name].digest()), name
        assert part.first == expected.entries(name, 0, part.start).k, name
    assert whole.metadata == expected.metadata == shard.metadata == shard.local.metadata
    for name, part in shard.shards.items():
        if name in shard.local.sets:
            entries = expected.entries(name, part.start, part.stop)
            assert shard.local.sets[name].digest() == entries.digest(), name
        else:
            assert part.start == part.stop


def same_error(ranks, expected, message, work):
    """An error on one rank is one on every rank."""
    with pytest.raises(expected) as caught:
        work()
    messages = [None] * ranks.size
    distributed.all_gather_object(messages, str(caught.value), group=ranks.group)
    assert all(message in found for found in messages), messages


def replicated(ranks):
    for kind in KINDS:
        initial, tuned = versions(kind)
        for budget in BUDGETS:
            expected = ls.select(initial, tuned, density=0.05, budget=budget)
            shard = select_sharded(initial, tuned, density=0.05, budget=budget, group=ranks.group)
            check(ranks, shard, expected)
            assert shard.local == expected, "every rank holds all"


def flat_shards(ranks):
    """Ranges that end anywhere: inside rows, tiles and words; some of them empty."""
    for kind in KINDS:
        initial, tuned = versions(kind)
        cuts = {name: Shard(*ranks.cut(t.numel(), kind == "levels"), t.shape) for name, t in initial.items()}
        mine = [{name: t.view(-1)[slice(*cuts[name][:2])] for name, t in side.items()} for side in (initial, tuned)]
        for budget in BUDGETS:
            expected = ls.select(initial, tuned, k=2000, budget=budget)
            shard = select_sharded(*mine, shards=cuts, k=2000, budget=budget, group=ranks.group)
            check(ranks, shard, expected)
            assert shard.local.names == expected.names
            assert all(shape == mine[0][name].shape for name, shape in shard.local.shapes.items())


def whole_parameters(ranks):
    """Each rank holds some parameters whole and knows nothing of the others, as ZeRO partitions them."""
    initial, tuned = versions("levels")
    own = [name for i, name in enumerate(initial) if i % ranks.size == ranks.rank]
    shards = {name: Shard(0, initial[name].numel(), initial[name].shape) for name in own}
    shard = select_sharded(
        {name: initial[name] for name in own}, {name: tuned[name] for name in own},
        shards=shards, density=0.3, group=ranks.group,
    )  # fmt: skip
    check(ranks, shard, ls.select(initial, tuned, density=0.3))
    assert set(shard.local.names) == set(own)


def checkpoints(ranks):
    """Files that all ranks read, in memory sides, and pieces of strided tensors."""
    initial, tuned = versions("levels")
    files = [ranks.folder / f"{side}-{ranks.size}-{ranks.rank}.safetensors" for side in ("initial", "tuned")]
    for file, side in zip(files, (initial, tuned), strict=True):
        save_file(side, file)
    expected = ls.select(initial, tuned, density=0.2)
    cuts = {name: Shard(*ranks.cut(t.numel()), t.shape) for name, t in initial.items()}
    flat = {name: t.reshape(-1)[slice(*cuts[name][:2])] for name, t in tuned.items()}
    strided = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tuned.items()}
    for after, shards in ((files[1], None), (tuned, None), (strided, None), (flat, cuts)):
        check(ranks, select_sharded(files[0], after, shards=shards, density=0.2, group=ranks.group), expected)


def dtensors(ranks):
    """FSDP2 modules, with rows that do not divide, and a mesh that both shards and replicates."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Rows

    mesh = DeviceMesh.from_group(ranks.group, "cpu")

    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 3), nn.Embedding(401, 50))

    expected = ls.select(model(0), model(1), density=0.1)
    sharded = [model(0), model(1)]
    for whole in sharded:
        fully_shard(whole, mesh=mesh)
    shard = select_sharded(*sharded, density=0.1, group=ranks.group)
    check(ranks, shard, expected)
    for name, parameter in sharded[1].named_parameters():
        assert shard.local.shapes[name] == parameter.to_local().shape
    check(ranks, select_sharded(model(0), sharded[1], density=0.1, group=ranks.group), expected)

    initial, tuned = versions("levels", {"a": (400, 33), "b": (6,), "c": (1, 9)})
    expected = ls.select(initial, tuned, density=0.2)
    placements = [Rows(0)]
    if ranks.size == 4:
        mesh, placements = DeviceMesh("cpu", [[0, 1], [2, 3]]), [Replicate(), Rows(0)]
    placed = [
        {n: distribute_tensor(t, mesh, placements if n != "b" else [Replicate()] * mesh.ndim) for n, t in side.items()}
        for side in (initial, tuned)
    ]
    check(ranks, select_sharded(*placed, density=0.2, group=ranks.group), expected)
    columns = [{"a": distribute_tensor(side["a"], mesh, [Rows(1)] * mesh.ndim)} for side in (initial, tuned)]
    if ranks.size > 1:
        same_error(
            ranks, ValueError, "expected DTensors that are sharded by rows",
            lambda: select_sharded(*columns, density=0.2, group=ranks.group),
        )  # fmt: skip


def scored(ranks):
    initial, _ = versions()
    cuts = {name: Shard(*ranks.cut(t.numel()), t.shape) for name, t in initial.items()}
    flat = {name: t.reshape(-1)[slice(*cuts[name][:2])] for name, t in initial.items()}
    expected = ls.select(initial, score=initial, density=0.2)
    for score in (flat, scores.magnitude(initial)):
        check(ranks, select_sharded(flat, score=score, shards=cuts, density=0.2, group=ranks.group), expected)


@contextmanager
def smaller(**values):
    with pytest.MonkeyPatch.context() as patch:
        tune(patch.setattr, **values)
        yield


def overflow(ranks):
    """One rank has more candidates than room, the others do not: all take the route of ties."""
    initial = {"a": torch.zeros(900), "b": torch.zeros(300)}
    tuned = {"a": torch.arange(900.0) % 7, "b": torch.full((300,), 2.0)}
    cuts = {name: Shard(*ranks.cut(t.numel()), t.shape) for name, t in initial.items()}
    flat = [{name: t[slice(*cuts[name][:2])] for name, t in side.items()} for side in (initial, tuned)]
    for k in (1, 100, 500, 700, 1199):
        with pytest.warns() if k == 1199 else smaller():
            expected = ls.select(initial, tuned, k=k)
        with smaller(_SPARE_CANDIDATES=60), pytest.warns() if k == 1199 else smaller():
            check(ranks, select_sharded(*flat, shards=cuts, k=k, group=ranks.group), expected)


def nothing_moved(ranks):
    initial, _ = versions()
    with pytest.warns(ls.selection.ShortTicket, match="only 0 of"):
        shard = select_sharded(initial, initial, k=10, group=ranks.group)
    assert shard.gather().k == 0 and shard.metadata["thresholds"] == {}
    assert select_sharded(*versions(), k=0, group=ranks.group).gather().k == 0


def bad_values(ranks):
    initial, tuned = versions()
    name = "roberta.encoder.layer.0.dense.weight"
    cuts = {n: Shard(*ranks.cut(t.numel()), t.shape) for n, t in initial.items()}
    flat = [{n: t.reshape(-1)[slice(*cuts[n][:2])].clone() for n, t in side.items()} for side in (initial, tuned)]
    if ranks.rank == ranks.size - 1:
        flat[1][name][-1] = float("nan")
    same_error(
        ranks, NonFiniteDelta, f"the delta of {name!r} holds NaN",
        lambda: select_sharded(*flat, shards=cuts, density=0.1, group=ranks.group),
    )  # fmt: skip


def errors(ranks):
    initial, tuned = versions()
    n = sum(t.numel() for t in initial.values())
    last = ranks.rank == ranks.size - 1

    def expect(message, error=ValueError, first=initial, second=tuned, **kwargs):
        same_error(
            ranks, error, message,
            lambda: select_sharded(first, second, **{"density": 0.1, "group": ranks.group, **kwargs}),
        )  # fmt: skip

    expect(f"k must be in [0, {n:,}]", density=None, k=n + 1)
    expect("either density= or k=", density=None)
    expect("either tuned= or score=", second=None)
    expect("the pool holds none", pool=["nowhere"])
    expect("must be float32", TypeError, {"a": torch.zeros(4).double()}, {"a": torch.ones(4).double()})

    gap = {"a": Shard(0, 3, (4,))}
    expect("'a' must cover its 4 entries", first={"a": torch.zeros(3)}, second={"a": torch.ones(3)}, shards=gap)
    expect("its tensor has 2", first={"a": torch.zeros(2)}, second={"a": torch.ones(2)}, shards=gap)
    if ranks.size == 1:
        return
    expect("k: rank 0 has [20], rank", density=None, k=30 if last else 20)
    expect("metadata: rank 0 has", metadata={"language": "sw" if last else "en"})
    expect("names of the pool", pool=["bias"] if last else ["weight"])
    expect("nowhere", (ValueError, FileNotFoundError), second="nowhere" if last else tuned)
    other = {"a": torch.zeros(5 if last else 4)}
    expect("[4] on one rank and [5] on another", first=other, second=other)

    def score(name, start, stop):
        if last and stop == initial[name].numel():
            raise RuntimeError("a score that fails half way")
        return torch.ones(stop - start)

    failures = (ValueError, RuntimeError)
    expect("a score that fails half way", failures, second=None, score=score)
    for turn in range(1, 5):  # readings of many equal scores
        begun: Counter[int] = Counter()

        def failing(name, start, stop, turn=turn, begun=begun):
            begun[start] += 1
            if last and begun[start] == turn:
                raise RuntimeError("a score that fails half way")
            return torch.ones(stop - start)

        large = {"a": torch.zeros(400_000 * ranks.size)}  # more on each rank than there is room for candidates
        expect("a score that fails half way", failures, first=large, second=None, score=failing)
    expect("must return a float32", second=None, score=lambda *at: torch.ones(at[2] - at[1] + last))


def memory(ranks):
    """Contract 2 on every rank: temporaries and ticket under 0.205 bytes per entry that it holds + 8 MB."""
    if ranks.size != 2 or not sys.platform.startswith("linux"):
        return
    n = 20_000_000
    for shards, held in ({"a": Shard(ranks.rank * n, (ranks.rank + 1) * n, (2 * n,))}, n), (None, n):
        initial = {"a": torch.empty(held).normal_()}
        tuned = {"a": initial["a"] + 1e-3}
        tuned["a"] += initial["a"] * 1e-2
        forget_peak()
        before = status()["VmRSS"]
        shard = select_sharded(initial, tuned, shards=shards, density=0.2, group=ranks.group)
        peak = status()["VmHWM"] - before
        assert shard.metadata["k"] == (2 * n if shards else n) // 5
        assert peak <= 0.205 * held + 8e6, f"{peak / 1e6:.1f} MB"


CASES = {
    case.__name__: case
    for case in (
        replicated, flat_shards, whole_parameters, checkpoints, dtensors, scored, overflow, nothing_moved, bad_values,
        errors, memory,
    )
}  # fmt: skip


def _rank(rank, folder):
    return_freed_memory()
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    groups = {size: distributed.new_group(range(size), timeout=timedelta(seconds=120)) for size in range(1, WORLD + 1)}
    outcome = {}
    for size, group in groups.items():
        for name, case in CASES.items():
            if rank < size:
                try:
                    case(Ranks(group, rank, size, folder))
                except Exception:
                    outcome[f"{name}-{size}"] = traceback.format_exc()
                    break  # the other ranks may wait for this one: no later case of this group would mean anything
                outcome[f"{name}-{size}"] = ""
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    leave_group()


@pytest.fixture(scope="module")
def outcomes(once):
    folder = once("ranks", lambda folder: start(_rank, (folder,), WORLD))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("size", range(1, WORLD + 1))
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(case, size, outcomes):
    for rank in range(size):
        failure = outcomes[rank].get(f"{case}-{size}", "not run, since an earlier case failed")
        assert not failure, f"rank {rank} of {size}: {failure}"


def test_without_a_group_it_is_select():
    with pytest.raises(ValueError, match="init_process_group, or use select"):
        select_sharded({"a": torch.zeros(3)}, {"a": torch.ones(3)}, k=1)
