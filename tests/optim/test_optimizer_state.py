"""Loading an optimizer's state: all of it or nothing, and through torch.distributed.checkpoint."""

import copy

import pytest
import torch
from helpers.bits import same_bits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ltp_sparse import MaskedAdamW, Ticket

MODES = {
    "float32": {},
    "packed": {"gradients": "packed"},
    "8bit": {"states": "8bit"},
    "8bit-packed": {"states": "8bit", "gradients": "packed"},
    "master": {"master": True},
    "pull": {"pull": 1e-3},
}


def build(mode, steps=3, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"body": nn.Linear(30, 40), "head": nn.Linear(40, 3)})
    if mode == "master":
        model = model.bfloat16()
    ticket = Ticket.random(model, density=0.5, seed=1).restrict(["body"])
    optimizer = MaskedAdamW(model, ticket, lr=1e-2, dense=model["head"], **MODES[mode])
    for step in range(steps):
        train(model, optimizer, step)
    return model, optimizer


def train(model, optimizer, step):
    dtype = model["head"].weight.dtype
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(step)).to(dtype)
    model["head"](model["body"](x).tanh()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(optimizer):
    state = optimizer.state_dict(include_gradients=True)
    found = {f"{i}.{key}": value.clone() for i, entry in state["state"].items() for key, value in entry.items()}
    for launch in optimizer._launches:
        found[f"hyper.{id(launch)}"] = launch.hyper.clone()
    return found, copy.deepcopy(state["param_groups"])


def assert_same_contents(a, b):
    assert a[0].keys() == b[0].keys() and a[1] == b[1]
    for key in a[0]:
        assert a[0][key].dtype == b[0][key].dtype and torch.equal(a[0][key], b[0][key]), key


# --- torch.distributed.checkpoint ---


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("mode", MODES)
def test_the_state_goes_through_distributed_checkpoints(mode, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = build(mode)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin, other = build(mode, steps=1)
    twin.load_state_dict(model.state_dict())
    other.param_groups[0]["lr"] = 7.0
    set_optimizer_state_dict(twin, other, state, options=options)
    assert other.param_groups[0]["lr"] == 1e-2
    for step in (3, 4):
        train(model, optimizer, step)
        train(twin, other, step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(p, q)


def test_another_ticket_is_refused_through_distributed_checkpoints():
    model, optimizer = build("float32")
    state = get_optimizer_state_dict(model, optimizer)
    ticket = Ticket.random(model, density=0.5, seed=2).restrict(["body"])
    other = MaskedAdamW(model, ticket, dense=model["head"])
    with pytest.raises(ValueError, match="saved for another ticket"):
        set_optimizer_state_dict(model, other, state)


# --- validation ---

STATES = {
    "no-second-moment": (lambda e: e.pop("exp_avg_sq"), "'exp_avg_sq' is missing"),
    "no-first-moment": (lambda e: e.pop("exp_avg"), "'exp_avg' is missing"),
    "no-step": (lambda e: e.pop("step"), "'step' is missing"),
    "nothing": (lambda e: e.clear(), "'step' is missing"),
    "nan": (lambda e: e["exp_avg"].view(-1)[-1:].fill_(float("nan")), "'exp_avg' must be finite"),
    "inf": (lambda e: e["exp_avg_sq"].view(-1)[-1:].fill_(float("inf")), "'exp_avg_sq' must be finite"),
    "negative": (lambda e: e["exp_avg_sq"].view(-1)[-1:].fill_(-1e-9), "'exp_avg_sq' must not be negative"),
    "negative-step": (lambda e: e["step"].fill_(-1), "'step' must be a whole number, at least 0, got -1"),
    "half-step": (lambda e: e["step"].fill_(1.5), "'step' must be a whole number"),
    "nan-step": (lambda e: e["step"].fill_(float("nan")), "'step' must be finite"),
    "dtype": (lambda e: e.update(exp_avg=e["exp_avg"].double()), "'exp_avg' must be torch.float32"),
    "shape": (lambda e: e.update(exp_avg_sq=e["exp_avg_sq"][:-1]), "'exp_avg_sq' of shape .* does not fit"),
    "bool-step": (lambda e: e.update(step=torch.tensor(True)), "'step' must be a whole number, got torch.bool"),
    "endless-step": (lambda e: e["step"].fill_(1e38), "'step' must be a whole number"),
    "no-steps": (lambda e: e["step"].fill_(0), "'step' is 0, but the moments are not"),
    "zero-moment": (lambda e: e["exp_avg_sq"].zero_(), "'exp_avg_sq' is 0 where 'exp_avg' is not"),
    "meta": (lambda e: e.update(exp_avg=e["exp_avg"].to("meta")), "'exp_avg' cannot be read"),
    "list": (lambda e: e.update(exp_avg=[0.0]), "'exp_avg' must be a tensor, got list"),
    "unknown": (lambda e: e.update(momentum=e["exp_avg"]), "'momentum' is unknown"),
    "half-coded": (lambda e: e.update(scales=torch.zeros(1, 2)), "'scales' of shape|'exp_avg' must be torch.int8"),
}


@pytest.mark.parametrize("entry", [1, 3])
@pytest.mark.parametrize(("change", "message"), STATES.values(), ids=STATES)
def test_impossible_states_are_refused_by_key_and_parameter(change, message, entry):
    _, optimizer = build("float32")
    _, other = build("float32", steps=1)
    before = contents(other)
    state = copy.deepcopy(optimizer.state_dict())
    change(state["state"][entry])
    name = ["body.bias", "body.weight", "head.weight", "head.bias"][entry]
    with pytest.raises(ValueError, match=f"the state of '{name}': .*({message})"):
        other.load_state_dict(state)
    assert_same_contents(before, contents(other))


GROUPS = {
    "betas": (lambda s: s["param_groups"][0].update(betas=(2, 2)), r"betas must be in \[0, 1\)"),
    "one-beta": (lambda s: s["param_groups"][0].update(betas=(0.9,)), r"betas must be in \[0, 1\)"),
    "nan-beta": (lambda s: s["param_groups"][0].update(betas=(0.9, float("nan"))), r"betas must be in \[0, 1\)"),
    "lr": (lambda s: s["param_groups"][1].update(lr=-1.0), "lr must be at least 0, got -1"),
    "nan-lr": (lambda s: s["param_groups"][1].update(lr=float("nan")), "lr must be at least 0, got nan"),
    "eps": (lambda s: s["param_groups"][0].update(eps=-1e-8), "eps must be at least 0"),
    "decay": (lambda s: s["param_groups"][0].update(weight_decay=-0.1), "weight_decay must be at least 0"),
    "no-lr": (lambda s: s["param_groups"][1].pop("lr"), "parameter group 1 of the state has no 'lr'"),
    "pull": (lambda s: s["param_groups"][0].update(pull=0.1), "the state is of an optimizer with a pull"),
    "fewer": (lambda s: s["param_groups"].pop(), "parameter groups of"),
    "parameters": (lambda s: s["param_groups"][1]["params"].pop(), "parameter groups of"),
    "no-groups": (lambda s: s.pop("param_groups"), "no 'param_groups'"),
    "no-state": (lambda s: s.pop("state"), "no 'state'"),
    "true-lr": (lambda s: s["param_groups"][1].update(lr=True), "lr must be at least 0, got True"),
    "maximize": (lambda s: s["param_groups"][0].update(maximize="no"), "maximize must be True or False, got no"),
    "no-list": (lambda s: s.update(param_groups=None), "'param_groups' is a NoneType"),
    "no-mapping": (lambda s: s.update(state=[]), "'state' is a list"),
    "no-params": (lambda s: s["param_groups"][0].pop("params"), "parameter group 0 of the state has no list of"),
    "no-version": (lambda s: s.update(ltp_sparse=None), "must be a mapping with a version"),
    "no-entry": (lambda s: s["state"].update({1: [0]}), "the state of 'body.weight' must be a mapping, got list"),
    "stranger": (lambda s: s["state"].update({9: {}}), "holds 9, which is in none of its parameter groups"),
    "one-missing": (lambda s: s["state"].pop(2), "the state of 'head.weight': 'step' is missing"),
}


@pytest.mark.parametrize(("change", "message"), GROUPS.values(), ids=GROUPS)
def test_impossible_groups_are_refused(change, message):
    _, optimizer = build("float32")
    _, other = build("float32", steps=1)
    before = contents(other)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert_same_contents(before, contents(other))


def test_a_state_with_a_pull_brings_the_values_it_draws_to():
    _, optimizer = build("pull")
    _, other = build("pull", steps=1)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]["anchor"]
    with pytest.raises(ValueError, match="the state of 'body.weight': 'anchor' is missing"):
        other.load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
def test_no_state_is_that_of_a_new_optimizer(mode):
    model, optimizer = build(mode)
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": {}})
    for entry in optimizer.state.values():
        assert float(entry["step"]) == 0 and not entry["exp_avg"].any() and not entry["exp_avg_sq"].any()
    if mode in ("float32", "master"):
        twin, new = build(mode, steps=0)
        twin.load_state_dict(model.state_dict())
        new.load_state_dict({**new.state_dict(), "state": {}})
        for step in (5, 6):
            train(model, optimizer, step)
            train(twin, new, step)
        assert all(map(same_bits, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("mode", MODES)
def test_a_failure_at_any_write_changes_nothing(mode, error, monkeypatch):
    _, optimizer = build(mode)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    _, other = build(mode, steps=1)
    before, state, groups = contents(other), other.state, other.param_groups
    real, writes = torch.Tensor.copy_, []

    def failing(at):
        def copy_(self, *args, **kwargs):
            writes.append(1)
            if len(writes) == at:
                raise error("stopped")
            return real(self, *args, **kwargs)

        return copy_

    done = 0
    for at in range(1, 200):
        writes.clear()
        monkeypatch.setattr(torch.Tensor, "copy_", failing(at))
        try:
            other.load_state_dict(copy.deepcopy(saved))
            break
        except error:
            done += 1
        finally:
            monkeypatch.undo()
        assert_same_contents(before, contents(other))
        assert other.state is state and other.param_groups is groups
    assert done >= 12 and other.param_groups[0]["lr"] == 0.5
    assert_same_contents(
        (contents(other)[0], None), ({**contents(other)[0], **{k: v for k, v in contents(optimizer)[0].items()
         if not k.startswith(("hyper", "rows"))}}, None)
    )  # fmt: skip
