"""What only a GPU can show: both GPU backends against the reference on the CPU, graphs, synchronisation.

`make gpu` runs these; elsewhere they skip, and `test_gpu_bodies.py` runs what is in them on the CPU.
"""

import copy
import itertools
import multiprocessing
from contextlib import nullcontext

import pytest
import torch
from helpers.backends import Unpacked, using
from helpers.bits import DTYPES, bits, weights
from helpers.gpu import (
    DEVICE,
    GPU_BACKENDS,
    ON_GPU,
    captured,
    keep_busy,
    needs_gpu,
    reserved,
    side_stream,
    synchronize,
    waits,
)  # fmt: skip
from helpers.selection_passes import (
    BANDS,
    KINDS,
    SELECTION_GROUPS,
    SELECTION_SIZES,
    TAKE,
    BandOutputs,
    pairs_of,
    unaligned,
)
from helpers.selections import DELTAS
from helpers.tied_model import TiedModel
from helpers.update_cases import MODES, rows_of
from safetensors.torch import save_file
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket, backends, selection
from ltp_sparse.backends import reference
from ltp_sparse.ops import masked_pack_, masked_sum_squares, routes, sources
from ltp_sparse.testing import UpdateProblem, random_weights, tuned_weights, update_problem
from ltp_sparse.tickets.bits import TILE, WORDS_PER_TILE
from ltp_sparse.tickets.layout import Layout
from ltp_sparse.tickets.tile_table import TileTable

pytestmark = needs_gpu

# The first two start at slots that are multiples of 4, as vector loads need; the matrix is one of XLM-R-base.
SHAPES = {f"p{n}": (n,) for n in (8192, 131_072, 1, 63, 257, 1000, 4096, 4097, 65_537)} | {"matrix": (768, 768)}
CASES = [
    pytest.param({"dtype": dtype, "grad_dtype": grad, **mode}, packed, id="-".join((name, of, mode_name, given)))
    for (name, dtype), (of, grad), (mode_name, mode), (given, packed) in itertools.product(
        DTYPES.items(), DTYPES.items(), MODES.items(), (("dense", False), ("packed", True))
    )
    if (grad == dtype or (grad == torch.float32 and not packed))
    and (dtype == torch.bfloat16 or not mode.get("stochastic"))
    and (dtype != torch.float32 or not mode.get("master"))
]


def on_device(problem: UpdateProblem) -> UpdateProblem:
    table = TileTable.build(list(problem.ticket.sets.values()), device=DEVICE, ranks=True)
    moved = {
        name: None if getattr(problem, name) is None else getattr(problem, name).to(DEVICE)
        for name in ("exp_avg", "exp_avg_sq", "coefficients", "scales", "master")
    }
    params = [param.to(DEVICE) for param in problem.params]
    grads = [grad.to(DEVICE) for grad in problem.grads]
    return UpdateProblem(problem.ticket, params, grads, table=table, stochastic=problem.stochastic, **moved)


def make(density: float, **options) -> UpdateProblem:
    problem = update_problem(SHAPES, density=density, **options)
    for name, grad in zip(problem.ticket.names, problem.grads, strict=True):
        grad[~problem.ticket.mask(name)] = float("nan")
    return problem


def run(problem: UpdateProblem, with_anchor: bool, packed: bool) -> list[Tensor]:
    device = problem.exp_avg.device
    anchor = torch.linspace(-0.03, 0.03, problem.table.k).to(device) if with_anchor else None
    found = []
    if packed:
        flat = torch.zeros(problem.table.k, device=device)
        masked_pack_(problem.grads, flat, problem.table)
        masked_pack_(problem.grads, flat, problem.table, accumulate=True)
        problem.grads = flat
    else:
        problem.grads[1] = None
    for step in (1, 2, 3):
        rows = rows_of(problem, step).to(device)
        found.append(
            masked_sum_squares(problem.params, problem.grads, problem.table, rows, anchor, master=problem.master)
        )
        problem.step(rows, anchor)
    return [tensor.cpu() for tensor in (*found, *problem.tensors())]


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0], ids=["list16", "bitmap", "full"])
@pytest.mark.parametrize(("options", "packed"), CASES)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_bits_of_the_reference(backend, options, packed, density):
    with using("reference"):
        wanted = run(make(density, **options), density == 0.3, packed)
    with using(backend):
        found, again = (run(on_device(make(density, **options)), density == 0.3, packed) for _ in range(2))
    for number, (a, b, c) in enumerate(zip(found, wanted, again, strict=True)):
        assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, c))), f"{number}: run to run"
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        else:
            assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (a, b))), number


