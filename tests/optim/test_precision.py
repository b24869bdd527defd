"""bfloat16 and float16 parameters, float32 masters, stochastic rounding and 8-bit moments: what they promise."""

import copy
import warnings

import pytest
import torch
from helpers.backends import BACKENDS, using
from helpers.bits import same_bits
from helpers.tied_model import TiedModel
from torch import nn

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket
from ltp_sparse.backends.quantization import dequantize, dequantize_tiles, quantize, quantize_tiles
from ltp_sparse.backends.reference import Coefficient
from ltp_sparse.backends.rounding import moment_bits, random16, round_stochastically, rounding_keys
from ltp_sparse.ops import adamw_coefficients
from ltp_sparse.optim.launch import Precision
from ltp_sparse.optim.masked_adamw import StalledUpdates
from ltp_sparse.testing import random_weights, update_problem, xlmr_shapes
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.tile_table import STATE_BLOCK, TileTable, state_blocks

HALF = {"bf16": torch.bfloat16, "f16": torch.float16}


def coefficients(problem, step, lr=1e-3):
    return adamw_coefficients(torch.full((len(problem.params),), step), lr=lr)


# --- rounding ---


def test_keys_and_bits_do_not_repeat():
    keys = [rounding_keys(seed, torch.tensor([step] * 3), torch.arange(3)) for seed in (0, 1, 2**40) for step in (1, 2)]
    assert len(torch.cat(keys).unique()) == 18
    key = keys[0][0]
    low = torch.arange(TILE)
    drawn = random16(key, low)
    assert 0 <= int(drawn.min()) and int(drawn.max()) < TILE
    assert drawn.double().mean().item() == pytest.approx((TILE - 1) / 2, rel=0.01)
    for other in (random16(keys[0][1], low), random16(key, low + 2**32), random16(key, low + TILE)):
        correlation = torch.corrcoef(torch.stack([drawn, other]).double())[0, 1]
        assert abs(correlation) < 5 / TILE**0.5


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, 1e-40, 1.0])
def test_stochastic_rounding_has_the_exact_mean(value):
    values = torch.full((200_000,), value)
    rounded = round_stochastically(values, random16(torch.tensor(7.0), torch.arange(len(values)))).double()
    exact = values[0].double()
    assert len(rounded.unique()) == (1 if value == 1.0 else 2)
    spread = rounded.max() - rounded.min()
    assert abs(rounded.mean() - exact) <= 5 * spread / 2 / len(values) ** 0.5


