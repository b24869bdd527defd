"""FT, BitFit and the SFT family: budgets, entries that train, and how the ticket is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.bits import weights
from helpers.interruptions import StopAfter
from helpers.tiny_nli import tiny_language_model, toy_pairs

import ltp_sparse as ls
from ltp_sparse.methods import LTSFT, SCSFT, BitFit, FineTuning, HeadOnly, RandSFT, Settings
from ltp_sparse.methods.fine_tuning import K_LANGUAGE, K_TASK, group_shares, scaled_budget
from ltp_sparse.models.backbone import backbone_from_config
from ltp_sparse.selection import pools
from ltp_sparse.selection.budgets import share_out
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.evaluation import evaluate
from ltp_sparse.training.method import load_trained, train_method
from ltp_sparse.weights.names import canonical_parameters

QUICK = Settings(epochs=5, max_length=64, learning_rate=1e-3)


@pytest.fixture(scope="module")
def xlmr_base():
    """XLM-R-base in full size, without memory."""
    from transformers import XLMRobertaConfig

    config = XLMRobertaConfig(
        vocab_size=250002, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        return backbone_from_config(config, decoupled=False)


def run(tokenizer, method, *, model=None, epochs=5, **options):
    model = model or tiny_language_model(len(tokenizer))
    return train_method(
        method, model, tokenizer, toy_pairs(24), toy_pairs(6, seed=1), **{"progress": False, "seed": 3, **options}
    )


@pytest.mark.slow
def test_budgets_of_xlmr_base(xlmr_base):
    maskable = LTSFT().ticket(xlmr_base).n
    assert maskable == 277_414_656
    assert LTSFT().budget(xlmr_base) == K_TASK == 14_155_776
    assert scaled_budget(K_LANGUAGE, maskable) == 7_667_712
    assert RandSFT(k=141_557).ticket(xlmr_base).k == 141_557
    assert BitFit().ticket(xlmr_base).k == 102_144
    assert FineTuning().ticket(xlmr_base).k == 277_453_056


@pytest.mark.parametrize(
    ("groups", "k", "counts"),
    [
        ("nli", K_TASK, [283_115, 283_115, 283_115, 13_306_429]),
        ("sentiment", K_TASK, [70_778, 283_115, 283_115, 13_518_766]),
        ("language", K_LANGUAGE, [4_600_627, 3_067_084]),
    ],
)
def test_sc_sft_shares_of_xlmr_base(xlmr_base, groups, k, counts):
    """Floors of shares, so K - 2 in all for a task."""
    ticket = LTSFT().ticket(xlmr_base)
    shares = group_shares(groups, ticket.names)
    names, of_group, labels, ks = share_out(ticket.shapes, shares, density=None, k=k)
    assert dict(zip(labels, ks, strict=True)) == dict(zip(shares, counts, strict=True))
    assert set(names) == set(ticket.names)  # every maskable tensor has a group
    layers = labels.index(list(shares)[-1])  # layers 0-9 are one pool
    pooled = {name.split(".")[3] for name, group in zip(names, of_group, strict=True) if group == layers}
    assert pooled == {str(i) for i in range(10)}


@pytest.mark.parametrize("scope", ["all", "no-embeddings", "query-value"])
def test_pools_of_rand_sft(tokenizer, scope):
    model = tiny_language_model(len(tokenizer))
    ticket = RandSFT(scope=scope, density=0.05).ticket(model, seed=1)
    maskable = LTSFT().ticket(model).n
    assert ticket.k == int(0.05 * maskable)  # of all maskable entries, whatever the pool
    if scope == "no-embeddings":
        assert not any("embedding" in name for name in ticket.names)
    if scope == "query-value":
        assert all("query" in name or "value" in name for name in ticket.names)
    assert ticket != RandSFT(scope=scope, density=0.05).ticket(model, seed=2)
    drawn = RandSFT(scope=scope, density=0.05, bernoulli=True).ticket(model, seed=1)
    assert 0.5 * ticket.k < drawn.k < 1.5 * ticket.k != drawn.k


def methods():
    return {
        "fine-tuning": FineTuning(settings=QUICK),
        "bitfit": BitFit(settings=QUICK),
        "lt-sft": LTSFT(settings=QUICK, density=0.1),
        "sc-sft": SCSFT(settings=QUICK, density=0.1, groups={"embeddings": 0.3, r"layer\.": 0.7}),
        "rand-sft": RandSFT(settings=QUICK, density=0.1),
    }


@pytest.mark.parametrize("name", methods())
def test_exactly_the_right_entries_move(tokenizer, name):
    method = methods()[name]
    model = tiny_language_model(len(tokenizer))
    before = weights(model)
    result = run(tokenizer, method, model=model)
    ticket = result.delta.ticket
    maskable = LTSFT().ticket(model).n
    expected = {
        "fine-tuning": sum(p.numel() for n, p in canonical_parameters(model).items() if n.startswith("roberta.")),
        "bitfit": sum(p.numel() for n, p in canonical_parameters(model).items() if "bias" in n and "roberta." in n),
        "lt-sft": int(0.1 * maskable), "rand-sft": int(0.1 * maskable),
        "sc-sft": sum(int(share * int(0.1 * maskable)) for share in (0.3, 0.7)),
    }  # fmt: skip
    assert ticket.k == pytest.approx(expected[name], abs=2)
    moved_active = 0
    for parameter, tensor in canonical_parameters(model).items():
        moved = tensor.detach().view(torch.int32) != before[parameter].view(torch.int32)
        allowed = ticket.mask(parameter) if parameter in ticket.sets else torch.zeros_like(moved)
        assert not (moved & ~allowed).any(), parameter
        moved_active += int(moved.sum())
    assert moved_active > 0.3 * ticket.k
    assert set(result.delta.dense) == {f"classifier.{n}" for n, _ in result.model.classifier.named_parameters()}
    result.delta.revert(result.model)
    assert all(torch.equal(p, before[n]) for n, p in canonical_parameters(model).items())


@pytest.mark.slow
def test_lt_sft_trains_what_full_tuning_moved_most(tokenizer):
    """The ticket equals a selection by hand; then everything, the head too, restarts from its initial values."""
    model = tiny_language_model(len(tokenizer))
    initial = weights(model)
    result = run(tokenizer, LTSFT(settings=QUICK, density=0.2), model=model)
    fresh = tiny_language_model(len(tokenizer))
    run(tokenizer, AllMaskable(settings=QUICK), model=fresh)
    by_hand = ls.select(initial, fresh, density=0.2, pool=pools.maskable)
    assert result.delta.ticket == by_hand
    # masked tuning of these entries from the same start gives the same bits
    again = run(tokenizer, Fixed(settings=QUICK), ticket=by_hand.fingerprinted(initial))
    for name, values in result.delta.values.items():
        assert torch.equal(values, again.delta.values[name]), name


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllMaskable(FineTuning):
    key = "all-maskable"

    def _ticket(self, language_model, given, seed):
        return ls.Ticket.full(language_model, pool=pools.maskable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(FineTuning):
    key = "fixed"
    needs_ticket = True

    def _ticket(self, language_model, given, seed):
        return given


@pytest.mark.slow
def test_iterations_add_entries(tokenizer):
    model = tiny_language_model(len(tokenizer))
    once = run(tokenizer, LTSFT(settings=QUICK, density=0.1), model=model)
    once.delta.revert(once.model)
    twice = run(tokenizer, LTSFT(settings=QUICK, density=0.2, iterations=2), model=model)
    assert twice.delta.ticket.k == int(0.2 * LTSFT().ticket(model).n)
    assert (once.delta.ticket & twice.delta.ticket).k == once.delta.ticket.k  # the first half is that of one iteration
    twice.release()
    budget = LTSFT(density=0.0999).budget(model)
    assert budget % 2 == 1
    odd = run(
        tokenizer, LTSFT(settings=dataclasses.replace(QUICK, epochs=1), density=0.0999, iterations=2), model=model
    )
    assert odd.delta.ticket.k == budget


@pytest.mark.slow
def test_a_killed_search_resumes_with_its_ticket(tokenizer, tmp_path):
    method = LTSFT(settings=QUICK, density=0.1)
    whole = run(tokenizer, method, output_dir=tmp_path / "whole", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, method, output_dir=tmp_path / "cut", save_every=1, callbacks=[StopAfter(3)])
    resumed = run(tokenizer, method, output_dir=tmp_path / "cut", save_every=1, resume=True)
    assert resumed.delta.ticket == whole.delta.ticket
    for name, values in whole.delta.values.items():
        assert torch.equal(values, resumed.delta.values[name]), name


@pytest.mark.slow
def test_a_task_sft_composes_with_a_language_sft(tokenizer):
    """base + language(target) + task, where the task was learnt on base + language(source)."""
    model = tiny_language_model(len(tokenizer))
    base = weights(model)
    generator = torch.Generator().manual_seed(0)

    def language_sft(seed):
        ticket = ls.Ticket.random(model, density=0.1, seed=seed, pool=pools.maskable)
        tuned = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        return ls.SparseDelta.between(base, tuned, ticket)

    source, target = language_sft(1), language_sft(2)
    source.apply(model)
    result = run(tokenizer, LTSFT(settings=QUICK, density=0.1), model=model)
    result.delta.revert(result.model)
    source.revert(model)
    target.apply(model)
    setup = load_trained(model, tokenizer, result.delta)
    for name, parameter in canonical_parameters(model).items():
        if name not in base or not name.startswith("roberta."):
            continue
        expected = base[name].clone()
        for delta in (target, result.delta):
            if name in delta.values:
                mask = delta.ticket.mask(name)
                expected[mask] += delta.values[name] - delta.originals[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    assert evaluate(setup, {"en": toy_pairs(6)}, progress=False)["en"] >= 0
    result_delta = next(entry.delta for entry in reversed(ls.deltas.delta.applied_deltas(model)))
    result_delta.revert(setup.model)
    target.revert(model)
    assert all(torch.equal(p, base[n]) for n, p in canonical_parameters(model).items())


def test_single_texts_train_too(tokenizer):
    @dataclasses.dataclass(frozen=True)
    class Text:
        text: str
        label: str
        language: str = "id"

    texts = [
        Text(pair.hypothesis, {"entailment": "pos", "neutral": "neu"}.get(pair.label, "neg")) for pair in toy_pairs(30)
    ]
    method = FineTuning(settings=dataclasses.replace(QUICK, epochs=15, learning_rate=3e-3))
    model = tiny_language_model(len(tokenizer))
    result = train_method(
        method, model, tokenizer, texts, texts[:9], labels=("neg", "neu", "pos"), metric="macro_f1", progress=False
    )
    assert max(result.dev_scores) > 0.9
    assert result.delta.metadata["labels"] == ["neg", "neu", "pos"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LTSFT(iterations=0), "LTSFT: iterations must be a whole number of at least 1, got 0"),
        (lambda: LTSFT(iterations=2.0), "iterations must be a whole number of at least 1, got 2.0"),
        (lambda: SCSFT(groups="ner"), "groups must be one of nli, sentiment, language"),
        (lambda: RandSFT(scope="keys"), "scope must be one of all, no-embeddings, query-value, got 'keys'"),
        (lambda: Settings(schedule="cosine"), "schedule must be constant or linear"),
        (lambda: Settings(l2=-1), "l2 must not be negative"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def counts(ticket):
    return {name: ticket.sets[name].k for name in ticket.active_names}


@pytest.mark.slow
def test_random_entries_of_the_shape_that_lt_sft_finds(tokenizer):
    """As many in every parameter, drawn with the seed of the run, without the embeddings."""
    model = tiny_language_model(len(tokenizer))
    options = {"settings": QUICK, "density": 0.1, "scope": "no-embeddings", "of": "pool"}
    found = []
    for method, seed in ((LTSFT, 3), (RandSFT, 3), (RandSFT, 4)):
        match = {"match": "layers"} if method is RandSFT else {}
        result = run(tokenizer, method(**options, **match), model=model, seed=seed)
        found.append(result.delta.ticket)
        result.release()
    lt_sft, drawn, other = found
    assert counts(drawn) == counts(lt_sft) and drawn != lt_sft and drawn != other
    assert drawn.k == LTSFT(**options).budget(model) == int(0.1 * Ticket.full(model, pools.without_embeddings).n)
    assert not any("embeddings" in name for name in drawn.active_names)
    with pytest.raises(ValueError, match="takes no bernoulli"):
        RandSFT(match="layers", bernoulli=True)


def test_the_head_alone(tokenizer):
    model = tiny_language_model(len(tokenizer))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    result = run(tokenizer, HeadOnly(settings=QUICK), model=model)
    assert result.delta.ticket.k == 0 and result.delta.dense
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_weights_of_the_last_update_are_kept(tokenizer):
    """They are those of a run that is cut at its end: with one epoch, best and last are the same."""
    model = tiny_language_model(len(tokenizer))
    result = run(tokenizer, BitFit(settings=dataclasses.replace(QUICK, epochs=4)), model=model, keep_last=True)
    best, last, scores = result.delta, result.last, result.dev_scores
    result.release()
    assert last.metadata["epoch"] == 4 and last.metadata["dev_score"] == scores[-1] and len(scores) == 4
    name = last.ticket.active_names[0]
    assert torch.equal(last.values[name], best.values[name]) == (best.metadata["epoch"] == 4)
    setup = load_trained(model, tokenizer, last)
    assert not torch.equal(dict(setup.model.named_parameters())[name], last.originals[name])
    last.revert(setup.model)
    once = run(tokenizer, BitFit(settings=dataclasses.replace(QUICK, epochs=1)), model=model, keep_last=True)
    assert all(torch.equal(once.last.values[n], values) for n, values in once.delta.values.items())
    once.release()
    assert run(tokenizer, BitFit(settings=QUICK), model=model).last is None