def tied(seed: int = 0, **options) -> tuple[TiedModel, MaskedAdamW]:
    """With gradients, on the device."""
    torch.manual_seed(seed)
    model = TiedModel()
    ticket = Ticket.random(model, density=0.4, seed=1)
    for param in model.to(DEVICE).parameters():
        param.grad = torch.randn_like(param)
    return model, MaskedAdamW(model, ticket, lr=1e-2, **options)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_deltas_and_switches_copy_the_bits_of_the_cpu(backend):
    """Entries of bfloat16 and float32 parameters, in all three encodings."""
    base = TiedModel()
    base.roberta.bfloat16()
    tuned = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for number, model in enumerate(tuned, 1):
            for parameter in model.parameters():
                parameter.add_(0.25 * number)
    tickets = [Ticket.random(base, density=density, seed=0) for density in (0.03, 0.4)]
    deltas = {str(n): ls.SparseDelta.between(base, model, tickets[n]) for n, model in enumerate(tuned)}
    deltas["full"] = ls.SparseDelta.between(base, tuned[0], Ticket.full(base))
    wanted = {None: weights(base)}
    for name, delta in deltas.items():
        delta.apply(base)
        wanted[name] = weights(base)
        delta.revert(base)
    placed = copy.deepcopy(base).to(DEVICE)

    def holds(name: str | None) -> bool:
        found = weights(placed)
        return all(torch.equal(bits(found[key].cpu()), bits(tensor)) for key, tensor in wanted[name].items())

    with using(backend):
        for name, delta in deltas.items():
            delta.apply(placed)
            assert holds(name)
            delta.revert(placed)
            assert holds(None)
        switcher = ls.TicketSwitcher(placed, deltas)
        for name in ("0", "1", "full", "0", None):
            switcher.switch(name)
            assert holds(name), name


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_steps_replay_from_a_graph(backend):
    """Contract 7: the learning rate and a skipped step reach the graph; the bits are those of eager steps."""
    outcomes = []
    for graph in (False, True):
        model, optimizer = tied(max_grad_norm=1.0)
        with using(backend):
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
            optimizer.step()
            step = captured(optimizer.step) if graph else optimizer.step
            for number in range(4):
                optimizer.found_inf.fill_(float(number == 2))
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2 / (1 + number)
                if graph:
                    optimizer.update_hyperparameters()
                step()
        steps = {int(state["step"]) for state in optimizer.state.values()}
        outcomes.append([*(p.detach().cpu() for p in model.parameters()), torch.tensor(sorted(steps))])
    assert outcomes[0][-1].tolist() == [4]
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_backward_and_step_replay_from_one_graph(backend, gradients):
    tokens = torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outcomes = []
    for graph in (False, True):
        model, optimizer = tied(gradients=gradients)
        optimizer.zero_grad()

        def train(model=model, optimizer=optimizer) -> None:
            if gradients == "dense":
                optimizer.zero_grad(set_to_none=False)  # they stay where they are
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()

        synchronize()
        with using(backend):
            with side_stream():  # as torch asks for before a backward pass is captured
                train()
            synchronize()
            again = captured(train) if graph else train
            for _ in range(3):
                again()
        outcomes.append([p.detach().cpu() for p in model.parameters()])
    assert all(map(torch.equal, *outcomes))


def pack_on_two_streams(backend: str) -> None:
    """The second stream does not wait for the first, which is busy before it copies its tables."""
    problem = on_device(update_problem(SHAPES, density=0.3))
    with using(backend):
        masked_pack_(problem.grads, torch.zeros(problem.table.k, device=DEVICE), problem.table)  # compiles
        grads = [grad.clone() for grad in problem.grads]  # at new addresses
        outs = [torch.zeros(problem.table.k, device=DEVICE) for _ in range(3)]
        synchronize()
        keep_busy()
        masked_pack_(grads, outs[0], problem.table)
        with side_stream():
            masked_pack_(grads, outs[1], problem.table)
            synchronize()
    with using("reference"):
        masked_pack_(grads, outs[2], problem.table)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[2])


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_streams_do_not_use_what_another_has_yet_to_make(backend):
    """In another process, as an illegal access would end the use of the GPU in this one."""
    process = multiprocessing.get_context("spawn").Process(target=pack_on_two_streams, args=(backend,))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_steps_on_another_stream(backend):
    outcomes = []
    for stream in (nullcontext, side_stream):
        model, optimizer = tied(max_grad_norm=1.0)
        synchronize()
        with using(backend), stream():
            for _ in range(3):
                optimizer.step()
        synchronize()
        outcomes.append([p.detach().cpu() for p in model.parameters()])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_step_waits_for_nothing_and_allocates_nothing_new(backend):
    model, optimizer = tied(max_grad_norm=1.0)
    with using(backend):
        for _ in range(2):
            optimizer.step()
        before = reserved()
        with waits() as found:
            optimizer.step()
    assert not found and reserved() == before


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_training_learns(backend, gradients):
    torch.manual_seed(0)
    model = TiedModel()
    ticket = Ticket.random(model, density=0.5, seed=1)
    model.to(DEVICE)
    with using(backend):
        optimizer = MaskedAdamW(model, ticket, lr=3e-3, weight_decay=0.0, gradients=gradients)
        losses = []
        for step in range(60):
            tokens = torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(step)).to(DEVICE)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("gradients", ["dense", "packed"])
