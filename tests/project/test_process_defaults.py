"""The default dtype and device of the process, which training scripts set, change no bit and no place."""

import ast
from pathlib import Path

import pytest
import torch
from helpers.bits import same_bits
from torch import nn

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket

ROOT = Path(__file__).parents[2]
MAKERS = {
    *("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "randperm", "linspace"),
    *("logspace", "eye", "as_tensor", "scalar_tensor"),
}
EXEMPT = {
    # rows of a new module follow the defaults, as the layers of nn beside them do
    "ltp_sparse/models/causal_prompt.py": 1,
    "ltp_sparse/models/prefix.py": 1,
    "ltp_sparse/models/soft_masks.py": 1,
    "ltp_sparse/models/prompt_encoder.py": 1,
    # a number or a tensor on whatever device
    "ltp_sparse/models/masked_losses.py": 1,
}


@pytest.mark.usefixtures("source_tree")
def test_every_tensor_is_made_with_a_dtype_and_a_device():
    found: dict[str, list[int]] = {}
    for folder in (ROOT / "ltp_sparse", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if ast.unparse(node.func.value) != "torch" or node.func.attr not in MAKERS:
                    continue
                if not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
                    found.setdefault(str(path.relative_to(ROOT)), []).append(node.lineno)
    extra = {path: lines for path, lines in found.items() if len(lines) != EXEMPT.get(path, 0)}
    assert not extra and found.keys() == EXEMPT.keys()


def build(dtype):
    with torch.device("cpu"):
        torch.manual_seed(0)
        kept = {"dtype": torch.float32}
        layers = [nn.Embedding(9, 6, **kept), nn.Linear(6, 6, **kept), nn.Linear(6, 2, **kept)]
        generator = torch.Generator().manual_seed(1)
        for layer in layers:
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        return nn.Sequential(*layers).to(dtype)


IDS = torch.arange(9)
MODES = {
    "dense": {},
    "packed": {"gradients": "packed"},
    "8bit": {"states": "8bit"},
    "clip": {"max_grad_norm": 0.1, "gradients": "packed"},
    "pull": {"pull": 1e-3},
    "stochastic": {"rounding": "stochastic"},
    "own": None,
}


def train(mode, dtype):
    model = build(dtype)
    ticket = Ticket.random(model, density=0.5, seed=1)
    if mode == "own":
        packed = ls.PackedParameters(model, ticket)
        optimizer = packed.attach(torch.optim.AdamW(packed.parameters(), lr=0.05))
    else:
        optimizer = MaskedAdamW(model, ticket, lr=0.05, **MODES[mode])
    for _ in range(4):
        optimizer.zero_grad()
        model(IDS).float().square().sum().backward()
        if mode == "packed":
            optimizer.clip_grad_norm_(0.3)
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
    if mode != "own":
        optimizer.load_state_dict(optimizer.state_dict())
    return list(model.parameters())


def round_trip(folder, dtype):
    model, tuned = build(dtype), build(dtype)
    with torch.no_grad():
        tuned[1].weight.mul_(1.5)
    ticket = ls.select(model, tuned, k=5)
    ls.SparseDelta.between(model, tuned, ticket).save(folder / "delta.safetensors")
    ticket.save(folder / "ticket.safetensors")
    assert Ticket.load(folder / "ticket.safetensors") == ticket
    ls.SparseDelta.load(folder / "delta.safetensors").apply(model)
    ls.verify_frozen(ls.frozen_digests(model, ticket), model, ticket)
    ls.memory_report(model, ticket)
    masks = {name: ticket.mask(name) for name in ticket.names}
    assert Ticket.from_masks(masks) == ticket
    return [*model.parameters(), *masks.values()]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(default, dtype, tmp_path):
    wanted = {mode: train(mode, dtype) for mode in MODES}
    files = round_trip(tmp_path, dtype)
    torch.set_default_dtype(default)
    try:
        found = {mode: train(mode, dtype) for mode in MODES}
        again = round_trip(tmp_path, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    for mode in MODES:
        assert all(map(same_bits, wanted[mode], found[mode])), mode
    assert all(map(torch.equal, files, again))


def test_the_default_device_changes_nothing(tmp_path):
    wanted = {mode: train(mode, torch.float32) for mode in MODES}
    files = round_trip(tmp_path, torch.float32)
    torch.set_default_device("meta")  # stands for a GPU: nothing can be read from it
    try:
        found = {mode: train(mode, torch.float32) for mode in MODES}
        again = round_trip(tmp_path, torch.float32)
    finally:
        torch.set_default_device(None)
    for mode in MODES:
        assert all(map(same_bits, wanted[mode], found[mode])), mode
    assert all(map(torch.equal, files, again))


@pytest.mark.slow
def test_deterministic_algorithms_change_nothing():
    wanted = {mode: train(mode, torch.float32) for mode in MODES}
    torch.use_deterministic_algorithms(True)
    try:
        found = {mode: train(mode, torch.float32) for mode in MODES}
    finally:
        torch.use_deterministic_algorithms(False)
    for mode in MODES:
        assert all(map(same_bits, wanted[mode], found[mode])), mode
