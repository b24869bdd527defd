"""What holds for every method: what moves, what stays, saving and loading, and a model left as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.bits import weights
from helpers.interruptions import StopAfter
from helpers.tiny_causal import causal_model, causal_tokenizer
from helpers.tiny_nli import ticket_of, tiny_language_model, tiny_tokenizer, toy_pairs
from helpers.tiny_texts import TinyText

import ltp_sparse as ls
from ltp_sparse.methods import METHODS
from ltp_sparse.models import Adapter
from ltp_sparse.prompting import Verbalizer
from ltp_sparse.training.evaluation import evaluate
from ltp_sparse.training.language import train_language_adapter
from ltp_sparse.training.method import load_trained, train_method
from ltp_sparse.training.mlm import MLMSettings
from ltp_sparse.weights.names import canonical_parameters

WORDS = {"a": "w7", "b": "w21", "c": "w30"}
OPTIONS = {
    "lt-sft": {"density": 0.1},
    "sc-sft": {"density": 0.1, "groups": {"embeddings": 0.3, r"layer\.": 0.7}},
    "rand-sft": {"density": 0.1},
    "deep-prompt": {"n": 4},
    "spt": {"n": 4, "bottleneck": 8, "words": WORDS},
}
VARIANTS = [
    *((key, {}) for key in METHODS),
    ("deep-prompt", {"head": "mlm", "projection": 8}),
    ("ada-sft", {"keep": 0.5}),
    ("spt", {"frozen": False, "bottleneck": None}),
    ("mad-x", {"language_adapter": "en", "drop_last": True}),
]
FAST = ("ltp", "lt-sft", "bitfit", "spt")
"""One of each kind of method, for `make check`."""
TOPICS = {"a": "word1", "b": "word2", "c": "word3", "d": "word4"}


def texts(count: int) -> list[TinyText]:
    return [TinyText(f"w{i % 5} w{10 + i % 3}", "abc"[i % 3]) for i in range(count)]


def setting(key, options, tmp_path, causal="bloom"):
    """(method, language model, tokenizer, training examples, dev examples, further arguments)"""
    kind = METHODS[key]
    options = {**OPTIONS.get(key, {}), **options}
    if kind.backbone == "causal":
        tokenizer, model, examples = causal_tokenizer(), causal_model(causal), texts(30)
        more = {"labels": ("a", "b", "c")}
    else:
        tokenizer = tiny_tokenizer()
        model, examples = tiny_language_model(len(tokenizer), decoupled=not kind().tied), toy_pairs(30)
        more = {"ticket": ticket_of(model)} if kind.needs_ticket else {}
    if options.get("language_adapter") is not None:
        adapter = Adapter.for_language(model.config)
        adapter.save(tmp_path / "en.safetensors")
        options["language_adapter"] = str(tmp_path / "en.safetensors")
    method = kind(**options)
    quick = dataclasses.replace(
        method.settings, epochs=5, max_length=40, batch_size=6, learning_rate=1e-2, eval_steps=0, schedule="constant",
        warmup=0.0,
    )  # fmt: skip
    return dataclasses.replace(method, settings=quick), model, tokenizer, examples, examples[:6], more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "options"),
    [
        pytest.param(key, options, id=f"{key}-{'-'.join(options)}", marks=[] if key in FAST else pytest.mark.slow)
        for key, options in VARIANTS
    ],
)
def test_what_moves_is_what_is_saved(key, options, tmp_path):
    """After 25 updates exactly the delta's entries have moved; file and fresh model give the same logits."""
    method, model, tokenizer, train, dev, more = setting(key, options, tmp_path)
    before, modules = weights(model), [name for name, _ in model.named_modules()]
    result = train_method(method, model, tokenizer, train, dev, progress=False, seed=3, **more)

    delta = result.delta
    moved_active = 0
    for name, tensor in canonical_parameters(result.model).items():
        if name in delta.dense or name not in before:
            continue
        moved = tensor.detach().view(torch.int32) != before[name].view(torch.int32)
        allowed = delta.ticket.mask(name) if name in delta.ticket.sets else torch.zeros_like(moved)
        assert not (moved & ~allowed).any(), name
        moved_active += int(moved.sum())
    assert moved_active > 0.3 * delta.ticket.k or delta.ticket.k == 0
    assert delta.dense or moved_active

    batch = result.collate(result.encode(train))
    del batch["labels"]
    with torch.no_grad():
        expected = result.model(**batch)["logits"]
    for which in (delta, result.baked):
        which.save(tmp_path / "delta.safetensors")
        assert ls.SparseDelta.load(tmp_path / "delta.safetensors").metadata == which.metadata

    result.release()
    assert [name for name, _ in model.named_modules()] == modules
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for which in (delta, result.baked):
        which.save(tmp_path / "delta.safetensors")
        loaded = ls.SparseDelta.load(tmp_path / "delta.safetensors")
        setup = load_trained(model, tokenizer, loaded)
        with torch.no_grad():
            torch.testing.assert_close(setup.model(**batch)["logits"], expected)
        loaded.revert(setup.model)
        setup.undo()


