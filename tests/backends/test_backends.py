"""The door: an explicit backend obeys or raises, auto falls back and says why; every operator passes opcheck."""

import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.backends import ALL_BACKENDS, Unpacked, using
from helpers.selection_passes import BandOutputs

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.backends import capability, choice, compiled, cuda, reference, triton
from ltp_sparse.backends.arguments import RECORDS, Sampled, fields_of
from ltp_sparse.testing import random_weights, tuned_weights, update_problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    yield
    ls.use_backend(None)


@pytest.fixture
def no_extension(monkeypatch):
    """An installation without a compiler."""
    monkeypatch.setattr(compiled, "extension", lambda: "ltp_sparse._C is not built (no compiler)")
    monkeypatch.setattr(cuda, "extension", lambda: "ltp_sparse._C_cuda is not built (no compiler)")


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(triton, "kernels", lambda: "the Triton kernels cannot be imported (no triton)")


@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_explicit_backend_obeys(name, monkeypatch):
    """Contract 8."""
    ls.use_backend(name)
    assert backends.resolve(CPU).name == name
    ls.use_backend("auto")
    monkeypatch.setenv(backends.ENVIRONMENT, name)
    assert backends.resolve(CPU).name == name


def test_explicit_backend_that_is_missing_raises_with_the_reason(no_extension, no_kernels):
    """Contract 8."""
    for name, reason in (("compiled", "no compiler"), ("triton", "no triton")):
        with pytest.raises(backends.BackendUnavailable, match=reason):
            ls.use_backend(name)
    assert backends.resolve(CPU).name == "reference", "a refused choice must not stay"


def test_copies_on_a_gpu_without_triton_are_those_of_the_reference(no_kernels, monkeypatch):
    """CUDA has no kernels for them; whether it was chosen or not, they work on any device."""
    monkeypatch.setattr(cuda, "probe", lambda device: None)
    assert backends.resolve(CUDA, "masked_copy").name == "reference"
    ls.use_backend("compiled")
    chosen = backends.resolve(CUDA, "masked_copy")
    assert chosen.name == "compiled"
    for name in ("masked_gather_", "masked_scatter_", "masked_swap_"):
        assert getattr(chosen, name) is getattr(reference, name)


def test_explicit_backend_is_refused_where_it_cannot_serve_the_device(monkeypatch):
    monkeypatch.setattr(compiled, "extension", lambda: backends)  # any module: it is there
    monkeypatch.setattr(triton, "kernels", lambda: backends)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda, "extension", lambda: "ltp_sparse._C_cuda is not built (no nvcc)")
    meta = torch.device("meta")
    for name, device, reason in (
        ("compiled", CUDA, "no nvcc"),
        ("compiled", meta, "CPU and CUDA tensors, not meta"),
        ("triton", CPU, "TRITON_INTERPRET"),
    ):
        ls.use_backend(name)
        with pytest.raises(backends.BackendUnavailable, match=f"{name} was asked for.*{reason}"):
            backends.resolve(device)


def test_explicit_choice_by_environment_is_refused_in_the_call(no_extension, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "compiled")
    with pytest.raises(backends.BackendUnavailable, match="no compiler"):
        ls.topk_delta([], [torch.ones(3)], 1)


@pytest.mark.parametrize(
    ("found", "reason", "served"),
    [
        ((7, 5), None, "reference"),
        ((9, 0), "CUDA driver version is insufficient for CUDA runtime version", "triton"),
        ((9, 0), None, "compiled"),
    ],
    ids=["old device", "old driver", "fits"],
)
def test_what_a_gpu_is_too_old_for_is_not_taken(monkeypatch, found, reason, served):
    """Contract 8: found before the first launch, and checked once."""
    module, asked = ModuleType("ltp_sparse._C_cuda"), []
    module.probe = lambda: asked.append(1) or reason
    monkeypatch.setattr(cuda, "extension", lambda: module)
    monkeypatch.setattr(triton, "kernels", lambda: backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(choice, "preferred", lambda *_: ("compiled", "triton", "reference"))
    capability.too_old.cache_clear()
    try:
        assert backends.resolve(CUDA).name == backends.resolve(CUDA).name == served
        assert len(asked) == (found >= capability.NEEDED)
        told = ls.available_backends(CUDA)
        old = "its kernels need compute capability 8.0, this one has 7.5"
        assert told["triton"] == (old if found == (7, 5) else "ok")
        assert told["compiled"] == (old if found == (7, 5) else reason or "ok")
        if told["compiled"] != "ok":
            ls.use_backend("compiled")
            with pytest.raises(backends.BackendUnavailable, match=f"compiled was asked for.*{told['compiled']}"):
                backends.resolve(CUDA)
    finally:
        capability.too_old.cache_clear()


def test_auto_falls_back_and_says_why(no_extension, no_kernels):
    """Contract 8."""
    assert backends.resolve(CPU).name == backends.resolve(CUDA).name == "reference"
    assert backends.available_backends("cpu") == {
        "reference": "ok",
        "compiled": "ltp_sparse._C is not built (no compiler)",
        "triton": "the Triton kernels cannot be imported (no triton)",
    }
    sets, _ = ls.topk_delta([], [torch.tensor([1.0, 3.0, 2.0])], 1)
    assert sets[0].indices().tolist() == [1]


@pytest.fixture
def all_there(monkeypatch):
    """An installation that has everything, in names only."""
    for module, door in ((compiled, "extension"), (cuda, "extension"), (triton, "kernels")):
        monkeypatch.setattr(module, door, lambda: backends)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def served(device, row):
    op, dtype, density, _ = row
    return backends.resolve(device, op, getattr(torch, dtype), density).name


ROWS = [(device, row) for device, section in backends.choices().items() for row in section["rows"]]


@pytest.mark.parametrize(
    "device, row", ROWS, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part[:3]))
)
def test_auto_follows_the_table(device, row, all_there, monkeypatch):
    """Contract 8, per device, operation, dtype and density: the first of the row that is there."""
    device, order = torch.device(device), [*row[3], "reference"]
    assert served(device, row) == order[0]
    ls.use_backend("reference")
    assert served(device, row) == "reference", "an explicit choice is above the table"
    ls.use_backend("auto")
    missing = lambda: "it is not built"  # noqa: E731
    monkeypatch.setattr(compiled, "extension", missing)
    monkeypatch.setattr(cuda, "extension", missing)
    left = [name for name in order if name != "compiled"]
    assert served(device, row) == left[0], "a missing extension falls to the next"
    monkeypatch.setattr(triton, "kernels", missing)
    assert served(device, row) == "reference"


