"""`MaskedAdamW` on sharded models: given the same gradients, the bits of one process, on 2 to 4 ranks.

All cases run in one group of processes, which keep a record; a test reads what they say of its case. Beside the sharded
model each rank trains a whole one. The first rank alone has a loss, and FSDP2 sums: so both have the same gradients.
"""

import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import resumed_run
from helpers.ranks import leave_group, start
from helpers.sharded_model import loss_of, net, shard_columns, shard_rows, shard_tensors, whole
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.optim.gradient_view import GradientView
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.sharding import Cut, local, reshard

WORLD = 4
WAIT = timedelta(minutes=20)  # of ranks for those that have cases of fewer ranks to run first
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
    "stochastic": {**BF16, "rounding": "stochastic"},
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

    def __init__(
        self, ranks, shard=None, *, first=False, dtype=torch.float32, dense=(), lr=0.01, seed=0, middle=97,
        everyone=False, **options,
    ):  # fmt: skip
        """shard: by rows, unless given; first: the optimizer is made before the model is sharded; everyone: all
        ranks have a loss."""
        self.has_loss = everyone or ranks.rank == 0
        self.plain, self.sharded = net(dtype, middle=middle, seed=seed), net(dtype, middle=middle, seed=seed)
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
                (loss if model is self.plain or self.has_loss else loss * 0).backward()
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
            part = self.optimizer._parts[param]
            slots = slice(part.first, part.first + part.index_set.k)
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


def own_parts(ranks, name):
    """Each rank selects its part of the ticket; none holds the whole."""
    initial, tuned = net(), net(seed=1)
    pair = Pair(ranks, **OPTIONS[name])
    for model in (initial, tuned):
        shard_rows(model, ranks.mesh())
    part = ls.select_sharded(initial, tuned, density=0.1, group=ranks.group)
    ticket = ls.select(net(), net(seed=1), density=0.1)
    assert Ticket.random(initial, density=0.2, seed=3) == Ticket.random(net(), density=0.2, seed=3)
    before = ls.frozen_digests(pair.sharded, part)
    pair.own = MaskedAdamW(pair.plain, ticket, lr=0.01)
    del pair.optimizer  # it packs the gradients of these parameters
    pair.optimizer = MaskedAdamW(pair.sharded, part, lr=0.01, **OPTIONS[name])
    trains(pair)
    ls.verify_frozen(before, pair.sharded, part)
    with torch.no_grad():
        pair.sharded.embed.weight.to_local().add_(1)
    with pytest.raises(RuntimeError, match="have changed"):
        ls.verify_frozen(before, pair.sharded, part)
    with pytest.raises(ValueError, match="and the model (holds )?entries 0 to"):
        MaskedAdamW(net(), part)


def engines(ranks, name):
    """What else acts on the model of a sharded run; all of it leaves the bits as they are."""

    def checkpointed(model):
        model.block = checkpoint_wrapper(model.block)
        return shard_rows(model, ranks.mesh())

    def kept(model):
        return shard_rows(model, ranks.mesh(), reshard_after_forward=False)

    def compiled(model):
        shard_rows(model, ranks.mesh())
        model.block.compile(backend="aot_eager")

    def compiled_first(model):
        model.block.compile(backend="aot_eager")
        shard_rows(model, ranks.mesh())

    def compiled_whole(model):
        shard_rows(model, ranks.mesh())
        model.compile(backend="aot_eager")

    def offloaded(model):
        return shard_rows(model, ranks.mesh(), offload_policy=CPUOffloadPolicy(pin_memory=False))

    for shard in (checkpointed, kept, compiled, compiled_first, compiled_whole, offloaded):
        pair = Pair(ranks, shard, **OPTIONS[name])
        with torch.no_grad():
            loss_of(pair.sharded, 0)  # leaves the gathered parameters of the root in the model
        trains(pair)
        assert torch.isfinite(loss_of(pair.sharded, 0).detach())


