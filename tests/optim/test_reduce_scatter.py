"""Compressed reduce-scatters give the sums of whole ones, for the bytes of the active entries.

All cases run in one group of four processes, on its first 2, 3 and 4 ranks; a test reads what they say of its case.
"""

import json
import traceback
from datetime import timedelta

import pytest
import torch
from helpers.ranks import leave_group, start
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ltp_sparse as ls

WORLD = 4
SIZES = (2, 3, 4)


class Model(nn.Module):
    """Rows that no number of ranks divides, a parameter of several tiles, one of fewer rows than ranks, a head.

    What each rank gets of a group is an even number of entries: gloo sums odd ones in another order at their ends.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(700, 301), nn.Linear(301, 24, bias=False)])
        self.scale = nn.Parameter(torch.ones(1, 24))
        self.spare = nn.Linear(24, 24)  # active, and used on demand
        self.head = nn.Linear(24, 5)

    def forward(self, x, spare=False):
        for layer in self.body:
            x = torch.tanh(layer(x))
        x = x * self.scale
        return self.head(self.spare(x) if spare else x)


def pool(name):
    return "head" not in name


def ticket(density=0.05):
    whole = ls.Ticket.random(Model(), density=density, pool=pool)
    full = ls.Ticket.from_masks({"scale": torch.ones(1, 24, dtype=torch.bool)})
    return whole | full


def sharded(ranks, **options):
    torch.manual_seed(0)
    model = Model()
    model.get_submodule("body.0").bias.requires_grad_(False)
    for layer in (*model.body, model):
        fully_shard(layer, mesh=ranks.mesh, **options)
    return model


def gradients(ranks, model, seed=0, **inputs):
    """Runs a backward pass on this rank's batch. Returns the whole of every gradient."""
    batch = torch.randn(6, 700, generator=torch.Generator().manual_seed(10 * seed + ranks.rank))
    model(batch, **inputs).square().sum().backward()
    return whole_gradients(model)


def whole_gradients(model):
    named = ls.canonical_parameters(model)
    return {name: p.grad.full_tensor() for name, p in named.items() if p.grad is not None}


def check(ranks, found, expected, active=None):
    """Active entries are the sums of whole gradients, the others zero; gradients outside the ticket are whole."""
    active = ticket() if active is None else active
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        wanted = expected[name]
        if name in active.active_names:
            wanted = torch.where(active.mask(name), wanted, torch.zeros(()))
        assert gradient.dtype == wanted.dtype
        assert torch.equal(gradient, wanted), name
        assert float(gradient.abs().max()) > 0


def both(ranks, run, active=None, **options):
    """What `run` gives for whole gradients and for compressed ones."""
    expected = run(sharded(ranks, **options))
    model = sharded(ranks, **options)
    compressed = ls.compress_gradients(model, ticket() if active is None else active)
    found = run(model)
    for one, other in zip(found, expected, strict=True):
        check(ranks, one, other, active)
    return compressed


def plain(ranks):
    compressed = both(ranks, lambda model: [gradients(ranks, model, seed, spare=True) for seed in (0, 1)])
    found = compressed.report()
    assert found.whole == {} and found.calls == 6
    # by hand: two groups of one weight each, and scale, spare and head; to the rank with the most of it
    model, active, sent = Model(), ticket(), 0
    named = dict(model.named_parameters())
    together = ["scale", "spare.weight", "spare.bias", "head.weight", "head.bias"]
    for group in (["body.0.weight"], ["body.1.weight"], together):
        counts = [0] * ranks.size
        for name in group:
            rows, row = named[name].shape[0], named[name][0].numel()
            for rank, part in enumerate(torch.arange(rows).chunk(ranks.size)):
                ranges = (int(part[0]), int(part[-1]) + 1)
                counts[rank] += active.rows(name, *ranges).k if pool(name) else len(part) * row
        sent += 4 * ranks.size * (max(counts) + -max(counts) % 16)
    assert found.sent == 2 * sent
    assert found.sent < 0.08 * found.dense
    assert f"{found.sent:,} of {found.dense:,} bytes" in repr(compressed)
    assert compressed.nbytes > 0


def bitmaps(ranks):
    active = ls.Ticket.random(Model(), density=0.4, pool=pool)
    both(ranks, lambda model: [gradients(ranks, model, spare=True)], active)


def without_resharding(ranks):
    both(ranks, lambda model: [gradients(ranks, model, spare=True)], reshard_after_forward=False)


def float32_sums_of_bfloat16(ranks):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    compressed = both(ranks, lambda model: [gradients(ranks, model, spare=True)], mp_policy=policy)
    assert compressed.report().whole == {}


def bfloat16_sums(ranks):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    compressed = both(ranks, lambda model: [gradients(ranks, model, spare=True)], mp_policy=policy)
    assert compressed.report().sent < 0.08 * compressed.report().dense