READ_TEXTS = [(key, options) for key, options in VARIANTS if "text" in METHODS[key].inputs and key != "spt"]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "options"), READ_TEXTS, ids=[f"{k}-{'-'.join(o)}" for k, o in READ_TEXTS])
def test_texts_of_other_classes_than_those_of_inference(key, options, tmp_path):
    """Four classes, in an order that is not the verbalizer's: learned, saved, and the same after loading."""
    method, model, tokenizer, _, _, more = setting(key, options, tmp_path)
    classes = tuple(reversed(TOPICS))
    train = [TinyText(" ".join([f"word{20 + i % 5}"] * (1 + i % 4)), "abcd"[i % 4]) for i in range(32)]
    if method.scores_words:
        with pytest.raises(ValueError, match="expected a verbalizer with words for d, c, b, a, got none"):
            train_method(method, model, tokenizer, train, train[:8], progress=False, labels=classes, **more)
        more["verbalizer"] = Verbalizer.from_words(tokenizer, TOPICS, classes)
    rate = 2e-3 if method.tied or key == "fine-tuning" else 1e-2
    method = dataclasses.replace(method, settings=dataclasses.replace(method.settings, epochs=12, learning_rate=rate))
    result = train_method(method, model, tokenizer, train, train[:8], progress=False, labels=classes, **more)
    scores = evaluate(result, {"en": train}, progress=False)
    if result.delta.ticket.k > 1000:  # a frozen model of random weights hardly reads its words
        assert scores["en"] > 0.4
    result.delta.save(tmp_path / "delta.safetensors")
    result.release()
    loaded = ls.SparseDelta.load(tmp_path / "delta.safetensors")
    assert loaded.metadata["labels"] == list(classes)
    setup = load_trained(model, tokenizer, loaded)
    assert evaluate(setup, {"en": train}, progress=False) == scores


@pytest.mark.parametrize("key", METHODS)
def test_a_run_that_fails_leaves_the_model_as_it_was(key, tmp_path):
    method, model, tokenizer, train, dev, more = setting(key, {}, tmp_path)
    before, modules = weights(model), [name for name, _ in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        train_method(method, model, tokenizer, train, dev, progress=False, callbacks=[StopAfter(3)], **more)
    assert [name for name, _ in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items() if name in before)


@pytest.mark.slow
@pytest.mark.parametrize("key", METHODS)
def test_same_seed_same_bits(key, tmp_path):
    deltas = []
    for seed in (1, 1, 2):
        method, model, tokenizer, train, dev, more = setting(key, {}, tmp_path)
        method = dataclasses.replace(method, settings=dataclasses.replace(method.settings, epochs=1))
        result = train_method(method, model, tokenizer, train, dev, progress=False, seed=seed, **more)
        deltas.append({**result.delta.values, **result.delta.dense})
    first, again, other = deltas
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(name not in other or not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("key", METHODS)
def test_descriptions_make_the_method_again(key):
    method = METHODS[key](**OPTIONS.get(key, {}))
    assert METHODS[key].from_description(method.describe()) == method


def test_a_task_of_the_wrong_kind_is_refused(tmp_path):
    method, model, tokenizer, _, _, more = setting("spt", {}, tmp_path)
    with pytest.raises(ValueError, match="SPT reads examples of the kind text, got pair; choose a method or a task"):
        train_method(method, model, tokenizer, toy_pairs(3), toy_pairs(3), **more)


def test_spt_keeps_the_epoch_of_the_smallest_loss(tmp_path):
    """Also where the accuracy of another one is higher."""
    method, model, tokenizer, train, dev, more = setting("spt", {}, tmp_path)
    result = train_method(method, model, tokenizer, train, dev, progress=False, metric="accuracy", **more)
    losses = result.dev_scores
    assert result.delta.metadata["metric"] == "loss" and len(losses) == 5 and max(losses) > 1
    assert result.best_epoch == 1 + losses.index(min(losses))
    assert result.delta.metadata["dev_score"] == min(losses)


def test_language_adapters_train_and_are_swapped(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_language_model(len(tokenizer))
    before = weights(model)
    sentences = [" ".join(f"word{(i * 7 + j) % 60}" for j in range(12)) for i in range(40)]
    settings = MLMSettings(batch_size=8, max_steps=6, length=16, learning_rate=1e-2, eval_steps=6, l1=0.0)
    for language in ("en", "sw"):
        seeded = dataclasses.replace(settings, seed={"en": 1, "sw": 2}[language])
        adapter = train_language_adapter(model, tokenizer, sentences, seeded, progress=False)
        assert adapter.metadata["validation_loss"] > 0
        adapter.save(tmp_path / f"{language}.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())

    method, model, tokenizer, train, dev, more = setting("mad-x", {}, tmp_path)
    method = dataclasses.replace(method, language_adapter=str(tmp_path / "en.safetensors"))
    result = train_method(method, model, tokenizer, train, dev, progress=False, **more)
    assert not any("language" in name for name in result.delta.dense)  # the task adapter and the head only
    batch = result.collate(result.encode(train))
    del batch["labels"]
    with torch.no_grad():
        source = result.model(**batch)["logits"]
    result.release()
    target = dict(result.delta.metadata["options"], language_adapter=str(tmp_path / "sw.safetensors"))
    swapped = ls.SparseDelta(
        result.delta.ticket, {}, {}, result.delta.dense, {**result.delta.metadata, "options": target}
    )
    setup = load_trained(model, tokenizer, swapped)
    with torch.no_grad():
        assert not torch.allclose(setup.model(**batch)["logits"], source)


def test_a_delta_that_does_not_fit_leaves_the_language_model_alone(tmp_path):
    method, model, tokenizer, train, dev, more = setting("mad-x", {}, tmp_path)
    result = train_method(method, model, tokenizer, train, dev, progress=False, **more)
    result.release()
    half = {name: tensor.half() for name, tensor in result.delta.dense.items()}
    unfit = ls.SparseDelta(result.delta.ticket, {}, {}, half, result.delta.metadata)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="torch.float16 in the delta"):
        load_trained(model, tokenizer, unfit)
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
