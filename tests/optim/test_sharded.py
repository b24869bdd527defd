"""`MaskedAdamW` on sharded models: given the same gradients, the bits of one process, on 2 to 4 ranks.

All cases run in one group of processes, which keep a record; a test reads what they say of its case. Beside the sharded
model each rank trains a whole one. The first rank alone has a loss, and FSDP2 sums: so both have the same gradients.
"""

import json
import traceback
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from helpers.ranks import leave_group
from helpers.sharded_model import loss_of, net, shard_columns, shard_rows, shard_tensors, whole
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Replicate

from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.sharding import Cut

WORLD = 4
BF16 = {"dtype": torch.bfloat16}
OPTIONS = {
    "plain": {},
    "packed": {"gradients": "packed"},
    "clipped": {"max_grad_norm": 0.1},
    "packed-clipped": {"gradients": "packed", "max_grad_norm": 0.1},
    "pull": {"pull": 1e-3},
    "dense": {"dense": ["block.norm", "small"]},
    "master": BF16,
    "master-packed": {**BF16, "gradients": "packed"},
    "nearest": {**BF16, "master": False},
}


class Ranks:
    """What a case sees: this process among the first `size` ranks."""

    def __init__(self, groups, rank, size, folder):
        self.groups, self.rank, self.size, self.folder = groups, rank, size, folder

    @property
    def group(self):
        return self.groups[self.size]

    def among(self, size):
        return Ranks(self.groups, self.rank, size, self.folder)

    def mesh(self, *shape):
        from torch.distributed.device_mesh import DeviceMesh

        if not shape:
            return DeviceMesh.from_group(self.group, "cpu")
        return DeviceMesh("cpu", torch.arange(self.size).view(shape), mesh_dim_names=("outer", "inner"))


def ticket_of(model, density=0.2, without=()):
    pool = [name for name in canonical_parameters(model) if not name.startswith(tuple(without) or "-")]
    return Ticket.random(model, density=density, seed=3, pool=lambda name: name in pool)


class Pair:
    """A sharded model with its optimizer, and a whole one with its own."""

    def __init__(self, ranks, shard=None, *, first=False, dtype=torch.float32, dense=(), lr=0.01, seed=0, **options):
        """first: the optimizer is made before the model is sharded."""
        self.ranks = ranks
        self.plain, self.sharded = net(dtype, seed=seed), net(dtype, seed=seed)
        shard = shard or (lambda model: shard_rows(model, ranks.mesh()) if ranks.size > 1 else model)
        ticket = ticket_of(self.plain, without=dense)

        def optimizer(model, **options):
            modules = [model.get_submodule(name) for name in dense]
            in_full = [p for module in modules for p in module.parameters()]
            return MaskedAdamW(model, ticket, lr=lr, dense=in_full, **options)

        if ranks.size == 1:
            options["gradients"] = "dense"
        # packed, an ordinary embedding adds up the gradients of its rows in another order
        self.own = optimizer(self.plain, **{**options, "gradients": "dense"})
        if first:
            self.optimizer = optimizer(self.sharded, **options)
        shard(self.sharded)
        if not first:
            self.optimizer = optimizer(self.sharded, **options)
        self.count = 0

    def step(self, micro_batches=1, sync=True, clip=None):
        for batch in range(micro_batches):
            if hasattr(self.sharded, "set_requires_gradient_sync"):
                self.sharded.set_requires_gradient_sync(sync or batch == micro_batches - 1)
            for model in (self.plain, self.sharded):
                loss = loss_of(model, self.count)
                (loss if model is self.plain or self.ranks.rank == 0 else loss * 0).backward()
            self.count += 1
        for optimizer in (self.own, self.optimizer):
            if clip is not None:
                optimizer.clip_grad_norm_(clip)
            optimizer.step()
            optimizer.zero_grad()

    def check(self):
        own, other = canonical_parameters(self.plain), canonical_parameters(self.sharded)
        assert list(own) == list(other)
        for name, param in own.items():
            found = whole(other[name].detach())
            assert torch.equal(found, param), f"{name}: {int((found != param).sum())} entries differ"
        for one, two in zip(self.own.param_groups, self.optimizer.param_groups, strict=True):
            by_rows = [Cut.of(param, "it").by_rows for param in two["params"]]
            digests = zip(one["index_sets"], two["index_sets"], by_rows, strict=True)
            assert all((a == b) == row for a, b, row in digests), "another cut by columns is another state"

    def check_state(self):
        """What this rank holds of the state is its part of that of the whole parameter."""
        members = [[p for group in o.param_groups for p in group["params"]] for o in (self.own, self.optimizer)]
        for twin, param in zip(*members, strict=True):
            slots = self.optimizer._parts[param].slots
            for key, values in self.optimizer.state[param].items():
                expected = self.own.state[twin][key]
                assert torch.equal(values, expected[slots] if expected.dim() else expected), key