def accumulation(ranks):
    def without_sync(model):
        model.set_requires_gradient_sync(False)
        gradients(ranks, model, 0, spare=True)
        gradients(ranks, model, 1, spare=True)
        model.set_requires_gradient_sync(True)
        first = gradients(ranks, model, 2, spare=True)
        return [first, gradients(ranks, model, 3, spare=True)]  # onto what is there

    assert both(ranks, without_sync).report().calls == 6


def unused_parameters(ranks):
    """A group of which a parameter has no gradient sends all; in the next pass it is compressed again."""
    expected = gradients(ranks, sharded(ranks))
    model = sharded(ranks)
    compressed = ls.compress_gradients(model, ticket())
    found = gradients(ranks, model)
    assert torch.equal(found["scale"], expected["scale"]) and torch.equal(found["head.bias"], expected["head.bias"])
    in_groups = {name: expected[name] for name in ("body.0.weight", "body.1.weight")}
    check(ranks, {name: found[name] for name in in_groups}, in_groups)
    assert compressed.report().whole == {"a parameter had no gradient": 1}
    assert "; 1 whole: a parameter had no gradient" in repr(compressed)
    gradients(ranks, model, spare=True)
    assert compressed.report().whole == {"a parameter had no gradient": 1}


def frozen_later(ranks):
    def run(model):
        first = gradients(ranks, model, spare=True)
        model.head.weight.requires_grad_(False)
        model.head.weight.grad = None
        return [first, gradients(ranks, model, spare=True)]

    assert both(ranks, run).report().whole == {}


def undone(ranks):
    model = sharded(ranks)
    expected = gradients(ranks, model, spare=True)
    compressed = ls.compress_gradients(model, ticket())
    with pytest.raises(ValueError, match="compressed already"):
        ls.compress_gradients(model, ticket())
    compressed.remove()
    model.zero_grad()
    found = gradients(ranks, model, spare=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert compressed.report().calls == 0
    again = ls.compress_gradients(model, ticket())
    compressed.remove()  # of what is no longer there: nothing
    model.zero_grad()
    check(ranks, gradients(ranks, model, spare=True), expected)
    assert again.report().calls == 3


def nothing_to_save(ranks):
    model = sharded(ranks)
    full = ls.compress_gradients(model, ls.Ticket.full(Model(), pool))
    gradients(ranks, model, spare=True)
    found = full.report()
    assert found.sent == found.dense and set(found.whole) == {"nothing to save"}


def wrong_calls(ranks):
    with pytest.raises(ValueError, match="call fully_shard on it first"):
        ls.compress_gradients(Model(), ticket())
    with pytest.raises(TypeError, match="expected a Ticket"):
        ls.compress_gradients(sharded(ranks), "ticket.safetensors")
    other = ls.Ticket.full({"head.weight": [7, 24]})
    with pytest.raises(ValueError, match=r"shape \[5, 24\] in the model"):
        ls.compress_gradients(sharded(ranks), other)


CASES = {
    case.__name__: case
    for case in (
        plain, bitmaps, without_resharding, float32_sums_of_bfloat16, bfloat16_sums, accumulation, unused_parameters,
        frozen_later, undone, nothing_to_save, wrong_calls,
    )
}  # fmt: skip


ON_MORE = (plain, bitmaps, bfloat16_sums, accumulation)


class Ranks:
    def __init__(self, mesh, rank, size):
        self.mesh, self.rank, self.size = mesh, rank, size


def _rank(rank, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=limit
    )
    groups = {size: distributed.new_group(range(size), timeout=limit) for size in SIZES}
    outcome = {}
    for size, group in groups.items():
        if rank >= size:
            continue
        mesh = DeviceMesh.from_group(group, "cpu", mesh=list(range(size)))
        for name, case in CASES.items():
            if size > 2 and case not in ON_MORE:
                continue
            try:
                case(Ranks(mesh, rank, size))
            except Exception:
                outcome[f"{name}-{size}"] = traceback.format_exc()
                break  # the other ranks may wait for this one
            outcome[f"{name}-{size}"] = ""
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    leave_group()


@pytest.fixture(scope="module")
def outcomes(once):
    folder = once("reduce_scatter", lambda folder: start(_rank, (folder,), WORLD))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "size"), [(name, size) for size in SIZES for name, case in CASES.items() if size == 2 or case in ON_MORE]
)
def test_on_ranks(case, size, outcomes):
    for rank in range(size):
        failure = outcomes[rank].get(f"{case}-{size}", "not run, since an earlier case failed")
        assert not failure, f"rank {rank} of {size}: {failure}"


def test_a_model_that_is_not_sharded_is_refused():
    with pytest.raises(ValueError, match="call fully_shard on it first"):
        ls.compress_gradients(Model(), ticket())
