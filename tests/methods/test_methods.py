"""Methods: their settings, the entries they train, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.bits import weights
from helpers.tiny_nli import ticket_of, tiny_language_model, toy_pairs

import ltp_sparse as ls
from ltp_sparse.methods import LTP, METHODS, AllActive, Method, PromptOnly, PromptSettings, RandomTicket, SoftPrompt
from ltp_sparse.models.backbone import is_decoupled
from ltp_sparse.training.method import train_method
from ltp_sparse.weights.names import canonical_parameters

FIVE_STEPS = {"epochs": 5, "max_length": 64, "learning_rate": 1e-3}


def test_registry_holds_every_method():
    assert {
        "ltp": LTP,
        "random-ticket": RandomTicket,
        "soft-prompt": SoftPrompt,
        "prompt-only": PromptOnly,
    }.items() <= (METHODS.items())
    assert all(issubclass(method, Method) and key == method.key for key, method in METHODS.items())
    assert len({method.name for method in METHODS.values()}) == len(METHODS)


def test_default_settings_are_the_papers():
    shared = {
        "batch_size": 32,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "n_prompt": 4,
        "encoder": "bilstm",
        "init": "normal",
        "max_length": 256,
        "truncation": "longest_first",
        "schedule": "constant",
        "warmup": 0.0,
        "eval_steps": 0,
        "max_steps": 0,
        "seeds": (1, 2, 3, 4, 5),
    }
    schedules = {LTP: (2e-5, 70), RandomTicket: (2e-5, 70), SoftPrompt: (1e-5, 50), PromptOnly: (5e-3, 70)}
    for method, (learning_rate, epochs) in schedules.items():
        l2 = 0.01 if method is SoftPrompt else 0.0  # Adam with coupled L2, of Zhao & Schütze's systems
        expected = {**shared, "learning_rate": learning_rate, "epochs": epochs, "l2": l2}
        assert dataclasses.asdict(method().settings) == expected
    on_ltp_schedule = SoftPrompt(settings=PromptSettings())
    assert on_ltp_schedule.settings == LTP().settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"init": "zeros"}, "init must be normal or vocabulary, got 'zeros'"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PromptSettings(**options)


def test_a_method_without_its_ticket_says_so(tokenizer):
    model = tiny_language_model(len(tokenizer))
    for method in (LTP(), RandomTicket()):
        with pytest.raises(ValueError, match=f"{method.name}: expected the ticket of stage 1, got none; select one"):
            method.ticket(model)
    for method in (SoftPrompt(), PromptOnly()):
        with pytest.raises(ValueError, match=f"{method.name}: expected no ticket, since it knows itself which"):
            method.ticket(model, ticket_of(model))


@pytest.mark.parametrize(
    "name",
    [
        "roberta.encoder.layer.0.output.LayerNorm.weight",
        "lm_head.dense.weight",
        "lm_head.decoder.weight",
        "lm_head.bias",
    ],
)
def test_ltp_refuses_tickets_over_what_it_freezes(tokenizer, name):
    model = tiny_language_model(len(tokenizer))
    ticket = ls.Ticket.full(model, pool=lambda candidate: candidate == name)
    with pytest.raises(ValueError, match=f"got active entries in '{name}'; select with pool="):
        LTP().ticket(model, ticket)


@pytest.mark.parametrize("match", ["pool", "layers"])
def test_random_tickets_have_the_shape_of_the_given_one(tokenizer, match):
    model = tiny_language_model(len(tokenizer))
    given = ticket_of(model)
    method = RandomTicket(match=match)
    drawn = method.ticket(model, given, seed=1)
    assert drawn.k == given.k
    assert drawn.names == given.names
    assert drawn == method.ticket(model, given, seed=1)
    assert drawn != method.ticket(model, given, seed=2)
    assert drawn.jaccard(given) < 0.4
    same_counts = drawn.counts("layer") == given.counts("layer")
    assert same_counts == (match == "layers")


def test_random_ticket_knows_its_two_kinds():
    with pytest.raises(ValueError, match="match must be pool or layers, got 'modules'"):
        RandomTicket(match="modules")


def test_sp_wants_the_tied_head(tokenizer):
    """Trap 2."""
    SoftPrompt().prepare(tiny_language_model(len(tokenizer), decoupled=False))
    model = tiny_language_model(len(tokenizer))
    assert is_decoupled(model)
    with pytest.raises(ValueError, match=r"SP: expected a language model whose LM head shares .* decoupled=False"):
        SoftPrompt().prepare(model)


def test_ltp_needs_no_copy_of_the_output_embedding(tokenizer):
    """Around a tied model the rows of the label words are set aside: the same bits as with a decoupled head."""
    deltas = []
    for decoupled in (True, False):
        model = tiny_language_model(len(tokenizer), decoupled=decoupled)
        method = LTP(settings=PromptSettings(**FIVE_STEPS))
        ticket = ticket_of(tiny_language_model(len(tokenizer)), 0.9)
        result = train_method(
            method, model, tokenizer, toy_pairs(24), toy_pairs(6, seed=1), ticket=ticket, progress=False
        )
        assert is_decoupled(model) == decoupled
        words = result.model.word_rows
        assert torch.equal(words, tiny_language_model(len(tokenizer)).lm_head.decoder.weight[result.model.word_ids])
        assert result.delta.metadata["decoupled"]
        deltas.append({**result.delta.values, **result.delta.dense})
    assert all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])


def test_sp_trains_every_entry_once(tokenizer):
    """Trap 1: tied, the embedding counts once, under its name in the base model."""
    model = tiny_language_model(len(tokenizer), decoupled=False)
    ticket = SoftPrompt().ticket(model)
    assert ticket.k == ticket.n == sum(p.numel() for p in model.parameters())
    assert "roberta.embeddings.word_embeddings.weight" in ticket.names
    assert "lm_head.decoder.weight" not in ticket.names


@pytest.mark.parametrize("name", ["ltp", "all-active", "random-pool", "random-layers", "soft-prompt", "prompt-only"])
@pytest.mark.parametrize("encoder", ["bilstm", "none"])
def test_exactly_the_right_entries_move(tokenizer, name, encoder):
    """Trap 6: after five steps everything outside the method's entries has the bits of before."""
    settings = PromptSettings(**FIVE_STEPS, encoder=encoder)
    method = {
        "ltp": LTP(settings=settings),
        "all-active": AllActive(settings=settings),
        "random-pool": RandomTicket(settings=settings),
        "random-layers": RandomTicket(settings=settings, match="layers"),
        "soft-prompt": SoftPrompt(settings=settings),
        "prompt-only": PromptOnly(settings=settings),
    }[name]
    language_model = tiny_language_model(len(tokenizer), decoupled=name != "soft-prompt")
    given = ticket_of(language_model) if method.needs_ticket else None
    active = method.ticket(language_model, given, seed=3)
    before = weights(language_model)

    pairs = toy_pairs(24)
    result = train_method(
        method, language_model, tokenizer, pairs, toy_pairs(6, seed=1), ticket=given, seed=3, progress=False
    )

    # the best epoch is kept, which may be the first; one step moves every entry that has a gradient
    moved_somewhere = 0
    for parameter_name, parameter in canonical_parameters(language_model).items():
        moved = parameter.detach().view(torch.int32) != before[parameter_name].view(torch.int32)
        allowed = torch.zeros_like(moved)
        if parameter_name in active.sets:
            allowed = active.mask(parameter_name)
        assert not (moved & ~allowed).any(), parameter_name
        moved_somewhere += int(moved.any())
        if allowed.any() and "embeddings" not in parameter_name and not parameter_name.startswith("lm_head"):
            # a key bias shifts all scores of a query alike, so it has no gradient but rounding errors
            if not parameter_name.endswith("key.bias"):
                assert moved[allowed].float().mean() > 0.9, parameter_name
    assert (moved_somewhere == 0) == (name == "prompt-only")
    used = {token for example in result.encode(pairs) for token in example["input_ids"]} - {tokenizer.unk_token_id}
    word = "roberta.embeddings.word_embeddings.weight"
    rows = (canonical_parameters(language_model)[word] != before[word]).any(1).nonzero().flatten().tolist()
    assert set(rows) <= used | set(result.model.word_ids.tolist())
    assert (set(rows) == set()) == (name == "prompt-only")
    if name == "soft-prompt":  # tied: rows of the words move through the head, LayerNorms and the head move, too
        assert set(result.model.word_ids.tolist()) <= set(rows)
        assert not torch.equal(
            canonical_parameters(language_model)["lm_head.dense.weight"], before["lm_head.dense.weight"]
        )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        start = type(result.model.prompt_encoder)(4, 32, encoder)
    for (encoder_name, value), first in zip(
        result.model.prompt_encoder.named_parameters(), start.parameters(), strict=True
    ):
        assert not torch.equal(value, first), encoder_name
