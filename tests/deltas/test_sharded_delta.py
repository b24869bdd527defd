"""Deltas of sharded models: the bits of one process, on 4 ranks. All cases run in one group of processes."""

import json
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
from helpers.ranks import leave_group, start
from helpers.sharded_model import loss_of, net, shard_columns, shard_rows, shard_tensors, whole
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import ltp_sparse as ls
from ltp_sparse.deltas.delta import applied_deltas
from ltp_sparse.weights.digests import fingerprint
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.sharded_digests import whole_fingerprint
from ltp_sparse.weights.sharding import local

WORLD = 4


def mesh():
    return init_device_mesh("cpu", (WORLD,))


def by_rows(model):
    return shard_rows(model, mesh())


def by_columns(model):
    return shard_columns(model, mesh())


def by_tensors(model):
    return shard_tensors(model, mesh())


def grid():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def with_copies(model):
    """HSDP."""
    return shard_rows(model, grid())


def by_tensors_and_rows(model):
    return shard_rows(shard_tensors(model, grid()["inner"]), grid()["outer"])


def models(shard, *seeds, dtype=torch.float32):
    """(whole, sharded) of each seed; 96 in the middle divides evenly."""
    return [(net(dtype, seed=seed, middle=96), shard(net(dtype, seed=seed, middle=96))) for seed in seeds]


def same_weights(one, other):
    found, expected = canonical_parameters(one), canonical_parameters(other)
    assert list(found) == list(expected)
    for name, param in expected.items():
        assert torch.equal(whole(found[name].detach()), whole(param.detach())), name


def same_delta(one, other):
    assert one.ticket == other.ticket and one.ticket.fingerprint == other.ticket.fingerprint
    for a, b in ((one.values, other.values), (one.originals, other.originals), (one.dense, other.dense)):
        assert a.keys() == b.keys() and all(
            torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
        )


def between_apply_revert(shard, folder):
    for dtype in (torch.float32, torch.bfloat16):
        (base, base_cut), (tuned, tuned_cut) = models(shard, 0, 1, dtype=dtype)
        ticket = ls.Ticket.random(base, density=0.1, seed=2, pool=lambda name: "small" not in name)
        head = {"small.weight": tuned.small.weight}
        expected = ls.SparseDelta.between(base, tuned, ticket, dense=head)
        dense = {"small.weight": tuned_cut.small.weight}
        delta = ls.SparseDelta.between(base_cut, tuned_cut, ticket, dense=dense)
        same_delta(delta, expected)
        # the tied weights as two equal tensors
        twins = {name: param.detach().clone() for name, param in base.named_parameters(remove_duplicate=False)}
        save_file(twins, folder / f"base-{distributed.get_rank()}.safetensors")
        for whole_base in (base, twins, folder / f"base-{distributed.get_rank()}.safetensors"):
            same_delta(ls.SparseDelta.between(whole_base, tuned_cut, ticket, dense=head), expected)
        with torch.no_grad():
            loss_of(base_cut, 0)  # leaves the gathered parameters of the root in the model
        delta.apply(base_cut)
        expected.apply(base)
        same_weights(base_cut, base)
        with torch.no_grad():
            assert torch.isclose(loss_of(base_cut, 0), loss_of(base, 0), rtol=1e-3), "the forward pass sees it"
        delta.revert(base_cut)
        same_weights(base_cut, models(lambda model: model, 0, dtype=dtype)[0][0])


def composed(shard, folder):
    (base, base_cut), (one, one_cut), (two, two_cut) = models(shard, 0, 1, 2)
    ticket, other = (ls.Ticket.random(base, density=0.1, seed=seed) for seed in (1, 2))
    first, second = ls.SparseDelta.between(base, one, ticket), ls.SparseDelta.between(base, two, other)
    bare = ls.SparseDelta.between(base_cut, two_cut, other, originals=False)
    for model in (base, base_cut):
        first.apply(model)
        with pytest.raises(ValueError, match="overlaps another one in"):
            bare.apply(model)
        second.apply(model)
    same_weights(base_cut, base)
    with pytest.raises(ValueError, match="was applied later and overlaps"):
        first.revert(base_cut)
    for model in (base, base_cut):
        second.revert(model)
        # from the weights with `first` on
        later = ls.SparseDelta.between(model, one if model is base else one_cut, other)
        assert later.ticket.fingerprint == ls.SparseDelta.between(base, one, other).ticket.fingerprint
    latest = [later.advance(model) for model in (base, base_cut)]
    same_delta(*latest)
    same_weights(base_cut, base)
    with pytest.raises(ValueError, match="other values after the first delta than the later one was made from"):
        first.advance(base_cut)
    latest[1].revert(base_cut)
    same_weights(base_cut, models(lambda model: model, 0)[0][0])
    assert applied_deltas(base_cut) == []


