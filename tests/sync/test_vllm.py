"""Patches for vLLM: its fields and rules, by a stand-in of its loader, and by vLLM itself where it is installed."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from helpers.bits import assert_same, weights
from safetensors.torch import load_file, save_file
from torch import Size, nn

import ltp_sparse as ls
from ltp_sparse.sync import Follower, Publisher, SparseWeightPatch, vllm_patches, write_vllm_patches
from ltp_sparse.sync.version import Change, Version


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5)).bfloat16()


def load(model, patches):
    """What vLLM's loader does: NaN marks what stays, and all else is copied."""
    for patch in patches:
        parameter = model.get_parameter(patch.name)
        assert patch.indices.dtype == torch.int32 and patch.indices.dim() == patch.values.dim() == 1
        assert bool((patch.indices[1:] > patch.indices[:-1]).all())
        full = torch.full(patch.full_shape, float("nan"), dtype=patch.values.dtype)
        full.view(-1)[patch.indices.long()] = patch.values
        with torch.no_grad():
            parameter.copy_(torch.where(full.isnan(), parameter, full))


@torch.no_grad()
def train(model, ticket, step):
    torch.manual_seed(step)
    for name, parameter in model.named_parameters():
        parameter += 0.01 * torch.randn_like(parameter) * ticket.mask(name) * (torch.rand_like(parameter) < 0.5)


@pytest.mark.parametrize("side", ["publisher", "follower"])
def test_versions_lead_a_server_from_one_to_the_next(tmp_path, side):
    model, served = model_of(), model_of()
    ticket = ls.Ticket.random(model, density=0.3, seed=1)
    publisher, follower = Publisher(model, ticket, tmp_path), Follower(model_of(), tmp_path)
    for step in range(4):
        versions = {"publisher": publisher.publish(), "follower": follower.follow()}
        load(served, vllm_patches(versions[side]))
        assert_same(weights(served), weights(model))
        train(model, ticket, step)


def test_deltas_are_patches(tmp_path):
    model, tuned = model_of(), model_of()
    ticket = ls.Ticket.random(model, density=0.3, seed=1, pool="^0")
    train(tuned, ticket | ls.Ticket.full(model, pool="^1"), 1)
    head = {name: p for name, p in tuned.named_parameters() if name.startswith("1")}
    delta = ls.SparseDelta.between(model, tuned, ticket, dense=head)
    patches = list(vllm_patches(delta))
    assert [patch.name for patch in patches] == ["0.bias", "0.weight", "1.weight", "1.bias"]
    load(model, patches)
    assert_same(weights(model), weights(tuned))


class Given(Version):
    """A version with these changes."""

    def __new__(cls, *changes):
        return object.__new__(cls)

    def __init__(self, *changes):
        object.__setattr__(self, "given", changes)

    def changes(self):
        yield from self.given


def test_what_vllm_cannot_take_is_refused():
    good = Change("a", torch.tensor([0, 2]), torch.ones(2), Size([2**31]))
    (patch,) = vllm_patches(Given(good))
    assert patch.full_shape == (2**31,) and patch.indices.tolist() == [0, 2]
    with pytest.raises(ValueError, match="'b' has 2,147,483,649 entries.*Send this tensor whole"):
        list(vllm_patches(Given(good, good._replace(name="b", shape=Size([2**31 + 1])))))
    with pytest.raises(ValueError, match="'b' has a NaN"):
        list(vllm_patches(Given(good, good._replace(name="b", values=torch.tensor([1.0, float("nan")])))))


def test_files_are_written_by_vllm(tmp_path, monkeypatch):
    """A stand-in of the function that vLLM documents: a file per version, the changes from the version before."""
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.sparse_disk_engine", None)
    with pytest.raises(ImportError, match="needs a vLLM with the sparse_disk backend"):
        write_vllm_patches([], tmp_path, 1)

    def save_sparse_patches(patches, patch_dir, version):
        tensors = {f"{p.name}.{part}": getattr(p, part) for p in patches for part in ("indices", "values")}
        save_file(tensors, f"{patch_dir}/{version}.safetensors")

    engine = ModuleType("sparse_disk_engine")
    engine.save_sparse_patches = save_sparse_patches
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.sparse_disk_engine", engine)
    model, served = model_of(), model_of()
    ticket = ls.Ticket.random(model, density=0.3, seed=1)
    publisher = Publisher(model, ticket, tmp_path / "store")
    publisher.publish()
    for version in (1, 2):
        train(model, ticket, version)
        write_vllm_patches(publisher.publish(), tmp_path, version)
        found = load_file(tmp_path / f"{version}.safetensors")
        names = {name.removesuffix(".indices") for name in found if name.endswith(".indices")}
        shapes = {name: tuple(parameter.shape) for name, parameter in served.named_parameters()}
        load(served, [SparseWeightPatch(n, found[f"{n}.indices"], found[f"{n}.values"], shapes[n]) for n in names])
        assert_same(weights(served), weights(model))


def test_vllm_s_loader_gives_the_published_bits(tmp_path):
    loader = pytest.importorskip("vllm.model_executor.model_loader.checkpoint_weight_patch")

    class Served(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(model_of())

        def load_weights(self, weights):
            for name, tensor in weights:
                self.model.get_parameter(name).data.copy_(tensor)
            return {name for name, _ in weights}

    model, served = model_of(), Served()
    ticket = ls.Ticket.random(model, density=0.3, seed=1)
    publisher = Publisher(model, ticket, tmp_path)
    for step in range(3):
        patches = [
            loader.CheckpointWeightPatch(p.name, p.full_shape, p.values.dtype, p.values, p.indices)
            for p in vllm_patches(publisher.publish())
        ]
        loader.load_checkpoint_weight_patches(served, patches)
        assert_same(weights(served.model), weights(model))
        train(model, ticket, step)


def test_vllm_s_engine_takes_the_patches(tmp_path):
    engine = pytest.importorskip("vllm.distributed.weight_transfer.sparse_nccl_engine")
    model = model_of()
    fields = set(engine.SparseWeightPatch.__dataclass_fields__)
    assert fields == set(SparseWeightPatch.__dataclass_fields__)
    for patch in vllm_patches(Publisher(model, None, tmp_path).publish()):
        engine.SparseNCCLTrainerWeightTransferEngine._validate_patch(patch)
