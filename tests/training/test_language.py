"""Language SFTs: two phases of MLM tuning, what they keep, and that the model goes back to its initial bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.bits import weights
from helpers.tiny_nli import WORDS, tiny_language_model

from ltp_sparse.selection import pools
from ltp_sparse.training.language import KINDS, LANGUAGE_SETTINGS, train_language
from ltp_sparse.training.mlm import MLMSettings, tune_mlm
from ltp_sparse.weights.names import canonical_parameters

QUICK = MLMSettings(batch_size=8, max_steps=4, length=16, learning_rate=1e-3, eval_steps=4)
TEXTS = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(14)) for i in range(60)]


@pytest.mark.parametrize("kind", ["lt-sft", "bitfit"])
def test_a_language_moves_its_entries_only(tokenizer, kind):
    model = tiny_language_model(len(tokenizer))
    before = weights(model)
    delta = train_language(kind, model, tokenizer, TEXTS, QUICK, density=0.1, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in canonical_parameters(model).items())
    assert delta.dense == {}  # the LM head is not composed
    maskable = sum(t.numel() for name, t in before.items() if pools.maskable(name))
    if kind == "lt-sft":
        assert delta.ticket.k == int(0.1 * maskable)
    else:
        assert all("bias" in name for name in delta.ticket.active_names)
    delta.apply(model)
    after = canonical_parameters(model)
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    assert 0.3 * delta.ticket.k < moved <= delta.ticket.k
    delta.revert(model)


def test_the_entries_are_those_that_full_tuning_moved_most(tokenizer):
    import ltp_sparse as ls

    model = tiny_language_model(len(tokenizer))
    delta = train_language("lt-sft", model, tokenizer, TEXTS, QUICK, density=0.05, progress=False)
    tuned = tune_mlm(model, tokenizer, TEXTS, QUICK, progress=False)
    assert ls.select(tuned.initial, model, density=0.05, pool=pools.maskable) == delta.ticket


@pytest.mark.slow
def test_resuming_tells_the_phases_apart(tokenizer, tmp_path):
    settings = dataclasses.replace(QUICK, save_steps=2)
    runs = [
        train_language(
            "lt-sft", tiny_language_model(len(tokenizer)), tokenizer, TEXTS, settings, density=0.05, progress=False,
            output_dir=tmp_path, resume=resume,
        )
        for resume in (False, True)
    ]  # fmt: skip
    assert runs[0].ticket == runs[1].ticket
    assert all(torch.equal(values, runs[1].values[name]) for name, values in runs[0].values.items())


def test_the_budget_is_in_exact_decimals(tokenizer):
    """Contract 1: k = floor(density * pool), where the float product may lie below the integer that it is."""
    model = tiny_language_model(len(tokenizer))
    maskable = sum(p.numel() for name, p in canonical_parameters(model).items() if pools.maskable(name))
    density = next(d / 1000 for d in range(1, 1000) if int(d / 1000 * maskable) != d * maskable // 1000)
    delta = train_language("lt-sft", model, tokenizer, TEXTS, QUICK, density=density, progress=False)
    assert delta.ticket.k == round(1000 * density) * maskable // 1000


def test_step_bounds(tokenizer):
    assert LANGUAGE_SETTINGS.step_bounds == (10_000, 100_000)
    for bounds, steps in (((7, 9), 7), ((1, 2), 2), ((1, 100), 5)):
        settings = dataclasses.replace(QUICK, max_steps=-1, epochs=1, step_bounds=bounds)
        model = tiny_language_model(len(tokenizer))
        result = tune_mlm(model, tokenizer, TEXTS[:45], settings, progress=False)
        assert result.metadata["training_sequences"] in range(33, 41)
        assert result.metadata["steps"] == steps


def test_unknown_kinds(tokenizer):
    with pytest.raises(ValueError, match=f"kind must be one of {', '.join(KINDS)}, got 'lora'"):
        train_language("lora", tiny_language_model(len(tokenizer)), tokenizer, TEXTS, QUICK)