def test_the_table_is_whole_and_says_where_it_is_from():
    assert set(backends.choices()) == {"cpu", "cuda"}
    for device, section in backends.choices().items():
        assert section["source"]
        cells = [(op, dtype) for op, dtype, _, _ in section["rows"]]
        assert {*cells} == {
            (op, str(dtype).removeprefix("torch.")) for op in backends.OPERATIONS for dtype in backends.DTYPES
        }
        for *_, found in section["rows"]:
            assert {*found} <= {*backends.NAMES} and (device != "cpu" or "triton" not in found)
            assert not section["measured"] or list(found.values()) == sorted(found.values()), "the fastest first"
            assert section["measured"] or {*found.values()} == {None}, "no figure without a measurement"


def test_auto_takes_the_row_of_the_nearest_density(all_there, monkeypatch):
    rows = [
        ["masked_adamw_", "float32", 0.01, {"triton": 1.0, "compiled": 2.0}],
        ["masked_adamw_", "float32", 0.2, {"compiled": 1.0, "triton": 2.0}],
        ["topk_delta", "bfloat16", 0.2, {"reference": 1.0, "compiled": 2.0}],
    ]
    monkeypatch.setattr(choice, "choices", lambda: {"cuda": {"rows": rows}})
    choice._orders.cache_clear()
    try:
        for density, name in ((0, "triton"), (0.04, "triton"), (0.05, "compiled"), (1, "compiled")):
            assert backends.resolve(CUDA, "masked_adamw_", torch.float32, density).name == name
        assert backends.resolve(CUDA, "masked_adamw_", torch.float16, 0.01).name == "triton", "a dtype without rows"
        assert backends.resolve(CUDA, "topk_delta").name == "reference"
        assert backends.resolve(torch.device("meta")).name == "reference"
    finally:
        choice._orders.cache_clear()


def test_operations_say_what_they_are_called_with(monkeypatch):
    asked = []
    resolve = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda device, *args, **kw: asked.append((args, kw)) or resolve(device))
    problem = update_problem({"a": (40, 5)}, density=0.3, dtype=torch.bfloat16, stochastic=True)
    problem.step()
    assert (("masked_adamw_", torch.bfloat16, 0.3), {}) in asked
    ls.topk_delta([], [torch.ones(8, dtype=torch.float16)], 2)
    assert (("topk_delta", torch.float16, 0.25), {}) in asked


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected one of auto, reference, compiled, triton, got 'cuda'"):
        ls.use_backend("cuda")
    monkeypatch.setenv(backends.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match="LTP_SPARSE_BACKEND.*got 'gpu'"):
        backends.resolve(CPU)


def test_module_prints_versions_and_the_table_with_reasons(no_kernels, capsys):
    runpy.run_module("ltp_sparse", run_name="__main__")
    printed = capsys.readouterr().out
    assert ls.__version__ in printed and torch.__version__ in printed
    for line in ("reference  ok", "triton     the Triton kernels cannot be imported (no triton)", "<- used"):
        assert line in printed
    assert f"auto's choice, measured ({backends.choices()['cpu']['source']})" in printed


def test_module_tells_an_order_that_was_not_measured(all_there, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "isa", lambda: None)
    section = {**backends.choices()["cuda"], "measured": False, "source": "computed", "rows": [
        ["masked_adamw_", "float32", 0.05, {"triton": None, "compiled": None}],
        ["masked_adamw_", "float32", 0.2, {"compiled": None, "triton": None}],
        ["topk_delta", "float32", 0.2, {"compiled": None, "triton": None}],
    ]}  # fmt: skip
    for module in (choice, backends):
        monkeypatch.setattr(module, "choices", lambda: {"cpu": section, "cuda": section})
    choice._orders.cache_clear()
    try:
        runpy.run_module("ltp_sparse", run_name="__main__")
    finally:
        choice._orders.cache_clear()
    printed = capsys.readouterr().out
    assert "auto's choice, not measured (computed)" in printed
    assert "masked_adamw_  float32: triton to 0.05, compiled to 0.2" in printed
    assert "topk_delta     float32: compiled" in printed