def scaled(ranks, name):
    """float16 with a GradScaler on each rank: a step that overflows on one rank is skipped on all."""
    pair = Pair(ranks, dtype=torch.float16, **OPTIONS[name])
    scalers = [torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2) for _ in range(2)]
    entry = int(ticket_of(pair.plain).indices("block.up.weight")[0])  # of the first rank
    for step in range(5):
        for model, scaler in zip((pair.plain, pair.sharded), scalers, strict=True):
            loss = loss_of(model, step)
            scaler.scale(loss if model is pair.plain or pair.has_loss else loss * 0).backward()
        if step == 2:
            pair.plain.block.up.weight.grad.view(-1)[entry] = torch.inf
            if ranks.rank == 0:
                local(pair.sharded.block.up.weight.grad).mul_(torch.inf)
        before = [whole(param.detach()).clone() for param in pair.sharded.parameters()]
        for optimizer, scaler in zip((pair.own, pair.optimizer), scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        pair.check()
        after = [whole(param.detach()) for param in pair.sharded.parameters()]
        assert all(map(torch.equal, before, after)) == (step == 2)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    pair.check_state()
    assert scalers[0].get_scale() == 32 and int(pair.own.state[pair.plain.block.up.weight]["step"]) == 4


def evaluated_first(ranks, name):
    """A forward pass before the optimizer is made leaves gathered parameters in the model."""

    def shard(model):
        shard_rows(model, ranks.mesh())
        with torch.no_grad():
            loss_of(model, 0)

    trains(Pair(ranks, shard, **OPTIONS[name]))


def within_a_bound(ranks, name):
    """Gradients that are summed in another order, or computed in bfloat16: the bounds of docs/sharded.md."""
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for bound, everyone, shard in (
        (1e-6, True, lambda model: shard_tensors(model, ranks.mesh())),
        (1e-2, False, lambda model: shard_rows(model, ranks.mesh(), mp_policy=low)),
    ):
        pair = Pair(ranks, shard, eps=1e-3, middle=96, everyone=everyone, **OPTIONS[name])
        for _ in range(3):
            pair.step(clip=1.0)
        for n, param in canonical_parameters(pair.plain).items():
            off = whole(canonical_parameters(pair.sharded)[n].detach()) - param
            assert float(off.abs().max()) <= bound, (n, float(off.abs().max()))
        assert torch.isclose(pair.own.grad_norm, pair.optimizer.grad_norm, rtol=bound)


def partial_gradients(ranks, name):
    """As tensor parallelism leaves them where it cuts the sequence: each rank has a part of the sum."""
    mesh, states = ranks.mesh(), nn.Linear(5, 4).state_dict()
    for param in states.values():
        distributed.broadcast(param, group=ranks.group, group_src=0)
    plain, copied, twin = (nn.Linear(5, 4) for _ in range(3))
    for model in (plain, copied, twin):
        model.load_state_dict(states)
    for key, param in list(copied.named_parameters()):
        copied.register_parameter(key, nn.Parameter(DTensor.from_local(param.detach(), mesh, [Replicate()])))
    ticket = Ticket.random(plain, density=0.5)
    optimizers = [MaskedAdamW(model, ticket, **OPTIONS[name]) for model in (plain, copied)]
    for model in (plain, twin):
        model(torch.ones(3, 5)).square().sum().backward()
    for key, param in copied.named_parameters():
        grad = twin.get_parameter(key).grad
        param.grad = DTensor.from_local(grad if ranks.rank == 0 else torch.zeros_like(grad), mesh, [Partial()])
        for hook in list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()):
            hook(param)
    for optimizer in optimizers:
        optimizer.step()
    for key, param in copied.named_parameters():
        assert torch.equal(whole(param.detach()), plain.get_parameter(key)), key


