"""Versions of FSDP2 models: each process publishes its rows, one marker commits; followers are plain.

All cases run in one group of three processes.
"""

import copy
from datetime import timedelta

import pytest
import torch
from helpers.bits import assert_same, weights
from helpers.ranks import leave_group, start
from torch import distributed, nn

import ltp_sparse as ls
from ltp_sparse.sync import FolderStore, Follower, Publisher

WORLD = 3


class Model(nn.Module):
    """Rows that three processes share unevenly, or of which one has none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(101, 12, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(nn.Linear(12, rows, dtype=torch.bfloat16) for rows in (7, 2, 1))
        self.norm = nn.LayerNorm(12, dtype=torch.bfloat16)


def made():
    torch.manual_seed(5)
    return Model()


def tickets(model):
    pool = r"embed|layers\.(0|2)|norm\.weight"
    return {"ticket": ls.Ticket.random(model, density=0.3, seed=2, pool=pool), "diff": None}


def sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    model = made()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@torch.no_grad()
def train(model, ticket, step):
    """The same change of the whole weights on every process, of which each takes its own."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(step)
    for name, parameter in ls.canonical_parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(parameter.dtype)
        moves = torch.rand(parameter.shape, generator=generator) < 0.3
        if ticket is not None:
            moves &= ticket.mask(name) if name in ticket.sets else torch.zeros_like(moves)
        noise *= moves
        if hasattr(parameter, "device_mesh"):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter.add_(noise)


def follows(store, served, model, rank):
    """Only here, to compare, is anything gathered."""
    whole = {name: p.full_tensor().detach() for name, p in ls.canonical_parameters(model).items()}
    if rank == 0:
        assert Follower(copy.deepcopy(served), store).follow() is not None
        assert_same(weights(served), whole)


def versions(rank, mesh, folder, kind):
    ticket, store = tickets(made())[kind], f"{folder}/{kind}"
    model, served = sharded(mesh), made()
    follower = Follower(served, store)
    publisher = Publisher(model, ticket, store, anchor_every=3, keep=1)
    for step in range(5):
        published = publisher.publish()
        assert (published.number, published.base) == (step, step - 1 if step else None)
        follower.follow()
        follows(store, served, model, rank)
        train(model, ticket, step)
    names = FolderStore(store).names()
    assert {name.rsplit("-", 1)[-1] for name in names if "changes" in name} == {
        f"{r}.safetensors" for r in range(WORLD)
    }
    whole = {name: p.full_tensor() for name, p in ls.canonical_parameters(model).items()}
    for change in publisher.publish().changes():
        assert torch.equal(whole[change.name].view(-1)[change.indices], change.values)
    distributed.barrier()

    # an error on one process is one on all, and nothing is published
    write = FolderStore.write

    def full(self, name, content):
        raise OSError(28, "full")

    if rank == 1:
        FolderStore.write = full
    with pytest.raises((OSError, ValueError), match="full"):
        publisher.publish()
    FolderStore.write = write
    distributed.barrier()
    assert follower.follow().number == 5 and publisher.version == 5
    assert publisher.publish().number == 6
    distributed.barrier()

    with pytest.raises(ValueError, match="expected one number for all"):
        publisher.publish(7 + rank)
    with pytest.raises(ValueError, match=r"process 0 does not see v000000000000-anchor-1.safetensors of another"):
        Publisher(model, ticket, f"{folder}/{kind}-of-{rank}").publish()
    distributed.barrier()

    # one process goes on where three have ended
    if rank == 0:
        plain = copy.deepcopy(served)
        follower.follow()
        train(plain, ticket, 5)
        alone = Publisher(plain, ticket, store)
        assert alone.publish().base is None and follower.follow().number == 7
        train(plain, ticket, 6)
        alone.publish(), follower.follow()
        assert_same(weights(served), weights(plain))


def placements(rank, mesh, folder):
    """Replicas are published once; columns are refused."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = {"a": torch.arange(60.0).view(10, 6), "b": torch.arange(8.0), "c": torch.tensor(2.0)}
    places = {"a": Shard(0), "b": Replicate(), "c": Replicate()}
    tensors = {name: distribute_tensor(t.clone(), mesh, [places[name]]) for name, t in whole.items()}
    publisher = Publisher(tensors, None, f"{folder}/places")
    publisher.publish()
    for tensor in tensors.values():
        tensor.to_local().mul_(2)
    publisher.publish()
    if rank == 0:
        followed = {name: t.clone() for name, t in whole.items()}
        Follower(followed, f"{folder}/places").follow()
        assert all(torch.equal(followed[name], 2 * t) for name, t in whole.items())
    columns = {"a": distribute_tensor(whole["a"], mesh, [Shard(1)])}
    with pytest.raises(ValueError, match=r"'a' is placed as .*expected shards of rows"):
        Publisher(columns, None, f"{folder}/columns")
    with pytest.raises(ValueError, match="is sharded; expected a model, or a mapping"):
        Follower(tensors, f"{folder}/places")


def process(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/group", WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    versions(rank, mesh, folder, "ticket")
    versions(rank, mesh, folder, "diff")
    placements(rank, mesh, folder)
    leave_group()


@pytest.mark.slow
def test_sharded_models_are_published_without_gathering(tmp_path):
    start(process, (str(tmp_path),), WORLD)