def test_module_says_why_an_explicit_choice_cannot_serve(monkeypatch, capsys, no_extension):
    monkeypatch.setenv(backends.ENVIRONMENT, "compiled")
    runpy.run_module("ltp_sparse", run_name="__main__")
    printed = capsys.readouterr().out
    assert "compiled was asked for and cannot serve cpu" in printed and "chosen by hand: compiled" in printed
    assert "<- used" not in printed


def test_module_says_what_a_mistyped_choice_could_be(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "gpu")
    with pytest.raises(SystemExit, match="ltp_sparse: LTP_SPARSE_BACKEND: expected one of auto, reference.* got 'gpu'"):
        runpy.run_module("ltp_sparse", run_name="__main__")


# --- contract 9: every operator is registered with torch.library, with schema, fake and mutation declared ---


PRECISIONS = {
    "float32": {},
    "8bit-master": {"dtype": torch.float16, "states": "8bit", "master": True},
    "stochastic": {"dtype": torch.bfloat16, "stochastic": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_opcheck_masked_adamw(backend, precision, packed):
    problem = update_problem({"a": (40, 7), "b": (90,), "c": (5,)}, density=0.3, **precision)
    table, k = problem.table, problem.table.k
    index = (table.tiles, table.words, table.with_ranks().ranks, table.positions)
    anchor = torch.zeros(k) if packed else None
    grads = [torch.ones(k)] if packed else [problem.grads[0], None, problem.grads[2]]
    state = (problem.exp_avg, problem.exp_avg_sq, problem.scales)
    rest = (problem.master, *index, problem.coefficients, anchor)
    operators = torch.ops.ltp_sparse
    with using(backend):
        update = (problem.params, grads, *state, *rest, problem.stochastic, packed)
        torch.library.opcheck(operators.masked_adamw_.default, update)
        torch.library.opcheck(operators.masked_sum_squares.default, (problem.params, grads, *rest, packed))
        torch.library.opcheck(operators.masked_pack_.default, (problem.grads, torch.zeros(k), *index, packed))


@pytest.mark.parametrize("backend", [p for p in ALL_BACKENDS if p.values == ("triton",)])
def test_operator_refuses_a_table_without_the_ranks_that_a_kernel_reads(backend):
    problem = update_problem({"a": (40, 7)}, density=0.3)
    params, grads, exp_avg, exp_avg_sq, table, coefficients = problem.args()
    index = (table.tiles, table.words, table.ranks, table.positions)
    with using(backend):
        with pytest.raises(ValueError, match="the triton backend needs a table with ranks"):
            torch.ops.ltp_sparse.masked_adamw_(
                params, grads, exp_avg, exp_avg_sq, None, None, *index, coefficients, None, False, False
            )
        with pytest.raises(ValueError, match="the triton backend needs a table with ranks"):
            torch.ops.ltp_sparse.masked_sum_squares(params, grads, None, *index, coefficients, None, False)
        ls.masked_adamw_(*problem.args())
    assert bool(exp_avg.any()), "the functional door brings the ranks itself"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_opcheck_topk_delta(backend):
    initial = random_weights({"a": (30, 9), "b": (70,)})
    tuned = list(tuned_weights(initial).values())
    with using(backend):
        for before in (list(initial.values()), []):
            torch.library.opcheck(torch.ops.ltp_sparse.topk_delta.default, (before, tuned, [0, 1], [100, 9]))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_bounds_beyond_all_keys(backend):
    """No key is above 2^31 - 1, that of a NaN: a bound of 2^31 or more means that all are below it."""
    tuned = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)]
    for bound in (2**31, 2**31 + 5, 2**62):
        with using(backend):
            band = BandOutputs(
                Unpacked(backends.resolve(CPU)).delta_band, [], tuned, [1], [bound], None, 10, groups=[0, 0]
            )
        assert (band.above.tolist(), band.inside.tolist(), band.nonfinite.item()) == ([0, 0], [2, 1], 1)


def test_every_operator_is_checked_above():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ltp_sparse::")}
    copies = {"masked_gather_", "masked_scatter_", "masked_swap_"}  # test_masked_copy.py
    assert defined == {"masked_adamw_", "masked_sum_squares", "masked_pack_", "topk_delta"} | copies


def test_the_compiled_modules_read_every_field_by_its_name():
    csrc = Path(__file__).parents[2] / "csrc"
    text = "".join(path.read_text() for path in [*csrc.glob("bindings*.cpp"), *csrc.rglob("*.h")])
    fields = {name for record in (*RECORDS.values(), Sampled) for name in fields_of(record)}
    assert {name for name in fields if f'"{name}"' not in text} == set()