def casts(shard, folder):
    (base, _), (tuned, _) = models(shard, 0, 1)
    (low, low_cut), *_ = models(shard, 0, dtype=torch.bfloat16)
    delta = ls.SparseDelta.between(base, tuned, ls.Ticket.random(base, density=0.1))
    for model in (low, low_cut):
        with pytest.raises(ValueError, match='pass dtype="cast"'):
            delta.apply(model)
        delta.apply(model, dtype="cast")
    same_weights(low_cut, low)
    delta.revert(low_cut)
    with torch.no_grad():
        local(low_cut.embed.weight).add_(distributed.get_rank() == 0)
    with pytest.raises(ValueError, match="is not the tensor this delta was made from"):
        delta.apply(low_cut, dtype="cast")


def digests(shard, folder):
    """Tiles that ranks share, ranks without rows, copies; digests of earlier versions."""
    torch.manual_seed(0)
    shapes = {"many": (3 * 8192, 17), "shared": (70_000, 3), "few": (2, 5), "tiles": (3, 1 << 17), "vector": (200_001,)}
    plain = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
    cut = nn.ParameterDict({name: nn.Parameter(param.detach().clone()) for name, param in plain.items()})
    torch.distributed.fsdp.fully_shard(cut, mesh=mesh())
    tensors = {name: param.detach() for name, param in cut.items()}
    expected = fingerprint(plain)
    assert whole_fingerprint(tensors) == expected
    old = dict.fromkeys(expected, "0" * 32)
    assert whole_fingerprint(tensors, like=old) == fingerprint(plain, like=old)
    with torch.no_grad():
        if distributed.get_rank() == WORLD - 1:
            local(cut["shared"])[-1, -1] += 1
    changed = whole_fingerprint(tensors)
    assert [name for name in expected if changed[name] != expected[name]] == ["shared"]


def refused(shard, folder):
    """One rank's change is seen by all, and nothing is written then."""
    (base, base_cut), (tuned, _) = models(shard, 0, 1)
    ticket = ls.Ticket.random(base, density=0.1)
    delta = ls.SparseDelta.between(base, tuned, ticket)
    with torch.no_grad():
        local(base_cut.embed.weight).add_(distributed.get_rank() == 1)
    before = {name: local(p).detach().clone() for name, p in base_cut.named_parameters()}
    with pytest.raises(ValueError, match=r"'embed.weight' is not the tensor this delta was made from"):
        delta.apply(base_cut)
    assert all(torch.equal(local(p), before[name]) for name, p in base_cut.named_parameters())
    with pytest.raises(ValueError, match="sharded models are not supported"):
        ls.TicketSwitcher(base_cut, {"it": delta})
    part = ls.select_sharded(base_cut, by_rows(net(seed=1, middle=96)), density=0.1)
    with pytest.raises(TypeError, match=r"got a TicketShard; pass its gather\(\)"):
        ls.SparseDelta.between(base_cut, base_cut, part)
    with pytest.raises(ValueError, match="sharded in two ways"):
        ls.SparseDelta.between(base_cut, by_columns(net(middle=96)), ticket)


def flipped(shard, folder):
    (_, base_cut), (_, tuned_cut) = models(shard, 0, 0)
    ticket = ls.Ticket.random(net(middle=96), density=0.1, pool="block")
    with torch.no_grad():
        for model, zero in ((base_cut, 0.0), (tuned_cut, -0.0)):
            local(model.block.up.weight)[-1].fill_(zero if distributed.get_rank() == 1 else 1.0)
    outside = 64 - int(ticket.mask("block.up.weight")[2 * 24 - 1].sum())
    with pytest.warns(UserWarning, match=f"{outside} zeros outside the ticket"):
        ls.SparseDelta.between(base_cut, tuned_cut, ticket)


CASES = {
    f"{case.__name__} {shard.__name__}": (case, shard)
    for case, shards in (
        (between_apply_revert, (by_rows, by_columns, by_tensors, with_copies, by_tensors_and_rows)),
        (composed, (by_rows, by_columns)),
        (casts, (by_rows,)), (digests, (by_rows,)), (refused, (by_rows,)), (flipped, (by_rows,)))
    for shard in shards
}  # fmt: skip


def _rank(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(minutes=2)
    )
    outcome = {}
    for key, (case, shard) in CASES.items():
        try:
            case(shard, folder)
        except Exception:
            outcome[key] = traceback.format_exc()
            break  # the other ranks may wait for this one
        outcome[key] = ""
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    leave_group()


@pytest.fixture(scope="module")
def outcomes(once):
    folder = once("sharded-delta", lambda folder: start(_rank, (folder,), WORLD))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_on_ranks(outcomes, key):
    said = [outcome.get(key) for outcome in outcomes]
    assert said == [""] * WORLD, "\n".join(filter(None, said)) or "it was not reached"