def test_what_is_not_finite_is_rounded_to_nearest():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38])
    rounded = round_stochastically(values, torch.tensor([TILE - 1] * 4))
    assert rounded.tolist()[:2] == values.tolist()[:2] and bool(rounded[2].isnan()) and bool(rounded[3].isinf())


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_bits_depend_on_the_entry_alone(backend):
    """Contract 6: not on which other entries are active, hence neither on encoding nor on tiling."""
    shapes = {"a": (3, TILE // 2 + 5), "b": (1000,)}
    few, many = (update_problem(shapes, density=d, dtype=torch.bfloat16, stochastic=True) for d in (0.03, 0.9))
    everything = update_problem(shapes, density=1, dtype=torch.bfloat16, stochastic=True)
    with using(backend):
        for problem in (few, many, everything):
            problem.step(coefficients(problem, 1))
    for problem in (few, many):
        for name, ours, all_of_it in zip(problem.ticket.names, problem.params, everything.params, strict=True):
            mask = problem.ticket.mask(name)
            assert same_bits(ours[mask], all_of_it[mask])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_updates_are_lost_by_rounding_to_nearest_only(backend):
    """Updates of a hundredth of the last place of bfloat16: the mean follows them, or the master does."""
    moved = {}
    for mode in ("nearest", "stochastic", "master"):
        problem = update_problem({"a": (50_000,)}, density=0.5, dtype=torch.bfloat16, master=mode == "master")
        problem.stochastic = mode == "stochastic"
        mask = problem.ticket.mask("a")
        problem.params[0].fill_(1.0)
        problem.grads[0].fill_(1.0)
        if problem.master is not None:
            problem.master.fill_(1.0)
        with using(backend):
            for step in range(1, 101):
                rows = coefficients(problem, step, lr=2**-14)
                rows[:, Coefficient.DECAY_STEP] = 0
                problem.step(rows)
        moved[mode] = 1 - problem.params[0][mask].double().mean().item()
    assert moved["nearest"] == 0
    expected = 100 * 2**-14
    assert moved["stochastic"] == pytest.approx(expected, rel=0.05)
    assert moved["master"] == pytest.approx(expected, abs=2**-9)  # half a place below 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_a_master_is_a_float32_run(dtype, backend):
    """The exact values take the steps of float32 parameters, bit for bit; the weights are their rounding."""
    problem = update_problem({"a": (300, 70), "b": (4097,)}, density=0.3, dtype=dtype, master=True)
    exact = update_problem({"a": (300, 70), "b": (4097,)}, density=0.3)
    exact.params[:] = [param.float() for param in problem.params]
    exact.grads[:] = [grad.float() for grad in problem.grads]
    before = [param.clone() for param in problem.params]
    with using(backend):
        for step in range(1, 6):
            problem.step(coefficients(problem, step))
            exact.step(coefficients(exact, step))
    wanted = [p[problem.ticket.mask(name)] for name, p in zip(problem.ticket.names, exact.params, strict=True)]
    assert same_bits(problem.master, torch.cat(wanted))
    for name, param, old, values in zip(problem.ticket.names, problem.params, before, wanted, strict=True):
        mask = problem.ticket.mask(name)
        assert same_bits(param[mask], values.to(dtype)) and same_bits(param[~mask], old[~mask])


# --- 8-bit moments ---


def test_codes_keep_the_values():
    """To half the distance of two codes, near 4 / L of a value that is not far below its block; zero is zero."""
    g = torch.Generator().manual_seed(0)
    m = torch.randn(3 * STATE_BLOCK + 17, generator=g) * torch.logspace(-9, 3, 3 * STATE_BLOCK + 17)
    v = (torch.randn(m.shape, generator=g) * 1e-4).square()
    m[5], v[5] = 0.0, 0.0
    codes = quantize(m, v)
    assert [c.dtype for c in codes] == [torch.int8, torch.uint8, torch.float32]
    assert codes[2].shape == (state_blocks(len(m)), 2) == (4, 2)
    first, second = dequantize(*codes)
    assert first[5] == second[5] == 0 and bool((second[v > 0] > 0).all())
    for block in range(4):
        part = slice(block * STATE_BLOCK, (block + 1) * STATE_BLOCK)
        for value, exact, levels in (
            (first[part].abs(), m[part].abs(), 127), (second[part].sqrt(), v[part].sqrt(), 255),
        ):  # fmt: skip
            largest = exact.max()
            assert value[exact.argmax()] == pytest.approx(largest.item(), rel=1e-6)
            half_a_code = 2 / levels * ((exact / largest) ** 0.25 + 1 / levels) ** 3 * largest
            assert bool(((value - exact).abs() <= half_a_code).all())
    assert torch.equal(first.sign()[first != 0], m.sign()[first != 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_moment_spoils_its_block_alone(bad):
    m, v = torch.ones(3 * STATE_BLOCK), torch.ones(3 * STATE_BLOCK)
    m[STATE_BLOCK + 3] = v[STATE_BLOCK + 3] = bad
    for decoded in dequantize(*quantize(m, v)):
        assert decoded.isnan().view(3, -1).any(1).tolist() == [False, True, False]


def test_tiles_are_coded_one_by_one():
    active = [300, 1, 256, 40]
    m, v = torch.randn(sum(active)), torch.rand(sum(active))
    codes = quantize_tiles(m, v, active)
    assert len(codes[2]) == sum(map(state_blocks, active)) == 5
    for whole, parts in zip(
        dequantize_tiles(*codes, active),
        zip(*(dequantize(*quantize(a, b)) for a, b in zip(m.split(active), v.split(active), strict=True)), strict=True),
        strict=True,
    ):
        assert same_bits(whole, torch.cat(parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coded_moments_are_those_of_the_formula(backend):
    """One step of float32 moments on what the codes say, coded again: the state of the 8-bit step."""
    shapes = {"a": (2 * TILE + 77,), "b": (40, 9), "c": (513,)}
    problem = update_problem(shapes, density=0.2, states="8bit")
    exact = update_problem(shapes, density=0.2)
    active = problem.table.tiles[:, 3].tolist()
    with using(backend):
        for step in range(1, 5):
            exact.exp_avg, exact.exp_avg_sq = dequantize_tiles(
                problem.exp_avg, problem.exp_avg_sq, problem.scales, active
            )
            problem.step(coefficients(problem, step))
            exact.step(coefficients(exact, step))
            assert all(map(same_bits, problem.params, exact.params))
            keys = coefficients(problem, step)[:, Coefficient.ROUNDING_KEY]
            index_sets = problem.ticket.sets.values()
            random = torch.cat([moment_bits(key, s.indices().long()) for key, s in zip(keys, index_sets, strict=True)])
            moments_and_bits = (t.split(active) for t in (exact.exp_avg, exact.exp_avg_sq, random))
            codes = zip(*(quantize(*of_tile) for of_tile in zip(*moments_and_bits, strict=True)), strict=True)
            state = problem.exp_avg, problem.exp_avg_sq, problem.scales
            assert all(torch.equal(torch.cat(parts), own) for parts, own in zip(codes, state, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_leaves_codes_scales_and_masters(backend):
    problem = update_problem({"a": (900,)}, density=0.5, dtype=torch.bfloat16, states="8bit", master=True)
    with using(backend):
        problem.step(coefficients(problem, 1))
        before = [t.clone() for t in problem.tensors()]
        rows = coefficients(problem, 2)
        rows[:, Coefficient.APPLY] = 0
        problem.step(rows)
    assert all(torch.equal(a, b) for a, b in zip(problem.tensors(), before, strict=True))


# --- MaskedAdamW ---


def train(model, ticket, steps=60, *, data=0, **options):
    """Losses of a small language model that learns to copy."""
    optimizer = MaskedAdamW(model, ticket, lr=3e-3, weight_decay=0.0, **options)
    losses = []
    for step in range(steps):
        tokens = torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(data + step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


MODES = {
    "8bit": (torch.float32, {"states": "8bit"}),
    "bf16-master": (torch.bfloat16, {}),
    "bf16-stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bf16-8bit-stochastic": (torch.bfloat16, {"rounding": "stochastic", "states": "8bit"}),
    "f16-master": (torch.float16, {}),
    "f16-8bit-master": (torch.float16, {"states": "8bit"}),
}


@pytest.mark.parametrize(("dtype", "options"), MODES.values(), ids=MODES)
def test_trains_like_float32(dtype, options):
    torch.manual_seed(0)
    model = TiedModel()
    ticket = Ticket.random(model, density=0.5, seed=1)
    low = copy.deepcopy(model).to(dtype)
    exact, _ = train(model, ticket)
    losses, optimizer = train(low, ticket, **options)
    assert exact[-1] < 0.7 * exact[0]
    assert sum(losses[-5:]) / 5 == pytest.approx(sum(exact[-5:]) / 5, rel=0.05)
    assert all(param.dtype == dtype for param in low.parameters())
    assert repr(optimizer)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize(("dtype", "options"), MODES.values(), ids=MODES)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(dtype, options, weights_first):
    torch.manual_seed(0)
    model = TiedModel().to(dtype)
    ticket = Ticket.random(model, density=0.5, seed=1)
    twin = copy.deepcopy(model)
    _, optimizer = train(model, ticket, 5, **options)
    resumed = MaskedAdamW(twin, ticket, lr=3e-3, weight_decay=0.0, **options)
    loads = [(twin, model), (resumed, optimizer)]
    for target, source in loads if weights_first else reversed(loads):
        target.load_state_dict(source.state_dict())
    for side, own in ((model, optimizer), (twin, resumed)):
        for step in range(4):
            tokens = torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(50 + step))
            own.zero_grad()
            nn.functional.cross_entropy(side(tokens).float().flatten(0, 1), tokens.flatten()).backward()
            own.step()
    assert all(map(same_bits, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("target", [{}, {"states": "8bit"}], ids=["float32", "8bit"])
@pytest.mark.parametrize("source", [{}, {"states": "8bit"}], ids=["from-float32", "from-8bit"])
def test_states_move_between_precisions(source, target):
    model = TiedModel()
    ticket = Ticket.random(model, density=0.5, seed=1)
    _, optimizer = train(model, ticket, 3, **source)
    other = MaskedAdamW(model, ticket, **target)
    other.load_state_dict(optimizer.state_dict())
    for param in optimizer.state:
        old, new = optimizer.state[param], other.state[param]
        assert old["step"] == new["step"] == 3
        active = ticket.sets[name_of(model, param)].tile_counts.tolist()
        if source == target:
            assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
        elif source:
            decoded = dequantize_tiles(*moments(old), active)
            assert all(map(same_bits, decoded, (new["exp_avg"], new["exp_avg_sq"])))
        else:
            assert all(map(torch.equal, quantize_tiles(old["exp_avg"], old["exp_avg_sq"], active), moments(new)))


def moments(state):
    return state["exp_avg"], state["exp_avg_sq"], state["scales"]


def name_of(model, param):
    return next(name for name, other in ls.canonical_parameters(model).items() if other is param)


def test_stalled_share_corrects_the_moments_by_the_step():
    """A gradient of ones moves by the learning rate in every step; early moments are far from their limits."""
    for lr, share in ((0.75 * 2**-9, 1.0), (1.25 * 2**-9, 0.0)):  # half of the distance to the next value is 2^-9
        param = nn.Parameter(torch.ones(64).bfloat16())
        optimizer = MaskedAdamW({"a": param}, Ticket.full({"a": [64]}), lr=lr, weight_decay=0.0, master=False)
        for _ in range(30):
            with torch.no_grad():
                param.fill_(1.0)
            param.grad = torch.ones_like(param)
            optimizer.step()
        with torch.no_grad():
            param.fill_(1.0)
        assert optimizer.stalled_share(warn_above=1.0) == share


def test_stochastic_rounding_is_keyed_by_seed_step_and_parameter():
    """Contract 6: what rounds alike adds its errors up."""

    def moved(seed):
        params = {name: nn.Parameter(torch.ones(1000).bfloat16()) for name in "ab"}
        ticket = Ticket.full({"a": [1000], "b": [1000]})
        optimizer = MaskedAdamW(params, ticket, lr=2**-10, weight_decay=0.0, rounding="stochastic", seed=seed)
        found = []
        for _ in range(2):
            for param in params.values():
                with torch.no_grad():
                    param.fill_(1.0)
                param.grad = torch.ones_like(param)
            optimizer.step()  # by a quarter of the distance to the next bfloat16 below
            found += [param.detach() != 1 for param in params.values()]
        return found

    draws = [*moved(0), *moved(1)]
    assert all(map(torch.equal, draws[:4], moved(0)))
    assert all(draw.float().mean().item() == pytest.approx(0.25, abs=0.06) for draw in draws)
    shared = [(a & b).float().mean().item() for i, a in enumerate(draws) for b in draws[:i]]
    assert shared == pytest.approx([1 / 16] * 28, abs=0.035)  # parameters, steps and seeds are independent


def test_masters_follow_edits_of_the_weights():
    """Contract 7: loading, applying a delta, or any other in-place edit between two steps."""
    torch.manual_seed(0)
    model = TiedModel().bfloat16()
    ticket = Ticket.random(model, density=0.5, seed=1)
    _, optimizer = train(model, ticket, 3)
    edited = model.roberta["encoder"]["layer"][0]["dense"].weight
    kept = optimizer.state[model.embedding.weight]["master"].clone()
    with torch.no_grad():
        edited.mul_(2)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = [param.detach().clone() for param in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(map(same_bits, model.parameters(), before)), "a step of size 0 keeps the edit"
    assert same_bits(optimizer.state[model.embedding.weight]["master"], kept), "and the others keep their exact values"


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_saved_state_has_masters_of_the_saved_weights(order):
    """Contract 7: the best weights are restored, then model and optimizer are saved and resumed, in either order."""
    torch.manual_seed(0)
    model = TiedModel().bfloat16()
    ticket = Ticket.random(model, density=0.5, seed=1)
    _, optimizer = train(model, ticket, 3)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    saved, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed = TiedModel().bfloat16()
    other = MaskedAdamW(resumed, ticket)
    steps = [lambda: resumed.load_state_dict(saved), lambda: other.load_state_dict(state)]
    for step in steps if order == "model first" else reversed(steps):
        step()
        copy.deepcopy(other).state_dict(), other.state_dict()  # which change nothing
    for one in (model, resumed):
        for param in one.parameters():
            param.grad = torch.full_like(param, 0.01)
    optimizer.step(), other.step()
    assert all(map(same_bits, resumed.parameters(), model.parameters()))
    for name, param in optimizer.named_members().items():
        assert same_bits(other.state[other.named_members()[name]]["master"], optimizer.state[param]["master"])


def test_a_state_does_not_bring_back_the_weights_of_its_run():
    torch.manual_seed(0)
    model = TiedModel().bfloat16()
    ticket = Ticket.random(model, density=0.5, seed=1)
    _, optimizer = train(model, ticket, 3)
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    before = [param.detach().clone() for param in model.parameters()]
    other = MaskedAdamW(model, ticket)
    other.load_state_dict(state)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in other.param_groups:
        group["lr"] = 0.0
    other.step()
    assert all(map(same_bits, model.parameters(), before))


def test_masters_follow_edits_before_a_new_layout():
    """Contract 7: a further group lays the state out anew, which must not bring back what the weights were."""
    torch.manual_seed(0)
    model = TiedModel().bfloat16()
    ticket = Ticket.random(model, density=0.5, seed=1)
    _, optimizer = train(model, ticket, 3)
    kept = optimizer.state[model.embedding.weight]["master"].clone()
    edited = model.roberta["encoder"]["layer"][0]["dense"].weight
    with torch.no_grad():
        edited.mul_(2)
    before = edited.detach().clone()
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3).bfloat16())})
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert same_bits(edited, before)
    assert same_bits(optimizer.state[model.embedding.weight]["master"], kept)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"states": "8bit"}, 0.56), ({"master": True}, 1.76 + 0.8), ({"rounding": "stochastic"}, 1.76)],
    ids=["8bit", "master", "stochastic"],
)
def test_state_bytes(options, limit):
    """Contract 5 at 20 %: 2 bytes and 8 per block of 256, or 8, and 4 for a master, per active entry."""
    shapes = xlmr_shapes(layers=1, vocabulary=3000)
    params = {name: nn.Parameter(t.bfloat16()) for name, t in random_weights(shapes).items()}
    ticket = Ticket.random(shapes, density=0.2)
    optimizer = MaskedAdamW(
        params, ticket, **{"rounding": "stochastic"} | options if "master" not in options else options
    )
    table = optimizer._launches[0].table
    coded = "states" in options
    wanted = (2 * ticket.k + 8 * table.blocks if coded else 8 * ticket.k) + (4 * ticket.k if "master" in options else 0)
    assert optimizer.state_bytes() == wanted + table.nbytes
    assert (wanted + table.nbytes) / ticket.n <= limit


def test_mixed_dtypes_take_a_launch_each():
    model = TiedModel()
    ticket = Ticket.random(model, density=0.5, seed=1)
    model.roberta["encoder"]["layer"][0].bfloat16()
    optimizer = MaskedAdamW(model, ticket, lr=1e-2, max_grad_norm=1.0, dense=model.lm_head["decoder"].bias.__class__(
        torch.zeros(3).half()))  # fmt: skip
    assert sorted(str(launch.dtype) for launch in optimizer._launches) == [
        "torch.bfloat16", "torch.float16", "torch.float32",
    ]  # fmt: skip
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    entries = ticket.k + 3
    assert optimizer.grad_norm.item() == pytest.approx(entries**0.5)
    assert not any(map(same_bits, params, before))


def test_options_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match='states must be "float32" or "8bit", got \'4bit\''):
        Precision(states="4bit")
    with pytest.raises(ValueError, match='rounding must be "nearest" or "stochastic"'):
        Precision(rounding="up")
    with pytest.raises(ValueError, match="a master is exact"):
        Precision(rounding="stochastic", master=True)
    with pytest.raises(ValueError, match="seed must be in"):
        Precision(seed=-1)
    model = TiedModel().half()
    ticket = Ticket.random(model, density=0.5)
    with pytest.raises(TypeError, match="stochastic rounding is for bfloat16 parameters, got float16"):
        MaskedAdamW(model, ticket, rounding="stochastic")
    optimizer = MaskedAdamW(model, ticket)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model.bfloat16()
    with pytest.raises(TypeError, match=r"of torch.float16 has become torch.bfloat16; cast the model before"):
        optimizer.step()
    problem = update_problem({"a": (40,)}, density=0.5, dtype=torch.bfloat16, stochastic=True, master=True)
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16 parameters without a master"):
        problem.step()
    problem = update_problem({"a": (40,)}, density=0.5, states="8bit")
    problem.scales = problem.scales[:, :1]
    with pytest.raises(
        ValueError, match=r"scales must be torch.float32 \[1, 2\] on cpu, .*, got torch.float32 \[1, 1\]"
    ):
        problem.step()


def test_blocks_of_the_table_are_counted_tile_by_tile():
    mask = torch.arange(3 * TILE) % TILE < 300
    table = TileTable.build([IndexSet.from_mask(mask), IndexSet.full(5)])
    assert table.tiles[:, 7].tolist() == [0, 2, 4, 6] and table.blocks == 7


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_that_round_to_nothing_are_noticed(dtype, states):
    """The share is that of the entries which the next step leaves as they are."""

    def train(lr, **options):
        torch.manual_seed(0)
        model = torch.nn.Linear(60, 50).to(dtype)
        opt = ls.MaskedAdamW(model, ls.Ticket.full(model), lr=lr, weight_decay=0.0, states=states, **options)
        x = torch.randn(8, 60).to(dtype)
        for _ in range(5):
            opt.zero_grad()
            model(x).float().square().sum().backward()
            opt.step()
        return model, opt, x

    model, opt, x = train(1e-6, master=False)
    with pytest.warns(StalledUpdates, match="of the active entries round to nothing; train with master=True"):
        share = opt.stalled_share()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()  # the same gradient once more
    kept = sum(int((p == b).sum()) for p, b in zip(model.parameters(), before, strict=True))
    assert share > 0.9 and share == pytest.approx(kept / 3050, abs=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(0.1, master=False)[1].stalled_share() < 0.1
        assert train(1e-6, master=True)[1].stalled_share() == 0
        if dtype is torch.bfloat16:
            assert train(1e-6, rounding="stochastic")[1].stalled_share() == 0


def test_a_learning_rate_of_zero_stalls_nothing():
    """As at the start of a warm-up: nothing is meant to move. The warning's text is the same for every share."""
    model = torch.nn.Linear(60, 50).to(torch.bfloat16)
    opt = ls.MaskedAdamW(model, ls.Ticket.full(model), lr=0.0, weight_decay=0.0, master=False)
    texts = []
    for lr, dense in ((0.0, None), (1e-6, None), (1e-5, model.bias)):
        opt.param_groups[0]["lr"] = lr
        if dense is not None:
            with torch.no_grad():
                dense.zero_()  # some updates are seen now
        opt.zero_grad()
        model(torch.randn(8, 60).bfloat16()).float().square().sum().backward()
        opt.step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            share = opt.stalled_share()
        assert [w.category for w in seen] == ([] if lr == 0 else [StalledUpdates])
        assert share == 0 if lr == 0 else 0.5 < share < 1 + 1e-9
        texts += [(str(w.message), w.filename, share) for w in seen]
    assert texts[0][0] == texts[1][0] and texts[0][1] == __file__ and texts[0][2] != texts[1][2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opt.stalled_share(warn_above=1.0) > 0.5
