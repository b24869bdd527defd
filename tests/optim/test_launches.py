"""What a step costs besides its kernels: launches, Python calls, checks; and what the prepared rows hold."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.bits import bits
from torch import nn
from torch.overrides import TorchFunctionMode

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.backends import addresses, checks, choice, compiled, cuda, reference
from ltp_sparse.backends.coefficients import Coefficient
from ltp_sparse.testing import xlmr_shapes

COMPILED = pytest.mark.skipif(compiled.probe(torch.device("cpu")) is not None, reason="needs the compiled extension")


class Wide(nn.Module):
    """The tensors of XLM-R, small."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, shape in enumerate(xlmr_shapes().values()):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.randn([min(size, 16) for size in shape], dtype=dtype))
            self.add_module(f"layer{number}", layer)


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


class Recorder:
    """The compiled CUDA module as far as `cuda.py` knows it, which notes what is launched."""

    def __init__(self) -> None:
        self.launches: list[str] = []

    def __getattr__(self, name: str):
        return lambda *arguments: self.launches.append(name)


class Computing(TorchFunctionMode):
    """Notes the functions of torch that compute or copy: each would be a launch of its own on a GPU."""

    HARMLESS = (
        "empty", "new_empty", "__get__", "__len__", "__getitem__", "data_ptr", "numel", "size", "dim", "stride", "view",
        "get_device", "is_contiguous", "is_same_size", "is_inference", "is_floating_point",
        "_set_grad_enabled",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name not in self.HARMLESS and "ecord" not in str(function):  # torch's wrapper of step, for its profiler
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recorder(monkeypatch):
    """CPU tensors are served by the backend for CUDA, whose launches are noted only."""
    module = Recorder()
    monkeypatch.setattr(cuda, "extension", lambda: module)
    monkeypatch.setattr(cuda, "probe", lambda device: None)
    monkeypatch.setattr(choice, "_module", lambda name, device: {"compiled": cuda, "reference": reference}[name])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    backends.use_backend("compiled")
    choice._backend.cache_clear()
    yield module
    backends.use_backend(None)
    choice._backend.cache_clear()


@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["plain", "clip"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.bfloat16, {"states": "8bit", "pull": 0.01}),
    ],
    ids=["float32", "float16-master", "bfloat16-stochastic", "bfloat16-8bit-pull"],
)
def test_a_step_is_two_launches_and_three_with_clipping(recorder, dtype, options, max_norm):
    model = Wide(dtype)
    optimizer = ls.MaskedAdamW(model, ls.Ticket.random(model, density=0.3), max_grad_norm=max_norm, **options)
    wanted = ["prepare_step", *(["gradient_norm"] if max_norm else []), "masked_adamw_"]
    for number in range(3):
        give_gradients(model, number)
        recorder.launches.clear()
        with Computing() as computing:
            optimizer.step()
        assert recorder.launches == wanted
        if number:  # the first also writes which parameters have gradients
            assert computing.seen == []
    optimizer.param_groups[0]["lr"] = 1e-4  # as a scheduler does: one copy
    give_gradients(model)
    with Computing() as computing:
        optimizer.step()
    assert set(computing.seen) <= {"tensor", "copy_"} and computing.seen.count("copy_") == 1


def test_small_gradients_of_a_backward_are_one_launch_and_a_large_one_its_own(recorder):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8200), nn.Linear(8200, 8))
    optimizer = ls.MaskedAdamW(model, ls.Ticket.random(model, density=0.5), gradients="packed")
    for times in (1, 2):  # a further micro-batch adds
        recorder.launches.clear()
        model(torch.ones(2, 8)).sum().backward()
        assert recorder.launches == ["masked_pack_"] * 2 + ["prepare_pack", "masked_pack_"], times
    recorder.launches.clear()
    optimizer.step()
    assert recorder.launches == ["prepare_step", "masked_adamw_"]