def keyed(ranks, name):
    """8-bit moments and stochastic rounding: blocks and random bits are those of the whole parameter."""
    stochastic = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    options = {"stochastic": stochastic, "8bit": {"states": "8bit"}, "both": {**stochastic, "states": "8bit"}}[name]
    dtype = options.pop("dtype", torch.float32)
    for gradients in ("dense", "packed"):
        torch.manual_seed(0)
        # 4 ranks have a tile each, 3 and 2 tiles and more; of the bias all is active, and no tile is needed
        plain = nn.Linear(64, 12 * 1024, bias=True).to(dtype)
        ticket = Ticket.random(plain, density=0.03, pool="weight") | Ticket.full(plain, pool="bias")
        sharded = nn.Linear(64, 12 * 1024, bias=True).to(dtype)
        sharded.load_state_dict(plain.state_dict())
        fully_shard(sharded, mesh=ranks.mesh())
        own = MaskedAdamW(plain, ticket, lr=1e-2, seed=7, max_grad_norm=1.0, **options)
        optimizer = MaskedAdamW(sharded, ticket, lr=1e-2, seed=7, max_grad_norm=1.0, gradients=gradients, **options)
        for _ in range(3):
            for key, param in plain.named_parameters():
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
                part = sharded.get_parameter(key)
                part.grad = cut_like(part, param.grad)
                for hook in list((getattr(part, "_post_accumulate_grad_hooks", None) or {}).values()):
                    hook(part)
            own.step()
            optimizer.step()
        for key, param in plain.named_parameters():
            assert torch.equal(whole(sharded.get_parameter(key).detach()), param), (key, gradients)
        for key, param in sharded.named_parameters():
            part, state = optimizer._parts[param], own.state[plain.get_parameter(key)]
            for what, values in optimizer.state[param].items():
                first = part.blocks[0] if what == "scales" else part.first
                expected = state[what][first:][: len(values)] if values.dim() else state[what]
                assert torch.equal(values, expected), what


