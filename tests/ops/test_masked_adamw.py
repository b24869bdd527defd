"""`masked_adamw_` and `masked_sum_squares`: the update of the active entries, nothing else (contracts 3, 4 and 6)."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.backends import ALL_BACKENDS, BACKENDS, Unpacked, threads, using
from helpers.bits import bits, same_bits
from torch import Tensor

import ltp_sparse as ls
from ltp_sparse.backends.reference import Coefficient
from ltp_sparse.ops import adamw_coefficients, masked_sum_squares
from ltp_sparse.testing import UpdateProblem, random_weights, update_problem
from ltp_sparse.tickets.bits import TILE
from ltp_sparse.tickets.index_set import Encoding, IndexSet
from ltp_sparse.tickets.tile_table import Column, TileTable

SHAPES = {"matrix": (300, 250), "tiny": (1,), "odd": (63,), "vector": (4097,), "cube": (3, 5, 7)}
DENSITIES = (0.001, 0.05, 0.3, 0.9, 1.0)
"""LIST16, LIST16, BITMAP, BITMAP, FULL"""


def poisoned(problem: UpdateProblem) -> UpdateProblem:
    """The same problem with NaN and infinite gradients wherever an entry is not active."""
    for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
        inactive = ~problem.ticket.mask(name)
        values = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(grad.numel() // 3 + 1)
        grad[inactive] = values[: grad.numel()].view_as(grad)[inactive]
    return problem


def steps(problem: UpdateProblem, count: int, backend: str, anchor: Tensor | None = None, **hyper) -> None:
    """Updates with one gradient whose sign alternates."""
    with using(backend):
        for step in range(1, count + 1):
            coefficients = adamw_coefficients(torch.full((len(problem.params),), step), **hyper)
            coefficients[:, Coefficient.GRAD_FACTOR] = -1 if step % 3 == 0 else 0.5
            ls.masked_adamw_(*problem.args()[:5], coefficients, anchor)


def eager(
    problem: UpdateProblem, count: int, dtype=np.float32, anchor: Tensor | None = None, **hyper
) -> list[np.ndarray]:
    """The active values of every parameter after the steps above, by the documented formula in numpy."""
    hyper = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "pull": 0.0, **hyper}
    (beta1, beta2), results = hyper["betas"], []
    for name, param, grad, slots in zip(
        problem.ticket.names, problem.params, problem.grads, problem.slots(), strict=True
    ):
        mask = problem.ticket.mask(name).numpy()
        p, raw = param.numpy()[mask].astype(dtype), grad.numpy()[mask].astype(dtype)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for step in range(1, count + 1):
            g = raw * dtype(-1 if step % 3 == 0 else 0.5)
            if anchor is not None:
                g = g + dtype(hyper["pull"]) * np.sign(p - anchor[slots].numpy().astype(dtype))
            m = m + dtype(1 - beta1) * (g - m)
            v = v * dtype(beta2) + dtype(1 - beta2) * (g * g)
            size, root = dtype(hyper["lr"] / (1 - beta1**step)), dtype(1 / np.sqrt(1 - beta2**step))
            decay = dtype(hyper["lr"] * hyper["weight_decay"])
            p = p - (decay * p + size * (m / (np.sqrt(v) * root + dtype(hyper["eps"]))))
        results.append(p)
    return results


# --- contracts 3 and 6: the active entries by the formula, bit for bit; the others not at all ---


@pytest.mark.parametrize("pull", [0.0, 0.3], ids=["plain", "pull"])
@pytest.mark.parametrize("density", DENSITIES, ids="d{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_update_is_the_formula_and_inactive_entries_stay(backend, density, pull):
    problem = poisoned(update_problem(SHAPES, density=density))
    assert problem.table.k
    anchor = torch.cat(
        [p.view(-1)[s.indices()] for p, s in zip(problem.params, problem.ticket.sets.values(), strict=True)]
    )
    anchor = anchor + 1e-3 * (torch.arange(len(anchor)) % 3 - 1) if pull else None
    before = [param.clone() for param in problem.params]
    hyper = {"lr": 1e-2, "weight_decay": 0.1, "pull": pull}
    wanted = eager(problem, 4, anchor=anchor, **hyper)
    steps(problem, 4, backend, anchor, **hyper)
    for name, after, old, active in zip(problem.ticket.names, problem.params, before, wanted, strict=True):
        mask = problem.ticket.mask(name)
        assert same_bits(after[~mask], old[~mask])
        assert same_bits(after[mask], torch.from_numpy(active))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_small_update_on_every_backend(backend):
    """Triton's interpreter and GPUs may fuse and round otherwise; frozen entries are exact everywhere."""
    problem = poisoned(update_problem({"a": (30, 9), "b": (70,), "c": (5,)}, density=0.4))
    before = [param.clone() for param in problem.params]
    wanted = eager(problem, 2, lr=1e-2)
    steps(problem, 2, backend, lr=1e-2)
    for name, after, old, active in zip(problem.ticket.names, problem.params, before, wanted, strict=True):
        mask = problem.ticket.mask(name)
        assert same_bits(after[~mask], old[~mask])
        torch.testing.assert_close(after[mask], torch.from_numpy(active), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_entries_are_frozen_over_100_steps(backend):
    """Contract 3; their NaN payloads included."""
    problem = poisoned(update_problem(SHAPES, density=0.2))
    for param, index_set in zip(problem.params, problem.ticket.sets.values(), strict=True):
        frozen = (~index_set.mask()).nonzero().view(-1)[::7]
        bits(param).view(-1)[frozen] = torch.randint(-(2**31), 2**31, frozen.shape).to(torch.int32)
    before = [param.clone() for param in problem.params]
    steps(problem, 100, backend, lr=0.5, weight_decay=0.5)
    for name, after, old in zip(problem.ticket.names, problem.params, before, strict=True):
        mask = problem.ticket.mask(name)
        assert same_bits(after[~mask], old[~mask])
        assert bool((after[mask] != old[mask]).all()) and bool(after[mask].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_encodings_are_views_of_one_state(backend):
    """Contract 6: the same active entries give the same bits, in whichever encoding a kernel meets them."""
    mask = torch.arange(2 * TILE) % 97 < 3
    problem = {}
    for encoding in (Encoding.BITMAP, Encoding.LIST16):
        table = TileTable.build([IndexSet.from_mask(mask)])
        assert set(table.tiles[:, Column.ENCODING].tolist()) == {Encoding.LIST16}
        if encoding is Encoding.BITMAP:
            words = IndexSet.from_mask(mask).encoded(Encoding.BITMAP).data
            tiles = table.tiles.clone()
            tiles[:, Column.ENCODING], tiles[:, Column.INDEX] = encoding, torch.tensor([0, TILE // 32])
            table = dataclasses.replace(table, tiles=tiles, words=words, positions=table.positions[:0])
        made = UpdateProblem(
            ls.Ticket.from_masks({"a": mask}),
            list(random_weights({"a": mask.shape}).values()),
            list(random_weights({"a": mask.shape}, seed=1).values()),
            torch.zeros(table.k),
            torch.zeros(table.k),
            table,
            torch.zeros(0),
        )
        steps(made, 3, backend, lr=1e-2)
        problem[encoding] = [made.params[0], made.exp_avg, made.exp_avg_sq]
    assert all(map(same_bits, *problem.values()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_any_number_of_threads(backend):
    """Contract 6; the sums of squares, too."""
    outcomes = []
    for count in (1, 2, 2):
        problem = update_problem({"a": (700, 500), "b": (70_000,), "c": (3,)}, density=0.3)
        with threads(count):
            steps(problem, 3, backend, lr=1e-2)
            with using(backend):
                sums = masked_sum_squares(problem.params, problem.grads, problem.table, problem.coefficients)
        outcomes.append([*problem.params, problem.exp_avg, problem.exp_avg_sq, sums])
    for other in outcomes[1:]:
        assert all(map(same_bits, outcomes[0], other))


# --- contract 4: AdamW ---


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids="decay{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_against_float64_is_at_most_twice_that_of_torch(backend, weight_decay):
    """Contract 4: |error| <= 4e-6 * max(|p|, steps * lr), and at most twice torch's own."""
    count, lr = 60, 1e-3
    problem = update_problem(SHAPES, density=0.3)
    start = [param[problem.ticket.mask(n)] for n, param in zip(problem.ticket.names, problem.params, strict=True)]
    grads = [grad[problem.ticket.mask(n)] for n, grad in zip(problem.ticket.names, problem.grads, strict=True)]

    def torch_adamw(dtype):
        params = [torch.nn.Parameter(p.to(dtype)) for p in start]
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
        for step in range(1, count + 1):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(dtype) * (-1 if step % 3 == 0 else 0.5)
            optimizer.step()
        return torch.cat([p.detach().double() for p in params])

    exact = torch_adamw(torch.float64)
    steps(problem, count, backend, lr=lr, weight_decay=weight_decay)
    ours = torch.cat([p[problem.ticket.mask(n)] for n, p in zip(problem.ticket.names, problem.params, strict=True)])
    error = (ours.double() - exact).abs()
    assert bool((error <= 4e-6 * exact.abs().clamp(min=count * lr)).all())
    assert error.max() <= 2 * (torch_adamw(torch.float32) - exact).abs().max()


def test_reference_works_in_float64():
    problem = update_problem({"a": (40, 7)}, density=0.5)
    mask = problem.ticket.mask("a")
    wanted = eager(problem, 3, np.float64, lr=1e-2)[0]
    param, grad, m, v = (t.double() for t in (problem.params[0], problem.grads[0], problem.exp_avg, problem.exp_avg_sq))
    from ltp_sparse.backends import reference

    table = problem.table
    for step in range(1, 4):
        coefficients = adamw_coefficients(torch.tensor([step]), lr=1e-2)
        coefficients[:, Coefficient.GRAD_FACTOR] = -1 if step % 3 == 0 else 0.5
        Unpacked(reference).masked_adamw_(
            table.tiles, table.words, table.ranks, table.positions, [grad], [param], coefficients, False, None, None,
            m, v, None, False,
        )  # fmt: skip
    torch.testing.assert_close(param[mask], torch.from_numpy(wanted), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("how", ["no-gradient", "not-applied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_parameters_keep_values_and_moments(backend, how):
    """Contract 4: no decay, no moment decay."""
    problem = update_problem(SHAPES, density=0.3)
    steps(problem, 2, backend, lr=1e-2)
    before = [t.clone() for t in (*problem.params, problem.exp_avg, problem.exp_avg_sq)]
    params, grads, m, v, table, coefficients = problem.args()
    skipped = (0, 2)
    for i in skipped:
        if how == "no-gradient":
            grads[i] = None
        else:
            coefficients[i, Coefficient.APPLY] = 0
    with using(backend):
        ls.masked_adamw_(params, grads, m, v, table, coefficients)
    for i, slots in enumerate(problem.slots()):
        stays = i in skipped or table.counts[i] == 0
        for tensor, old in ((params[i], before[i]), (m[slots], before[-2][slots]), (v[slots], before[-1][slots])):
            assert same_bits(tensor, old) == stays


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_parameters_and_gradients(backend):
    """Any contiguity; the memory between the entries of a strided parameter is left alone."""
    plain = poisoned(update_problem({"a": (90, 70), "b": (500,)}, density=0.3))
    strided = poisoned(update_problem({"a": (90, 70), "b": (500,)}, density=0.3))
    memory = torch.full((500, 2), float("nan"))
    memory[:, 1] = strided.params[1]
    strided.params[:] = [strided.params[0].t().contiguous().t(), memory[:, 1]]
    strided.grads[:] = [strided.grads[0].t().contiguous().t(), strided.grads[1].repeat_interleave(3)[::3]]
    for problem in (plain, strided):
        steps(problem, 3, backend, lr=1e-2)
    assert all(map(same_bits, plain.params, strided.params))
    assert strided.params[0].stride() == (1, 90) and bool(memory[:, 0].isnan().all())


@pytest.mark.parametrize("with_anchor", [False, True], ids=["plain", "pull"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_of_squares_is_that_of_the_active_gradients(backend, with_anchor):
    problem = poisoned(update_problem(SHAPES, density=0.3))
    anchor = torch.zeros(problem.table.k) if with_anchor else None
    coefficients = problem.coefficients.clone()
    coefficients[:, Coefficient.GRAD_FACTOR], coefficients[:, Coefficient.PULL] = 0.25, 0.01
    coefficients[0, Coefficient.APPLY] = 0  # the norm is of the gradients there are
    grads = [None if i == 1 else grad for i, grad in enumerate(problem.grads)]
    with using(backend):
        sums = masked_sum_squares(problem.params, grads, problem.table, coefficients, anchor)
    assert sums.dtype == torch.float64 and sums.shape == (len(problem.table.tiles),)
    for i, name in enumerate(problem.ticket.names):
        mask = problem.ticket.mask(name)
        g = problem.grads[i][mask] * 0.25
        g = g + torch.sign(problem.params[i][mask]) * torch.tensor(0.01) if with_anchor else g
        wanted = 0.0 if grads[i] is None else g.double().square().sum().item()
        assert sums[problem.table.tiles[:, Column.PARAM] == i].sum().item() == pytest.approx(wanted, rel=1e-12)


def test_parameters_that_require_gradients_are_updated_outside_the_graph():
    problem = update_problem({"a": (40, 7)}, density=0.3)
    problem.params[0].requires_grad_()
    ls.masked_adamw_(*problem.args())
    sums = masked_sum_squares(problem.params, problem.grads, problem.table, problem.coefficients)
    assert problem.params[0].grad_fn is None and not sums.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_table_without_active_entries(backend):
    """k = 0; also an empty parameter."""
    sets = [IndexSet.from_mask(torch.zeros(n, dtype=torch.bool)) for n in (5, 0)]
    table = TileTable.build(sets)
    params = [torch.ones(5), torch.ones(0)]
    coefficients = adamw_coefficients(torch.ones(2), lr=1.0)
    with using(backend):
        ls.masked_adamw_(params, [torch.ones(5), torch.ones(0)], torch.zeros(0), torch.zeros(0), table, coefficients)
        assert masked_sum_squares(params, [None, None], table, coefficients).tolist() == []
    assert params[0].tolist() == [1] * 5


def with_param(problem, param):
    problem.params[0] = param


def with_grad(problem, grad):
    problem.grads[0] = grad


MISTAKES = {
    "smaller-parameter": (
        lambda p: (with_param(p, torch.zeros(2, 2)), with_grad(p, torch.zeros(2, 2))),
        ValueError,
        "parameter 0 has 4 entries, its index set covers 280",
    ),
    "double-parameter": (
        lambda p: with_param(p, p.params[0].double()),
        TypeError,
        "parameter 0 must be a dense float32",
    ),
    "half-gradient": (
        lambda p: with_grad(p, p.grads[0].half()),
        TypeError,
        "got parameters of float32 and gradients of float16; make a call per dtype",
    ),
    "sparse-gradient": (lambda p: with_grad(p, p.grads[0].to_sparse()), TypeError, "gradient 0.*sparse"),
    "gradient-shape": (lambda p: with_grad(p, p.grads[0].t()), ValueError, r"gradient 0 has shape \[7, 40\]"),
    "gradient-device": (lambda p: with_grad(p, p.grads[0].to("meta")), ValueError, "gradient 0 is on meta"),
    "no-moments": (lambda p: setattr(p, "exp_avg", None), TypeError, "exp_avg must be a tensor, got None"),
    "moments": (lambda p: setattr(p, "exp_avg", torch.zeros(3)), ValueError, r"exp_avg must be torch.float32 \[84\]"),
    "coefficients": (
        lambda p: setattr(p, "coefficients", torch.zeros(1, 11)),
        ValueError,
        r"must be torch.float64 \[1, 11\]",
    ),
    "coefficients-device": (
        lambda p: setattr(p, "coefficients", p.coefficients.to("meta")),
        ValueError,
        "coefficients is on meta, expected it on cpu",
    ),
    "strided-coefficients": (
        lambda p: setattr(p, "coefficients", p.coefficients.repeat(1, 2)[:, ::2]),
        ValueError,
        r"coefficients must be .* contiguous, got torch.float64 \[1, 11\] with strides \[22, 2\]",
    ),
    "strided-moments": (
        lambda p: setattr(p, "exp_avg_sq", torch.zeros(168)[::2]),
        ValueError,
        r"exp_avg_sq must be torch.float32 \[84\] on cpu, contiguous, got torch.float32 \[84\] with strides \[2\]",
    ),
    "count": (lambda p: p.params.append(torch.zeros(1)), ValueError, "got 2 parameters, 1 gradients and a table of 1"),
}


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_arguments_say_what_was_expected(change, error, message):
    problem = update_problem({"a": (40, 7)}, density=0.3)
    change(problem)
    with pytest.raises(error, match=message):
        ls.masked_adamw_(*problem.args())