def trains(pair, steps=3, **options):
    before = [p.detach().clone() for p in pair.plain.parameters()]
    for _ in range(steps):
        pair.step(**options)
    pair.check()
    if all(Cut.of(param, "it").by_rows for param in pair.sharded.parameters()):
        pair.check_state()
    assert any(not torch.equal(p, b) for p, b in zip(pair.plain.parameters(), before, strict=True))


def rows(ranks, name):
    trains(Pair(ranks, lambda model: shard_rows(model, ranks.mesh()), **OPTIONS[name]))


def optimizer_first(ranks, name):
    trains(Pair(ranks, lambda model: shard_rows(model, ranks.mesh()), first=True, **OPTIONS[name]))


def accumulation(ranks, name):
    pair = Pair(ranks, lambda model: shard_rows(model, ranks.mesh()), **OPTIONS[name])
    trains(pair, micro_batches=2)
    trains(pair, micro_batches=2, clip=0.05)
    trains(pair, micro_batches=3, sync=False)


def grid(ranks):
    return ranks.mesh(2, ranks.size // 2)


def replicas(ranks, name):
    """HSDP: rows on the inner dimension, copies on the outer."""
    trains(Pair(ranks, lambda model: shard_rows(model, grid(ranks)), **OPTIONS[name]))


def columns(ranks, name):
    trains(Pair(ranks, lambda model: shard_columns(model, ranks.mesh()), **OPTIONS[name]))


def given_gradients(ranks, shard, name):
    """The gradients of the whole model, cut: what tensor parallelism computes differs in the last bits."""
    pair = Pair(ranks, shard, **OPTIONS[name])
    for _ in range(3):
        loss_of(pair.plain, pair.count).backward()
        pair.count += 1
        grads = {n: p.grad for n, p in canonical_parameters(pair.plain).items()}
        for n, param in canonical_parameters(pair.sharded).items():
            param.grad = cut_like(param, grads[n])
            for hook in list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()):
                hook(param)
        for optimizer in (pair.own, pair.optimizer):
            optimizer.step()
            optimizer.zero_grad()
        pair.check()


def cut_like(param, grad):
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return grad.clone()
    plain = DTensor.from_local(grad.clone(), param.device_mesh, [Replicate()] * param.device_mesh.ndim, run_check=False)
    return plain.redistribute(placements=param.placements)


def tensor_parallel(ranks, name):
    given_gradients(ranks, lambda model: shard_tensors(model, ranks.mesh()), name)


def tensor_parallel_and_rows(ranks, name):
    def shard(model):
        mesh = grid(ranks)
        return shard_rows(shard_tensors(model, mesh["inner"]), mesh["outer"])

    given_gradients(ranks, shard, name)


