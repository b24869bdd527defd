"""The table of wrong calls: what someone may write at first, and what the message tells to write."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ltp_sparse as ls
from ltp_sparse import MaskedAdamW, Ticket


def build(**options):
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(9, 4, **options), "body": nn.Linear(4, 6), "head": nn.Linear(6, 2)})


def ticket_of(model):
    return Ticket.random(model, density=0.5, seed=0).restrict(["embed", "body"])


def frozen():
    model = build()
    model["body"].weight.requires_grad_(False)
    return model


def delta_of(model):
    tuned = build()
    with torch.no_grad():
        tuned["body"].weight.add_(1)
    return ls.SparseDelta.between(model, tuned, ticket_of(model))


def wrapped_as_peft_does(model):
    """The names of a model after get_peft_model with a layer replaced: weight -> base_layer.weight."""
    layer = nn.Module()
    layer.base_layer, layer.lora_A = model["body"], nn.Linear(4, 2, bias=False)
    model["body"] = layer
    return model


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)


def another_shape():
    return ticket_of(nn.ModuleDict({"embed": nn.Embedding(9, 4), "body": nn.Linear(4, 7)}))


def non_leaf():
    model = build()
    return {"body.weight": model["body"].weight * 2}


M = MaskedAdamW
# call with a model and its ticket, exception, words of the message
CALLS = {
    "parameters": (lambda m, t: M(m.parameters(), t), TypeError, ["expected the model", "got a generator", "names"]),
    "list": (lambda m, t: M(list(m.parameters()), t), TypeError, ["got a list", "dict(model.named_parameters())"]),
    "groups": (lambda m, t: M([{"params": m.parameters()}], t), TypeError, ["without names", '"model": model']),
    "state-dict-values": (lambda m, t: M(None, t), TypeError, ["expected the model", "got a NoneType"]),
    "ticket-path": (lambda m, t: M(m, "en.safetensors"), TypeError, ["expected a Ticket", "Ticket.load('en.saf"]),
    "ticket-Path": (lambda m, t: M(m, Path("a/b")), TypeError, ["expected a Ticket", "Ticket.load('a/b')"]),
    "ticket-delta": (lambda m, t: M(m, delta_of(m)), TypeError, ["got a SparseDelta", "pass its .ticket"]),
    "ticket-masks": (lambda m, t: M(m, {"a": torch.ones(3)}), TypeError, ["got a dict", "Ticket.from_masks"]),
    "ticket-none": (lambda m, t: M(m, None), TypeError, ["got a NoneType", "ltp_sparse.select"]),
    "ticket-and-model": (lambda m, t: M(t, m), TypeError, ["expected the model", "got a Ticket"]),
    "own-path": (lambda m, t: ls.PackedParameters(m, "x.safetensors"), TypeError, ["PackedParameters", "Ticket.load"]),
    "own-parameters": (lambda m, t: ls.PackedParameters(m.parameters(), t), TypeError, ["expected the model"]),
    "freeze-path": (lambda m, t: ls.optim.freeze(m, "x"), TypeError, ["freeze: expected a Ticket"]),
    "digests-path": (lambda m, t: ls.frozen_digests(m, "x"), TypeError, ["frozen_digests: expected a Ticket"]),
    "shape": (lambda m, t: M(m, another_shape()), ValueError, ["'body.", "select the ticket on this model"]),
    "names": (lambda m, t: M(m["body"], t), ValueError, ["of the ticket", "closest there"]),
    "before-peft": (lambda m, t: M(wrapped_as_peft_does(m), t), ValueError, ["'body.", "body.base_layer"]),
    "dense-name": (lambda m, t: M(m, t, dense="head"), TypeError, ["dense must be", "got a str", "dense=model."]),
    "dense-names": (lambda m, t: M(m, t, dense=["head"]), TypeError, ["dense must be", "got str"]),
    "dense-dict": (lambda m, t: M(m, t, dense={"params": [m["head"].weight]}), TypeError, ["a list of parameter gro"]),
    "dense-none": (lambda m, t: M(m, t, dense=None), TypeError, ["dense must be", "got a NoneType"]),
    "dense-mixture": (lambda m, t: M(m, t, dense=[m["head"].weight, {}]), TypeError, ["not a mixture", "dict"]),
    "dense-number": (lambda m, t: M(m, t, dense=3), TypeError, ["dense must be", "got a int"]),
    "dense-twice": (
        lambda m, t: M(m, t, dense=m["body"], gradients="packed"), ValueError, ["both in the ticket and in dense"],
    ),
    "lr": (lambda m, t: M(m, t, lr=-1e-3), ValueError, ["lr must be at least 0, got -0.001"]),
    "lr-nan": (lambda m, t: M(m, t, lr=float("nan")), ValueError, ["lr must be at least 0, got nan"]),
    "lr-text": (lambda m, t: M(m, t, lr="2e-5"), ValueError, ["lr must be at least 0, got 2e-5"]),
    "betas": (lambda m, t: M(m, t, betas=(2, 2)), ValueError, ["betas must be in [0, 1)", "(2, 2)"]),
    "betas-number": (lambda m, t: M(m, t, betas=0.9), ValueError, ["betas must be in [0, 1)", "0.9"]),
    "eps": (lambda m, t: M(m, t, eps=-1), ValueError, ["eps must be at least 0"]),
    "decay": (lambda m, t: M(m, t, weight_decay=-1), ValueError, ["weight_decay must be at least 0"]),
    "norm": (lambda m, t: M(m, t, max_grad_norm=0), ValueError, ["max_grad_norm must be above 0 or None"]),
    "norm-text": (lambda m, t: M(m, t, max_grad_norm="1"), ValueError, ["max_grad_norm must be above 0", "got '1'"]),
    "gradients": (lambda m, t: M(m, t, gradients="pack"), ValueError, ['"dense" or "packed"', "'pack'"]),
    "states": (lambda m, t: M(m, t, states="int8"), ValueError, ['"float32" or "8bit"', "'int8'"]),
    "rounding": (lambda m, t: M(m, t, rounding="up"), ValueError, ['"nearest" or "stochastic"']),
    "pull-on": (lambda m, t: M(m, t, pull_on="cuda"), ValueError, ['"device" or "host"']),
    "packed-mapping": (
        lambda m, t: M(dict(m.named_parameters()), t, gradients="packed"), ValueError, ["needs the module"],
    ),
    "frozen": (lambda m, t: M(frozen(), t), ValueError, ["'body.weight'", "requires_grad=False; call its"]),
    "frozen-packed": (
        lambda m, t: M(frozen(), t, gradients="packed"), ValueError, ["'body.weight'", "requires_grad=False; call its"],
    ),
    "frozen-own": (lambda m, t: ls.PackedParameters(frozen(), t), ValueError, ["'body.weight'", "requires_grad=False"]),
    "max-norm": (lambda m, t: M(build(max_norm=1.0), t), ValueError, ["'embed.weight'", "max_norm=1.0", "to None"]),
    "by-frequency": (
        lambda m, t: M(build(scale_grad_by_freq=True), t, gradients="packed"), ValueError, ["scale_grad_by_freq=True"],
    ),
    "own-max-norm": (lambda m, t: ls.PackedParameters(build(max_norm=1.0), t), ValueError, ["max_norm=1.0"]),
    "computed": (
        lambda m, t: M(non_leaf(), t.restrict(["body.weight"])), ValueError, ["computed from other tensors"],
    ),
    "dtype": (lambda m, t: M(m.double(), t), TypeError, ["float32, bfloat16, float16", "got torch.float64"]),
    "quantized": (
        lambda m, t: M({"weight": Quantized().weight}, Ticket.from_masks({"weight": torch.ones(9, dtype=torch.bool)})),
        TypeError, ["'weight' is quantised in the model", "torch.uint8", "leave it out"],
    ),
    "nothing": (lambda m, t: M(m, t - t), ValueError, ["no active entry"]),
    "attach": (
        lambda m, t: ls.PackedParameters(m, t).attach(torch.optim.SGD(m.parameters(), lr=0.1)), ValueError,
        ["none of the packed parameters", "pass them"],
    ),
    "clip": (lambda m, t: M(m, t).clip_grad_norm_(-1), ValueError, ["max_norm must be above 0, got -1"]),
    "state": (
        lambda m, t: M(m, t).load_state_dict(torch.optim.AdamW(m.parameters()).state_dict()), ValueError,
        ["not saved by MaskedAdamW"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), CALLS.values(), ids=CALLS)
def test_wrong_calls_say_what_to_write(call, error, words):
    model = build()
    ticket = ticket_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(error) as caught:
        call(model, ticket)
    message = str(caught.value)
    assert all(word in message for word in words), message
    if "attach" not in message:
        assert not model._forward_pre_hooks and not model["embed"].sparse
    assert all(p.requires_grad for p in trained)


def test_the_ordinary_embedding_options_are_taken():
    for options in ({"padding_idx": 1}, {"sparse": True}):
        model = build(**options)
        optimizer = MaskedAdamW(model, ticket_of(model), gradients="packed")
        model["body"](model["embed"](torch.arange(9))).sum().backward()
        optimizer.step()
        optimizer.remove()


def on_meta():
    with torch.device("meta"):
        return build()


def scored(name, start, stop):
    return torch.ones(stop - start)


def picked(model, **how):
    return ls.select(model, build(), **how)


LOAD = ["on the meta device", "load the weights first"]
SHARE = ["must be a number in [0, 1], e.g. 0.2"]
SELECTIONS = {
    "meta-initial": (lambda m: ls.select(on_meta(), m, density=0.2), TypeError, ["select: 'body.bias'", *LOAD]),
    "meta-tuned": (lambda m: ls.select(m, on_meta(), density=0.2), TypeError, ["select: 'body.bias'", *LOAD]),
    "meta-both": (lambda m: ls.select(on_meta(), on_meta(), density=0.2), TypeError, LOAD),
    "meta-mapping": (lambda m: ls.select(m, dict(on_meta().named_parameters()), k=3), TypeError, LOAD),
    "meta-scored": (lambda m: ls.select(on_meta(), score=scored, k=3), TypeError, ["select: ", *LOAD]),
    "meta-scores": (lambda m: ls.select(m, score=dict(on_meta().named_parameters()), k=3), TypeError, LOAD),
    "meta-base": (lambda m: ls.select(on_meta(), score=dict(m.named_parameters()), k=3), TypeError, LOAD),
    "meta-rounded": (lambda m: ls.select(m, on_meta(), k=3, compare_in=torch.bfloat16), TypeError, LOAD),
    "meta-delta": (lambda m: ls.SparseDelta.between(m, on_meta(), ticket_of(m)), TypeError, ["the tuned model", *LOAD]),
    "meta-digests": (lambda m: ls.frozen_digests(on_meta(), ticket_of(m)), TypeError, LOAD),
    "meta-masks": (lambda m: Ticket.from_masks({"a": torch.ones(3, dtype=bool, device="meta")}), TypeError, LOAD),
    "meta-indices": (lambda m: Ticket.from_indices({"a": torch.ones(1, device="meta")}, {"a": [3]}), TypeError, LOAD),
    "nested": (lambda m: ls.select({"model": m.state_dict()}, m, k=3), TypeError, ["a OrderedDict", "['model']"]),
    "numpy": (lambda m: ls.select({"a": np.ones(3)}, {"a": np.ones(3)}, k=1), TypeError, ["got a ndarray for 'a'"]),
    "numbers": (lambda m: ls.select({0: torch.ones(3)}, m, k=1), TypeError, ["names of tensors, got the key 0"]),
    "sparse": (lambda m: ls.select({"a": torch.ones(3).to_sparse()}, {"a": torch.ones(3)}, k=1), TypeError, ["dense"]),
    "masks-numpy": (lambda m: Ticket.from_masks({"a": np.ones(3, bool)}), TypeError, ["must be a tensor, got ndarray"]),
    "integer-scores": (
        lambda m: ls.select(m, score={name: torch.ones_like(p).int() for name, p in m.named_parameters()}, k=1),
        TypeError, ["scores of 'embed.weight' must be float32", "got torch.int32"],
    ),
    "pool-expression": (lambda m: picked(m, k=3, pool="("), ValueError, ["expected regular expressions", "'('"]),
    "apply-to-mapping": (lambda m: delta_of(m).apply(m.state_dict()), TypeError, ["OrderedDict; pass the module"]),
    "revert-path": (lambda m: delta_of(m).revert("base"), TypeError, ["got a str; pass the module"]),
    "switcher-mapping": (lambda m: ls.TicketSwitcher(m.state_dict(), {}), TypeError, ["pass the module"]),
    "k-float": (lambda m: picked(m, k=3.0), TypeError, ["k must be a whole number", "got 3.0 (float)"]),
    "k-bool": (lambda m: picked(m, k=True), TypeError, ["k must be a whole number", "got True"]),
    "k-text": (lambda m: picked(m, k="3"), TypeError, ["k must be a whole number", "got '3' (str)"]),
    "k-tensor": (lambda m: picked(m, k=torch.tensor(3)), TypeError, ["k must be a whole number"]),
    "k-below": (lambda m: picked(m, k=-1), ValueError, ["k must be in [0, 80]", "got -1"]),
    "density-text": (lambda m: picked(m, density="0.2"), TypeError, ["density", *SHARE, "'0.2' (str)"]),
    "density-bool": (lambda m: picked(m, density=True), TypeError, ["density", *SHARE, "True (bool)"]),
    "density-nan": (lambda m: picked(m, density=float("nan")), ValueError, ["density must be in [0, 1], got nan"]),
    "density-list": (lambda m: picked(m, density=[0.2]), TypeError, SHARE),
    "density-of-layers": (lambda m: picked(m, density="0.2", budget="layer"), TypeError, SHARE),
    "share-text": (lambda m: picked(m, k=3, budget={"body": "1"}), TypeError, ["the share of 'body'", *SHARE]),
    "share-nan": (lambda m: picked(m, k=3, budget={"body": float("nan")}), ValueError, ["'body' must be in", "nan"]),
    "share-below": (lambda m: picked(m, k=3, budget={"body": -0.1}), ValueError, ["'body' must be in [0, 1]"]),
    "no-share": (lambda m: picked(m, k=3, budget={}), ValueError, ["got an empty mapping"]),
    "random-k": (lambda m: Ticket.random(m, k=3.0), TypeError, ["k must be a whole number"]),
    "random-k-bool": (lambda m: Ticket.random(m, k=True), TypeError, ["k must be a whole number"]),
    "random-density": (lambda m: Ticket.random(m, density="0.2"), TypeError, SHARE),
    "coins-density": (lambda m: Ticket.random(m, density=True, bernoulli=True), TypeError, SHARE),
    "coins-k": (lambda m: Ticket.random(m, density=0.5, k=3, bernoulli=True), ValueError, ["no k="]),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), SELECTIONS.values(), ids=SELECTIONS)
def test_wrong_selections_say_what_to_write(call, error, words):
    with pytest.raises(error) as caught:
        call(build())
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("density", [np.float32(0.2), np.float64(0.2), Fraction(1, 5), Decimal("0.2"), 0.2])
def test_any_number_is_a_density(density, tmp_path):
    """And the file of the ticket tells it as a plain number."""
    model = build()
    for ticket in (Ticket.random(model, density=density), ls.select(model, score=scored, density=density)):
        ticket.save(tmp_path / "t.safetensors")
        assert ticket.k == 80 // 5 and Ticket.load(tmp_path / "t.safetensors").metadata["density"] == 0.2
    assert Ticket.random(model, k=np.int64(3)).k == ls.select(model, score=scored, k=np.int64(3)).k == 3


def test_a_model_without_weights_has_shapes():
    assert Ticket.random(on_meta(), k=7, seed=1) == Ticket.random(build(), k=7, seed=1)
    assert Ticket.full(on_meta()).n == 80
