"""Names: wrappers, ties, order, matching errors."""

import copy

import pytest
import torch
from helpers.tied_model import DENSE, EMBEDDING, TiedModel
from torch import nn

import ltp_sparse as ls
from ltp_sparse.deltas import delta
from ltp_sparse.weights import names


class Peft(nn.Module):
    """The nesting that peft wraps around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})


WRAPPERS = {
    "bare": lambda model: model,
    "data-parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled-data-parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data-parallel-compiled": lambda model: nn.DataParallel(torch.compile(model)),
    "peft": Peft,
    "data-parallel-peft": lambda model: nn.DataParallel(Peft(model)),
}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("roberta.a.weight", "roberta.a.weight"),
        ("module.roberta.a.weight", "roberta.a.weight"),
        ("_orig_mod.module._orig_mod.roberta.a.weight", "roberta.a.weight"),
        ("module.base_model.model.roberta.a.weight", "roberta.a.weight"),
        ("roberta.layer.0._orig_mod.weight", "roberta.layer.0.weight"),
        ("roberta.module.weight", "roberta.module.weight"),
    ],
)
def test_strip_wrappers(name, canonical):
    assert names.strip_wrappers(name) == canonical


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_have_the_names_and_tensors_of_the_bare_one(wrap):
    """The names module., _orig_mod. and base_model.model. come off; a tied parameter appears once, under roberta."""
    model = TiedModel()
    found = ls.canonical_parameters(wrap(model))
    assert list(found) == [
        "lm_head.decoder.bias",
        EMBEDDING,
        *(
            f"roberta.encoder.layer.{layer}.{part}"
            for layer in range(2)
            for part in ("LayerNorm.bias", "LayerNorm.weight", "dense.bias", "dense.weight")
        ),
    ]
    assert found[EMBEDDING] is model.embedding.weight


def test_untied_head_keeps_its_own_name():
    model = TiedModel()
    model.lm_head["decoder"].weight = nn.Parameter(model.embedding.weight.detach().clone())
    found = ls.canonical_parameters(model)
    assert found["lm_head.decoder.weight"] is not found[EMBEDDING]


def test_tied_xlmr_counts_its_embedding_once():
    transformers = pytest.importorskip("transformers")
    config = transformers.XLMRobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.XLMRobertaForMaskedLM(config)
    found = ls.canonical_parameters(model)
    assert EMBEDDING in found and "lm_head.decoder.weight" not in found
    assert sum(p.numel() for p in found.values()) == sum(p.numel() for p in model.parameters())


def test_order_is_natural_and_does_not_depend_on_registration():
    mixed = ["layer.10.weight", "layer.2.weight", "layer.2.bias", "embeddings", "layer.1.weight"]
    expected = ["embeddings", "layer.1.weight", "layer.2.bias", "layer.2.weight", "layer.10.weight"]
    assert names.parameter_order(mixed) == names.parameter_order(reversed(mixed)) == expected
    zeros = ["layer.02", "layer.2", "layer.002"]  # equal numbers: without a rule of its own, sets of names decide
    assert (
        names.parameter_order(zeros) == names.parameter_order(reversed(zeros)) == ["layer.002", "layer.02", "layer.2"]
    )


def test_two_names_that_become_one_are_an_error_that_names_both():
    model = nn.Module()
    model._orig_mod = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="'weight' and '_orig_mod.weight' are both called 'weight'"):
        ls.canonical_parameters(model)
    with pytest.raises(ValueError, match="'_orig_mod.weight' and 'weight' are both called 'weight'"):
        names.canonical_tensors({"_orig_mod.weight": torch.zeros(1), "weight": torch.zeros(1)})


def test_no_matching_name_lists_the_closest():
    """Zero matched names is an error listing the closest."""
    ticket = ls.Ticket.full({"roberta.encoder.layer.0.dense.wight": [16, 16]})
    with pytest.raises(ValueError, match=rf"no name of the ticket.*closest there: '{DENSE}'"):
        ls.MaskedAdamW(TiedModel(), ticket)


def test_partly_missing_names_are_an_error():
    ticket = ls.Ticket.full({DENSE: [16, 16], "roberta.pooler.weight": [16, 16]})
    with pytest.raises(ValueError, match=r"1 of 2 names of the ticket are not.*'roberta.pooler.weight' is missing"):
        ls.MaskedAdamW(TiedModel(), ticket)


def test_copies_of_a_model_have_their_own_stack_of_deltas():
    model = TiedModel()
    delta.applied_deltas(model).append("delta")
    assert delta.applied_deltas(nn.DataParallel(model)) == ["delta"]
    assert delta.applied_deltas(copy.deepcopy(model)) == []


def test_models_around_one_base_model_share_its_deltas():
    """A language delta that was applied to the language model lies below a task delta of the classifier around it."""

    class Around(nn.Module):
        base_model_prefix = "roberta"

        def __init__(self, roberta):
            super().__init__()
            self.roberta = roberta

    model = TiedModel()
    around = Around(model.roberta)
    assert delta.applied_deltas(around) is delta.applied_deltas(model)
    base = copy.deepcopy(around)
    pool = "layer.0.dense.weight"
    tickets = [ls.Ticket.random(around, density=0.5, seed=seed, pool=pool) for seed in (1, 2)]
    deltas = []
    for ticket in tickets:
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            tuned.roberta["encoder"]["layer"][0]["dense"].weight.mul_(1.5)
        deltas.append(ls.SparseDelta.between(base, tuned, ticket))
    before = around.roberta["encoder"]["layer"][0]["dense"].weight.detach().clone()
    deltas[0].apply(model)
    deltas[1].apply(around)  # knows that the base below the first one is its own
    deltas[1].revert(model)
    deltas[0].revert(around)
    assert torch.equal(around.roberta["encoder"]["layer"][0]["dense"].weight, before)


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        (EMBEDDING, "embeddings", "embeddings"),
        ("roberta.embeddings.LayerNorm.weight", "embeddings", "LayerNorm"),
        ("roberta.encoder.layer.11.attention.self.query.weight", "layer 11", "attention"),
        ("roberta.encoder.layer.3.output.dense.bias", "layer 3", "feed-forward"),
        ("model.layers.0.self_attn.q_proj.weight", "layer 0", "attention"),
        ("lm_head.layer_norm.weight", "other", "other"),
    ],
)
def test_layer_and_module_of_a_name(name, layer, module):
    assert (names.layer_of(name), names.module_of(name)) == (layer, module)