def refused(ranks, name):
    """With one sentence, in the constructor and, of what is done to the model later, in `step`."""
    mesh = ranks.mesh()
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match="'a' is placed as .*redistribute"):
        MaskedAdamW({"a": param}, Ticket.full({"a": torch.ones(4, 4)}))
    model = nn.Linear(4, 4)
    optimizer = MaskedAdamW(model, Ticket.full(model))
    model.weight = param
    with pytest.raises(ValueError, match="'weight' is placed as .*redistribute"):
        optimizer.step()
    keyed = [{"states": "8bit"}, {**BF16, "rounding": "stochastic"}]
    shards = [(keyed[0], Shard(0), "cut inside of one"), *((options, Shard(1), "cut by columns") for options in keyed)]
    for options, cut, told in shards:
        model = nn.Linear(48, 64, bias=False, dtype=options.get("dtype"))
        options = {key: value for key, value in options.items() if key != "dtype"}
        ticket = Ticket.random(model, density=0.2)
        optimizer = MaskedAdamW(model, ticket, **options)
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda param, cut=cut: cut)
        with pytest.raises(ValueError, match=told):
            MaskedAdamW(model, ticket, **options)
        with pytest.raises(ValueError, match=told):
            optimizer.step()
    model = nn.Linear(4, 4)
    optimizer = MaskedAdamW(model, Ticket.full(model))
    with pytest.raises(TypeError, match="meta"):
        MaskedAdamW(nn.Linear(4, 4, device="meta"), Ticket.full(model))
    model.to("meta")
    with pytest.raises(ValueError, match="has been replaced"):
        optimizer.step()
    for first in (False, True):
        model, other = net(), Ticket.random(net(), density=0.2, seed=ranks.rank)
        optimizer = MaskedAdamW(model, other) if first else None
        shard_rows(model, mesh)
        optimizer = optimizer or MaskedAdamW(model, other)
        with pytest.raises(ValueError, match="the same ticket and `dense` on all ranks"):
            optimizer.step()
    model = net()
    optimizer = MaskedAdamW(model, ticket_of(model, without=["block.norm"]))
    shard_rows(model, mesh)
    loss_of(model, ranks.rank).backward()
    optimizer.step()
    norm = model.block.norm
    optimizer.add_param_group({"params": [norm.weight if ranks.rank else norm.bias]})  # compared again
    with pytest.raises(ValueError, match="the same ticket and `dense` on all ranks"):
        optimizer.step()
    pair = Pair(ranks)
    pair.step()
    shard_rows(pair.plain, mesh)
    with pytest.raises(ValueError, match="sharded after a step was taken"):
        pair.own.step()
    pair = Pair(ranks)
    pair.sharded.embed.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="'weight' of a Embedding has been replaced"):
        pair.optimizer.step()
    with pytest.raises(ValueError, match="those of all ranks already"):
        Pair(ranks, gradients="packed").optimizer.average_gradients()
    pair = Pair(ranks)
    with pytest.raises(NotImplementedError, match="stays sharded"):
        get_optimizer_state_dict(pair.sharded, pair.optimizer, options=StateDictOptions(full_state_dict=True))
    model = nn.Linear(4, 4)
    ticket = Ticket.full(model)
    with pytest.raises(ValueError, match="FullyShardedDataParallel .* has flattened"):
        MaskedAdamW(FullyShardedDataParallel(model, ranks.group, device_id=torch.device("cpu")), ticket)
    for original, packed in product((False, True), ("dense", "packed")):
        model = nn.Linear(4, 4)
        optimizer = MaskedAdamW(model, ticket, gradients=packed)
        around = FullyShardedDataParallel(model, ranks.group, device_id=torch.device("cpu"), use_orig_params=original)
        around(torch.ones(2, 4)).sum().backward()
        with pytest.raises(ValueError, match="FullyShardedDataParallel .* has flattened"):
            optimizer.step()
    model = nn.Linear(4, 4)
    sharded = net()
    packed = ls.PackedParameters(sharded, ticket_of(sharded))
    optimizer = packed.attach(torch.optim.SGD(packed.parameters(), lr=0.1))
    shard_rows(sharded, mesh)
    with pytest.raises(ValueError, match="has been replaced since the optimizer was made"):
        optimizer.step()
    model = nn.Linear(4, 4)
    optimizer = MaskedAdamW(model, ticket)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed.* has flattened"):
        MaskedAdamW(model, ticket)
    model.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="DeepSpeed.* has flattened"):
        optimizer.step()


def as_torchrun(ranks):
    here = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.size, "LOCAL_WORLD_SIZE": ranks.size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | {key: str(value) for key, value in here.items()}