def calls_of(run):
    """How many Python functions are called."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@COMPILED
def test_the_python_of_a_backward_hook():
    """Counted, not timed: calls of Python functions per parameter, of which 400 are packed at a time; and of a step."""
    model = nn.ParameterList(nn.Parameter(torch.ones(8, 16)) for _ in range(400))
    optimizer = ls.MaskedAdamW(model, ls.Ticket.random(model, density=0.3), gradients="packed")
    for _ in range(2):
        first, further = (sum((2.0 * p).sum() for p in model) for _ in range(2))
        assert calls_of(first.backward) < 48 * 400
        assert calls_of(further.backward) < 48 * 400
        of_step = calls_of(optimizer.step)
        optimizer.zero_grad()
    assert of_step < 4 * 400


@COMPILED
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["plain", "clip"])
def test_the_python_of_a_step_does_not_grow_with_the_tensors(monkeypatch, max_norm):
    """Counted, not timed: calls of Python functions, and looks at whole records."""
    looks = []
    for name in ("_check_gradients", "_check_state", "table_facts"):
        original = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *a, name=name, original=original: looks.append(name) or original(*a))
    with_backend("compiled")
    try:
        model = Wide()
        optimizer = ls.MaskedAdamW(model, ls.Ticket.random(model, density=0.3), max_grad_norm=max_norm)
        for number in range(3):
            give_gradients(model, number)
            looks.clear()
            calls = calls_of(optimizer.step)
            assert sorted(set(looks)) == ([] if number else ["_check_gradients", "_check_state", "table_facts"])
            assert len(looks) == len(set(looks))
        assert calls < 147
    finally:
        with_backend(None)


def with_backend(name):
    backends.use_backend(name)


@COMPILED
@pytest.mark.parametrize("wrong", ["dtype", "shape", "strided", "sparse", "device"])
def test_a_gradient_that_became_wrong_is_seen_after_good_steps(wrong):
    model = Wide()
    optimizer = ls.MaskedAdamW(model, ls.Ticket.random(model, density=0.3), lr=0.1)
    other = Wide()
    theirs = ls.MaskedAdamW(other, ls.Ticket.random(other, density=0.3), lr=0.1)
    for number in range(3):
        for m, o in ((model, optimizer), (other, theirs)):
            give_gradients(m, number)
            o.step()
    param = max(model.parameters(), key=lambda p: p.numel())
    give_gradients(model, 9)
    give_gradients(other, 9)
    good = param.grad
    if wrong == "strided":  # which is no mistake: it is read through a copy
        param.grad = good.t().contiguous().t()
        optimizer.step()
        theirs.step()
        for mine, own in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, own)
        return
    bad = {"sparse": good.to_sparse, "device": lambda: good.to("meta")}.get(wrong)
    before = [p.clone() for p in model.parameters()]
    if bad is not None:
        try:
            param.grad = bad()
        except RuntimeError:
            pytest.skip("torch itself refuses such a gradient")
    else:
        param.grad.data = good.double() if wrong == "dtype" else good[:2].clone()
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@COMPILED
@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_coefficients_are_those_of_the_reference(scaled):
    made = []
    for name in ("compiled", "reference"):
        with_backend(name)
        try:
            model = Wide(torch.bfloat16)
            optimizer = ls.MaskedAdamW(
                model, ls.Ticket.random(model, density=0.3), rounding="stochastic", seed=2**40 + 5
            )
            for number in range(4):
                give_gradients(model, number)
                next(model.parameters()).grad = None
                if scaled:
                    optimizer.found_inf = torch.tensor(float(number == 1))
                    optimizer.grad_scale = torch.tensor(3.0)
                optimizer.step()
            (launch,) = optimizer._launches
            made.append((launch.coefficients.clone(), launch.steps.clone(), [bits(p) for p in model.parameters()]))
        finally:
            with_backend(None)
    (rows, steps, weights), (their_rows, their_steps, their_weights) = made
    assert torch.equal(steps, their_steps) and steps.tolist()[:2] == [0.0, 3.0 if scaled else 4.0]
    assert torch.equal(rows.float(), their_rows.float())
    assert torch.equal(rows[:, Coefficient.ROUNDING_KEY], their_rows[:, Coefficient.ROUNDING_KEY])
    assert all(map(torch.equal, weights, their_weights))


def test_no_address_is_first_seen_while_a_graph_is_captured(monkeypatch):
    """With `to` as on a CPU: what would be copied to a GPU."""
    stream = SimpleNamespace(record_event=lambda: "event", wait_event=lambda event: waited.append(event))
    waited, capturing = [], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    addresses._tables.clear()
    device = torch.device("cuda:0")
    table = addresses.address_table((1, 2), device)
    assert addresses.address_table((1, 2), device) is table and not waited
    stream = SimpleNamespace(record_event=lambda: "other", wait_event=lambda event: waited.append(event))
    assert addresses.address_table((1, 2), device) is table and waited == ["event"]
    capturing[0] = True
    assert addresses.address_table((1, 2), device) is table and waited == ["event"]
    with pytest.raises(RuntimeError, match="take a step on the same tensors before capturing"):
        addresses.address_table((1, 3), device)
    addresses._tables.clear()
    addresses._captured.clear()