def test_predicted_memory_is_what_the_allocator_gives(gradients):
    """Within 5 % at the peak of a step, of a model whose tensors are large beside the allocator's rounding."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    config = XLMRobertaConfig(
        vocab_size=30_000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        max_position_embeddings=130, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model.roberta(ids, torch.ones_like(ids)).last_hidden_state.float().square().mean()

    ids = torch.arange(16 * 128).view(16, 128) + 10
    ticket = Ticket.random(XLMRobertaForMaskedLM(config), density=0.2, seed=0, pool=selection.pools.maskable)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = XLMRobertaForMaskedLM(config).train()
        predicted = ls.memory_report(
            fake, ticket, loss=lambda: loss(fake, ids), gradients=gradients, device="cuda"
        ).total
    if not ON_GPU:
        pytest.skip("the CPU has no allocator to ask")
    square = torch.ones(256, 256, device=DEVICE)
    square @ square  # the workspace of the matrix library is not the model's
    before = torch.cuda.memory_allocated()
    model, on_device = XLMRobertaForMaskedLM(config).train().to(DEVICE), ids.to(DEVICE)
    optimizer = MaskedAdamW(model, ticket, gradients=gradients, freeze=True)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        loss(model, on_device).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(predicted, rel=0.05)


# --- selection ---


def moved(tensors: list[Tensor]) -> list[Tensor]:
    """On the device; what no vector can be loaded from stays so."""
    return [unaligned(t.to(DEVICE)) if t.data_ptr() % 16 else t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize(("before", "after"), KINDS)
@pytest.mark.parametrize("backend", [p for p in GPU_BACKENDS if p.values == ("compiled",)])
def test_selection_passes_give_the_outputs_of_the_reference(backend, before, after, rng):
    """Every combination of dtypes, in one call with aligned and unaligned tensors."""
    initial, tuned = pairs_of(before, after, rng)
    with using(backend):
        passes = backends.resolve(DEVICE)
    on_gpu = moved(initial), moved(tuned)
    flags = torch.zeros(2, 1, dtype=torch.int64)
    for prefixes in (None, torch.tensor([0, 0x3B00, 0x3A80])):
        wanted = torch.full((3, 32_768 if prefixes is None else 65_536), 5)
        found, flag = wanted.to(DEVICE), flags[1].to(DEVICE)
        Unpacked(reference).delta_histogram(initial, tuned, SELECTION_GROUPS, prefixes, wanted, flags[0])
        upper = None if prefixes is None else prefixes.to(DEVICE)
        Unpacked(passes).delta_histogram(*on_gpu, SELECTION_GROUPS, upper, found, flag)
        assert torch.equal(found.cpu(), wanted) and not flag.item()
    for bounds, take in itertools.product(BANDS.values(), (None, torch.tensor(TAKE))):
        room = sum(SELECTION_SIZES)
        wanted = BandOutputs(Unpacked(reference).delta_band, initial, tuned, *bounds, take, room)
        on_device = None if take is None else take.to(DEVICE)
        found = BandOutputs(Unpacked(passes).delta_band, *on_gpu, *bounds, on_device, room)
        assert found.counts() == wanted.counts()
        assert found.candidates() == wanted.candidates()


@pytest.mark.parametrize("route", ["sample", "histogram"])
@pytest.mark.parametrize("deltas", ["normal", "levels"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_selection_bits_are_those_of_the_cpu(backend, dtype, deltas, route):
    """Untouched rows, and deltas of few values, whose ties overflow the room for candidates; in budgets."""
    shapes = {"a": (700, 900), "b": (70_001,), "roberta.embeddings.x": (3000, 64), "bias": (1,)}
    initial = {name: tensor.to(dtype) for name, tensor in random_weights(shapes).items()}
    tuned = list(tuned_weights(initial, untouched_rows=0.6).values())
    before = list(initial.values())
    if deltas == "levels":
        before = [torch.zeros_like(t) for t in tuned]
        tuned = [(1e3 * t.float()).round().clamp(-3, 3).to(dtype) for t in tuned]
    on_gpu = moved(before), moved(tuned)
    with using(backend):
        passes = backends.resolve(DEVICE)
    for groups, ks in (([0, 0, 0, 0], [1]), ([0, 0, 0, 0], [300_000]), ([0, 1, 2, 1], [5000, 69_000, 0])):
        wanted = routes.select_topk(reference, sources.TensorSource(before, tuned), groups, ks, route="histogram")
        for _ in range(2):
            found = routes.select_topk(passes, sources.TensorSource(*on_gpu), groups, ks, route=route)
            for name in ("words", "counts", "thresholds"):
                assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


@pytest.mark.parametrize("n", [70_001, 4_500_000], ids=["by histogram", "by sample"])
@pytest.mark.parametrize(("before", "after"), KINDS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_bits_of_topk_delta(backend, before, after, n, rng):
    """With one budget, and with one for each tensor; aligned, unaligned and large tensors."""
    initial, tuned = pairs_of(before, after, rng)
    large = torch.randn(n, generator=rng) * 0.02
    tuned.append((large + torch.randn(n, generator=rng) * 1e-3).to(DTYPES[after]))
    initial += [large.to(DTYPES[before])] if before else []
    on_gpu = moved(initial), moved(tuned)
    count = len(tuned)
    for groups, ks in ((None, 50_000), ([*range(count)], [t.numel() // 3 for t in tuned])):
        with using("reference"):
            wanted, thresholds = ls.topk_delta(initial, tuned, ks, groups=groups)
        with using(backend):
            found, found_thresholds = ls.topk_delta(*on_gpu, ks, groups=groups)
        assert torch.equal(found_thresholds.cpu(), thresholds)
        for a, b in zip(found, wanted, strict=True):
            assert a.k == b.k and torch.equal(a.bitmap().cpu(), b.bitmap())


@pytest.mark.parametrize("kind", ["normal", "levels"])
@pytest.mark.parametrize("groups", [1, 147])
@pytest.mark.parametrize("backend", [p for p in GPU_BACKENDS if p.values == ("compiled",)])
def test_thread_blocks_that_finish_last_decide_alike(backend, groups, kind, rng):
    """Many times over: what a block decides on must be what all the others have written, in whatever order."""
    tuned = [DELTAS[kind](2000 + 701 * number % 9000, rng) for number in range(147)]
    tuned[::5] = [t.bfloat16() for t in tuned[::5]]
    of_tensor = [number % groups for number in range(len(tuned))]
    pools = [sum(t.numel() for t, group in zip(tuned, of_tensor, strict=True) if group == g) for g in range(groups)]
    ks = [pool // 5 for pool in pools]
    with using(backend):
        passes = backends.resolve(DEVICE)
    on_gpu = sources.TensorSource([], moved(tuned))
    wanted = routes.select_topk(reference, sources.TensorSource([], tuned), of_tensor, ks, route="histogram")
    for _ in range(20):
        found = routes.select_topk(passes, on_gpu, of_tensor, ks)
        for name in ("words", "counts", "thresholds"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


@pytest.mark.parametrize("route", ["sample", "histogram"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_selection_names_the_tensor_that_is_not_finite(backend, route):
    tuned = [torch.ones(5000, device=DEVICE), torch.ones(70_000, device=DEVICE)]
    tuned[1][69_999] = torch.nan
    with using(backend):
        passes = backends.resolve(DEVICE)
    with pytest.raises(routes.NonFiniteDelta, match="tensor 1 "):
        routes.select_topk(passes, sources.TensorSource([], tuned), [0, 0], [7], route=route)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_samples_and_candidates_of_the_reference(backend, rng):
    with using(backend):
        passes = backends.resolve(DEVICE)
    initial, tuned = pairs_of("f32", "bf16", rng)
    tensors = torch.tensor([0, 1, 4, 5, 6, 7, 9, 9]), torch.tensor([0, 0, 1, 4094, 63, 4095, 0, 8749])
    wanted, found = torch.empty(8, reference.RUN, dtype=torch.int32), torch.empty(8, reference.RUN, dtype=torch.int32)
    Unpacked(reference).sample_keys(initial, tuned, *tensors, wanted)
    found = found.to(DEVICE)
    Unpacked(passes).sample_keys(moved(initial), moved(tuned), *(t.to(DEVICE) for t in tensors), found)
    assert torch.equal(found.cpu(), wanted)

    band = BandOutputs(Unpacked(reference).delta_band, initial, tuned, *BANDS["all that moved"], None, 1 << 20)
    layout = Layout(SELECTION_SIZES)
    of_tile = torch.arange(len(SELECTION_SIZES)).repeat_interleave(torch.tensor(layout.tile_offsets).diff())
    first_tile, first_word = torch.tensor(layout.tile_offsets)[of_tile], torch.tensor(layout.word_offsets)[of_tile]
    tile_words = first_word + WORDS_PER_TILE * (torch.arange(layout.tiles) - first_tile)
    of_tiles = band.keys, band.positions, band.offsets, band.inside, torch.tensor(SELECTION_GROUPS)[of_tile]
    low, cut = torch.tensor([1, 2, 900_000_000]), torch.tensor([970_000_000, 980_000_000, 990_000_000])
    results = []
    for chosen, device in ((Unpacked(reference), torch.device("cpu")), (Unpacked(passes), DEVICE)):
        on = [t.to(device) for t in of_tiles]
        at = [t.to(device) for t in (low, low + 90_000_000, torch.tensor([14, 15, 16]), cut, tile_words)]
        histogram = torch.zeros(3, 1 << 12, dtype=torch.int64, device=device)
        words = torch.zeros(layout.words, dtype=torch.int32, device=device)
        taken, ties = torch.full((2, layout.tiles), 77, device=device)
        chosen.candidate_histogram(*on, *at[:3], histogram)
        chosen.take_above(*on, at[3], words, at[4], taken, ties)
        chosen.take_ties(*on, at[3], words, at[4], ties // 2 + 1)
        results.append([t.cpu() for t in (histogram, words, taken, ties)])
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(found, wanted) and wanted.any()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_selection_waits_once(backend):
    """At its end; the tensors are large enough for the sampled route."""
    initial = [t.to(DEVICE) for t in random_weights({"a": (3000, 2000), "b": (70_001,)}).values()]
    tuned = [t + torch.randn_like(t) * 1e-3 for t in initial]
    with using(backend):
        ls.topk_delta(initial, tuned, 1_000_000)  # compiles
        with waits() as found:
            ls.topk_delta(initial, tuned, 1_000_000)
    assert len(found) == ON_GPU, [str(wait.message) for wait in found]


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_selection_beyond_32_bits(backend):
    """A tensor of more than 2^32 entries, most of them zero; the earliest of two equal ones is taken."""
    many = 1 << (32 if ON_GPU else 17)
    n = many + 70_000
    if ON_GPU and torch.cuda.mem_get_info()[0] < 4 * n:
        pytest.skip("needs 17 GB of free GPU memory")
    scores = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    places = [5, many // 2 + 1, many - 1, many, n - 1]
    scores[places] = torch.tensor([3.0, 1.0, 2.0, 1.0, 4.0], dtype=torch.bfloat16, device=DEVICE)
    with using(backend):
        (found,), thresholds = ls.topk_delta([], [scores], 4)
    assert found.k == 4 and thresholds.tolist() == [1.0]
    words = found.bitmap().cpu()
    at = words.nonzero().view(-1)
    bit = words[at].to(torch.int64) & 0xFFFFFFFF
    assert (32 * at + bit.double().log2().long()).tolist() == [place for place in places if place != many]


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_checkpoints_are_selected_on_the_gpu(backend, tmp_path, monkeypatch):
    """Through page-locked memory, piece by piece, tensor by tensor too; the ticket of the CPU."""
    initial = random_weights({"a": (700, 900), "b": (70_001,), "bias": (1,), "c": (3000, 64)})
    tuned = tuned_weights(initial, untouched_rows=0.6)
    tuned["c"] = tuned["c"].bfloat16()
    pair = tmp_path / "initial.safetensors", tmp_path / "tuned.safetensors"
    for path, side in zip(pair, (initial, tuned), strict=True):
        save_file(side, path)
    expected = ls.select(*pair, density=0.2, device="cpu")
    monkeypatch.setattr(sources, "_STAGED", TILE)
    for large in (selection.LARGE, 0):
        monkeypatch.setattr(selection, "LARGE", large)
        with using(backend):
            ticket = ls.select(*pair, density=0.2)
        assert ticket == expected and ticket.metadata == expected.metadata
        assert all(index_set.data.device.type == "cpu" for index_set in ticket.sets.values())
    in_memory = {name: tensor.to(DEVICE) for name, tensor in initial.items()}
    assert ls.select(in_memory, pair[1], density=0.2) == expected