def accelerated(ranks, name):
    """accelerate's FSDP2 path, which clips by the gradients that it sees in the model."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    as_torchrun(ranks)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin, cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP  # it takes this path on accelerators only
    accelerator.state.fsdp_plugin = plugin
    pair = Pair(ranks, lambda model: model, **OPTIONS[name])
    pair.own = MaskedAdamW(pair.plain, ticket_of(pair.plain), lr=0.01, **OPTIONS[name])
    pair.sharded, _ = accelerator._prepare_fsdp2(pair.sharded, pair.optimizer)
    for seed in range(3):
        for model in (pair.plain, pair.sharded):
            loss_of(model, seed).backward()
            (nn.utils if model is pair.plain else accelerator).clip_grad_norm_(model.parameters(), 0.5)
        if name == "packed":
            grads = [local(param.grad) for param in pair.optimizer.param_groups[0]["params"]]
            assert all(isinstance(grad, GradientView) for grad in grads), "from the first backward on"
        for optimizer in (pair.own, pair.optimizer):
            optimizer.step()
            optimizer.zero_grad()
    for n, param in canonical_parameters(pair.plain).items():
        off = whole(canonical_parameters(pair.sharded)[n].detach()) - param
        assert float(off.abs().max()) <= 1e-6, (n, float(off.abs().max()))


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, seed):
        return {"loss": torch.stack([loss_of(self.net, int(each)) for each in seed]).mean()}


def forced(trainer, version=2):
    """A class of Trainers that take the path of FSDP2, which they have on accelerators only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Forced(trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            state = self.accelerator.state
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.fsdp_plugin.fsdp_version = version
            self.is_fsdp_enabled = True

    return Forced


def arguments(folder, **options):
    """Of a Trainer: three steps, each over all of the data, so that its order does not matter."""
    from transformers import TrainingArguments

    config = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"], "cpu_ram_efficient_loading": False}
    options = {"save_strategy": "no", **options}
    return TrainingArguments(
        str(folder), use_cpu=True, fsdp=True, fsdp_config=config, per_device_train_batch_size=2,
        max_steps=3, learning_rate=0.01, weight_decay=0.01, adam_epsilon=1e-3, max_grad_norm=0.05, logging_steps=1,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip


def check_trained(trainer, plain, own, ticket, dense=()):
    """Three steps of one process lead to the norms and the entries of a Trainer; frozen entries have their bits."""
    before = {key: param.detach().clone() for key, param in canonical_parameters(plain).items()}
    size, norms = 2 * distributed.get_world_size(), []
    for _ in range(3):
        plain(torch.arange(size))["loss"].backward()
        own.step()
        own.zero_grad()
        norms.append(float(own.grad_norm))
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)
    reshard(trainer.model)
    sharded = canonical_parameters(trainer.model)
    assert all(isinstance(param, DTensor) for param in sharded.values())
    moved = 0
    for key, param in canonical_parameters(plain).items():
        found = whole(sharded[key].detach())
        assert float((found - param).abs().max()) <= 1e-6, key
        if key not in dense:
            assert torch.equal(found[~ticket.mask(key)], before[key][~ticket.mask(key)]), key
            moved += int((found != before[key]).sum())
    assert 0.9 * ticket.k < moved <= ticket.k


def trainer(ranks, name):
    """The Trainer of transformers with `fsdp` set."""
    transformers = pytest.importorskip("transformers")
    as_torchrun(ranks)
    plain, model = WithLoss(), WithLoss()
    ticket = ticket_of(plain)
    options = {"lr": 0.01, "eps": 1e-3, "freeze": True}  # it clips by the gradients of all parameters that have one
    with_model = {"model": model, "ticket": ticket, "gradients": name, **options}
    trainer = forced(transformers.Trainer)(
        model, arguments(ranks.folder / f"trainer-{name}"), train_dataset=[{"seed": i} for i in range(2 * ranks.size)],
        optimizer_cls_and_kwargs=(MaskedAdamW, with_model),
    )  # fmt: skip
    trainer.train()
    check_trained(trainer, plain, MaskedAdamW(plain, ticket, max_grad_norm=0.05, **options), ticket)


def sparse_trainer(ranks, name):
    """Ours with `fsdp` set: trained, saved, resumed, the best kept, and put back."""
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from ltp_sparse.training.trainer import KeepBest, SparseTrainer

    as_torchrun(ranks)
    plain, data = WithLoss(), [{"seed": seed} for seed in range(2 * ranks.size)]
    ticket, dense = ticket_of(plain, without=["net.block.norm"]), ["net.block.norm.weight", "net.block.norm.bias"]
    before = {key: param.detach().clone() for key, param in canonical_parameters(plain).items()}

    def made(folder, *, version=2, l2=0.0, **also):
        model, keep = WithLoss().to(torch.bfloat16 if also else torch.float32), KeepBest(last=True)
        options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        return forced(SparseTrainer, version)(
            model, arguments(ranks.folder / folder, label_names=["seed"], **options, **also), ticket,
            dense=model.net.block.norm, pull=1e-3, l2=l2, keep_best=keep, optimizer_options={"gradients": name},
            train_dataset=data, eval_dataset=data,
        )  # fmt: skip

    trainer, resumed = made(f"straight-{name}"), made(f"resumed-{name}")
    trainer.train()
    options = {"lr": 0.01, "eps": 1e-3, "pull": 1e-3, "max_grad_norm": 0.05}
    own = MaskedAdamW(plain, ticket, dense=plain.net.block.norm, **options)
    trainer.base.restore(trainer.keep_best.last)
    check_trained(trainer, plain, own, ticket, dense)
    saved = trainer.args.output_dir + "/checkpoint-2"
    resumed.train(resume_from_checkpoint=saved)
    for one, other in ((trainer.keep_best.last, resumed.keep_best.last), (trainer.keep_best, resumed.keep_best)):
        one, other = (each if isinstance(each, ls.SparseDelta) else each.delta() for each in (one, other))
        for part in ("values", "originals", "dense"):
            assert all(torch.equal(getattr(other, part)[key], held) for key, held in getattr(one, part).items())
    best = trainer.keep_best.delta()
    assert all(torch.equal(best.values[key], values) for key, values in resumed.delta().values.items())
    assert not list(Path(saved).glob("*model*")), "no weights but the changed ones"
    resumed.save_model(f"{resumed.args.output_dir}/whole")
    distributed.barrier()
    written = load_file(f"{resumed.args.output_dir}/whole/model.safetensors")
    best.apply(plain_again := WithLoss())
    for key, param in canonical_parameters(plain_again).items():
        assert torch.equal(written[key], param), key
    resumed.base.put_back()
    for key, param in canonical_parameters(resumed.model).items():
        assert torch.equal(whole(param.detach()), before[key]), key
    lowered = {"bf16": True}  # accelerate would turn the trained parameters into float32
    for told, other in (
        ("FSDP1 flattens", {"version": 1}),
        ("l2=0.1", {"l2": 0.1}),
        ("in float32, .*bfloat16", lowered),
    ):
        with pytest.raises(ValueError, match=told):
            made("refused", **other)
    distributed.barrier()
    if ranks.rank == 0:
        Path(saved, "optimizer.pt").touch()
    distributed.barrier()
    with pytest.raises(ValueError, match="was written without fsdp"):
        resumed.train(resume_from_checkpoint=saved)


PACKED = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


def packed_parameters(ranks, name):
    """Other optimizers, each rank's over the entries that it holds."""
    for shard in (shard_rows, shard_columns):
        plain, sharded = net(), shard(net(), ranks.mesh())
        ticket = ticket_of(plain, without=["embed"])  # packed, an embedding adds up its rows in another order
        before = ls.frozen_digests(sharded, ticket)
        packs = [ls.PackedParameters(model, ticket) for model in (plain, sharded)]
        optimizers = [packed.attach(PACKED[name](packed.parameters())) for packed in packs]
        for seed in range(4):
            for model in (plain, sharded):
                loss = loss_of(model, seed)
                (loss if model is plain or ranks.rank == 0 else loss * 0).backward()
            with torch.no_grad():
                loss_of(sharded, seed)  # leaves the gathered parameters of the root in the model
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            loss_of(sharded, 0)
            for packed in packs:
                for values in packed.parameters():
                    values.mul_(1.5)
            losses = [loss_of(model, 0) for model in (plain, sharded)]
        assert torch.isclose(*losses, rtol=1e-5), "the forward pass has the changed values"
        for key, param in canonical_parameters(plain).items():
            assert torch.equal(whole(canonical_parameters(sharded)[key].detach()), param), key
        own = sum(packed.numel() for packed in packs[1].parameters())
        total = torch.tensor(own)
        distributed.all_reduce(total, group=ranks.group)
        assert int(total) == ticket.k > own
        ls.verify_frozen(before, sharded, ticket)


def stages(ranks, name):
    """Pipeline stages: each rank trains its own part of the model, by the part of the ticket that is its own."""
    plain = net(tied=False)
    ticket = ticket_of(plain)
    own = MaskedAdamW(plain, ticket, lr=0.01, **OPTIONS[name])
    stage = net(tied=False)
    kept = [["embed"], ["block"], ["small"], ["head"]][ranks.rank :: ranks.size]
    for child in ("embed", "block", "small", "head"):
        if [child] not in kept:
            delattr(stage, child)
    optimizer = MaskedAdamW(stage, ticket.restrict(lambda name: [name.split(".")[0]] in kept), lr=0.01)
    for seed in range(3):
        loss_of(plain, seed).backward()
        for name, param in stage.named_parameters():
            param.grad = plain.get_parameter(name).grad.clone()
        own.step()
        optimizer.step()
        own.zero_grad()
    for name, param in stage.named_parameters():
        assert torch.equal(param, plain.get_parameter(name))


CASES = {
    f"{case.__name__}-{name}": (case, name)
    for case, names in ((rows, OPTIONS), (optimizer_first, ("plain", "packed", "master-packed", "dense")),
        (accumulation, ("plain", "packed", "master")),
        (replicas, ("plain", "packed-clipped")), (columns, ("plain", "packed-clipped", "master")),
        (tensor_parallel, ("plain", "packed", "clipped", "master")),
        (tensor_parallel_and_rows, ("plain", "packed", "clipped")),
        (resharding, ("plain", "master-packed", "dense", "pull")), (own_parts, ("plain", "packed")),
        (engines, ("plain", "packed")), (scaled, ("plain", "packed")),
        (evaluated_first, ("plain", "packed")), (within_a_bound, ("plain", "packed")),
        (partial_gradients, ("plain", "packed")), (refused, ("plain",)), (stages, ("plain",)),
        (accelerated, ("plain", "packed")), (keyed, ("stochastic", "8bit", "both")),
        (packed_parameters, PACKED), (trainer, ("packed",)), (sparse_trainer, ("packed",)))
    for name in names
}  # fmt: skip


# What all processes do together.
GRIDS = (replicas, tensor_parallel_and_rows, resharding, accelerated, trainer, sparse_trainer)


def _rank(rank, folder, cases):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=WAIT
    )
    groups = {size: distributed.new_group(range(size), timeout=WAIT) for size in range(1, WORLD + 1)}
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