def saved(folder, model, optimizer, group, load=False):
    """Through torch.distributed.checkpoint, as `get_state_dict` gives it."""
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    (checkpoint.load if load else checkpoint.save)(state, checkpoint_id=folder, process_group=group)
    if load:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def resharding(ranks, name):
    """Saved on 1, 2 and 3 ranks, loaded on 1 to 4: the same bits, then and after two more steps."""
    for n in (2, 1, 3):
        folder, twins = ranks.folder / f"{name}-{n}", ranks.folder / f"{name}-{n}.pt"
        if ranks.rank < n:
            pair = Pair(ranks.among(n), **OPTIONS[name])
            trains(pair)
            saved(folder, pair.sharded, pair.optimizer, ranks.groups[n])
            if ranks.rank == 0:
                torch.save([pair.plain.state_dict(), pair.own.state_dict()], twins)
        distributed.barrier()
        for m in (1, 2, 3, 4) if n == 2 else (1, 2):
            if ranks.rank < m:
                pair = Pair(ranks.among(m), seed=1, **OPTIONS[name])
                saved(folder, pair.sharded, pair.optimizer, ranks.groups[m], load=True)
                for loaded, state in zip((pair.plain, pair.own), torch.load(twins), strict=True):
                    loaded.load_state_dict(state)
                pair.count = 3
                pair.check()
                trains(pair, steps=2)
            distributed.barrier()


CASES = {
    f"{case.__name__}-{name}": (case, name)
    for case, names in ((rows, OPTIONS), (optimizer_first, ("plain", "packed", "master-packed", "dense")),
        (accumulation, ("plain", "packed", "master")),
        (replicas, ("plain", "packed-clipped")), (columns, ("plain", "packed-clipped", "master")),
        (tensor_parallel, ("plain", "packed", "clipped", "master")),
        (tensor_parallel_and_rows, ("plain", "packed", "clipped")),
        (resharding, ("plain", "master-packed", "dense", "pull")))
    for name in names
}  # fmt: skip


GRIDS = (replicas, tensor_parallel_and_rows, resharding)  # meshes of two dimensions, made by all processes


def _rank(rank, folder, cases):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    groups = {size: distributed.new_group(range(size), timeout=timedelta(seconds=120)) for size in range(1, WORLD + 1)}
    outcome = {}
    for size in range(2, WORLD + 1):
        for key in (key for key, of in cases if of == size and rank < size):
            case, name = CASES[key]
            try:
                case(Ranks(groups, rank, size, folder), name)
            except Exception:
                outcome[f"{key}-{size}"] = traceback.format_exc()
                break  # the other ranks may wait for this one: no later case of this group would mean anything
            outcome[f"{key}-{size}"] = ""
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    leave_group()


def run(folder, cases):
    """[(case, ranks)] -> what each rank of them says, by case; "" is good."""
    mp.start_processes(_rank, (folder, cases), nprocs=WORLD, start_method="forkserver")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


ALL = [(key, size) for key in CASES for size in range(2, WORLD + 1) if size == WORLD or CASES[key][0] not in GRIDS]
THIN = [
    *[("rows-pull", 2), ("columns-master", 2), ("rows-packed", 3), ("rows-dense", 3), ("optimizer_first-packed", 3)],
    *[("tensor_parallel-packed", 3), ("rows-master", 4), ("accumulation-packed", 4), ("replicas-packed-clipped", 4)],
    *[("tensor_parallel_and_rows-clipped", 4), ("resharding-master-packed", 4)],
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run(tmp_path_factory.mktemp("thin"), THIN)


@pytest.fixture(scope="module")
def all_outcomes(tmp_path_factory):
    return run(tmp_path_factory.mktemp("all"), ALL)


def check(outcomes, key, size):
    said = [outcome.get(f"{key}-{size}") for outcome in outcomes[:size]]
    assert said == [""] * size, "\n".join(filter(None, said)) or "it was not reached"


@pytest.mark.slow
@pytest.mark.parametrize(("key", "size"), THIN)
def test_on_ranks(outcomes, key, size):
    check(outcomes, key, size)


@pytest.mark.ranks
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("key", "size"), ALL)
def test_all_on_ranks(all_outcomes, key, size):
    check(all_outcomes, key, size)