def run(once, name, cases):
    """[(case, ranks)] -> what each rank of them says, by case; "" is good."""
    folder = once(name, lambda folder: start(_rank, (folder, cases), WORLD))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


ALL = [(key, size) for key in CASES for size in range(2, WORLD + 1) if size == WORLD or CASES[key][0] not in GRIDS]
THIN = [
    *[("rows-pull", 2), ("columns-master", 2), ("rows-packed", 3), ("rows-dense", 3), ("optimizer_first-packed", 3)],
    *[("tensor_parallel-packed", 3), ("rows-master", 4), ("accumulation-packed", 4), ("replicas-packed-clipped", 4)],
    *[("tensor_parallel_and_rows-clipped", 4), ("resharding-master-packed", 4), ("accelerated-packed", 4)],
    *[
        ("own_parts-packed", 3),
        ("engines-packed", 2),
        ("scaled-packed", 3),
        ("within_a_bound-packed", 4),
        ("refused-plain", 2),
        *[("stages-plain", 2), ("partial_gradients-packed", 3), ("rows-stochastic", 3), ("keyed-both", 4)],
        ("packed_parameters-sgd", 3),
        ("trainer-packed", 4),
        ("sparse_trainer-packed", 4),
    ],
]


@pytest.fixture(scope="module")
def outcomes(once):
    return run(once, "sharded", THIN)


@pytest.fixture(scope="module")
def all_outcomes(once):
    return run(once, "sharded-all", ALL)


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


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    """torchrun starts all ranks again after one was killed, and only then; they go on from the last checkpoint."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir(), torn.mkdir()
    start(resumed_run.train, (2, whole), 2)
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, "--max-restarts=1", resumed_run.__file__, str(torn), "3"],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    straight, resumed = (torch.load(folder / "final.pt") for folder in (whole, torn))
    assert (straight["restarts"], resumed["restarts"], resumed["started at"]) == (0, 1, 2)
    for name, param in straight["model"].items():
        assert torch.equal(resumed["model"][name], param), name
