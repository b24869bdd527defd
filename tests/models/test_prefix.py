"""Deep prompt tuning: sizes, the attention over prompt and tokens, positions, and what trains."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_nli import tiny_language_model, toy_pairs
from torch import nn

from ltp_sparse.models import DeepPrompt, SequenceClassifier, collator, encode_pairs
from ltp_sparse.models.masked_prompt import PromptedMaskedLM
from ltp_sparse.prompting import Verbalizer, discrete_template
from ltp_sparse.prompting import collator as prompt_collator
from ltp_sparse.weights.names import canonical_parameters


@pytest.fixture
def model(tokenizer):
    return SequenceClassifier(lively(tiny_language_model(len(tokenizer))), 3, linear=True).eval()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(4)))


def lively(language_model):
    """With larger weights, so that attention matters."""
    for layer in language_model.roberta.encoder.layer:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= 8
    return language_model


def encoded(batch) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def reference(model, ids, matrix, offset) -> torch.Tensor:
    """The last hidden states [T, H] of one text, from a matrix [n, 2 L H] that is read as P-tuning v2 does."""
    roberta, config = model.roberta, model.config
    layers, heads, n = config.num_hidden_layers, config.num_attention_heads, len(matrix)
    size = config.hidden_size // heads
    blocks = matrix.view(n, layers * 2, heads, size).permute(1, 2, 0, 3).split(2)  # per layer [2, heads, n, size]
    embeddings = roberta.embeddings
    positions = torch.arange(len(ids)) + config.pad_token_id + 1 + offset
    hidden = embeddings.LayerNorm(
        embeddings.word_embeddings(ids)
        + embeddings.token_type_embeddings.weight[0]
        + embeddings.position_embeddings.weight[positions]
    )
    for layer, (keys, values) in zip(roberta.encoder.layer, blocks, strict=True):
        attention, parts = layer.attention.self, []
        for head in range(heads):
            span = slice(head * size, (head + 1) * size)
            query = attention.query(hidden)[:, span]
            key = torch.cat([keys[head], attention.key(hidden)[:, span]])
            value = torch.cat([values[head], attention.value(hidden)[:, span]])
            parts.append(torch.softmax(query @ key.T / size**0.5, -1) @ value)
        hidden = layer.attention.output(torch.cat(parts, -1), hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return hidden


@pytest.mark.parametrize(
    ("n", "projection", "count"),
    [(4, None, 73_728), (8, None, 147_456), (20, None, 368_640), (128, None, 2_359_296), (4, 512, 9_852_416)],
)
def test_sizes_of_the_full_model(n, projection, count):
    from transformers import XLMRobertaConfig

    with torch.device("meta"):
        prompt = DeepPrompt(XLMRobertaConfig(), n, projection=projection)
    assert sum(parameter.numel() for parameter in prompt.parameters()) == count


def test_initial_rows_are_normal_draws():
    from transformers import XLMRobertaConfig

    prompt = DeepPrompt(XLMRobertaConfig(), 8)
    assert abs(prompt.rows.mean()) < 0.02
    assert abs(prompt.rows.std() - 1) < 0.02
    assert prompt().shape == (12, 2, 12, 8, 64)
    assert prompt.dropout.p == 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("offset", [None, 0])
@pytest.mark.parametrize("projection", [None, 7])
def test_hidden_states_are_the_reference(model, batch, projection, offset, implementation):
    prompt = DeepPrompt(model.config, 3, projection=projection, position_offset=offset)
    if projection is None:
        matrix = prompt.rows
    else:
        matrix = torch.tanh(prompt.projection[0](prompt.rows)) @ prompt.projection[2].weight.T
        matrix = matrix + prompt.projection[2].bias
    real = batch["attention_mask"].bool()
    expected = [
        reference(model, ids[keep], matrix, 3 if offset is None else 0)
        for ids, keep in zip(batch["input_ids"], real, strict=True)
    ]
    model.roberta.set_attn_implementation(implementation)
    plain = model.roberta(**encoded(batch)).last_hidden_state
    prompt.attach(model)
    hidden = model.roberta(**encoded(batch)).last_hidden_state
    torch.testing.assert_close(hidden[real], torch.cat(expected))
    assert not torch.allclose(hidden[real], plain[real], atol=0.1)


def test_padding_changes_nothing(model, tokenizer):
    DeepPrompt(model.config, 5).attach(model)
    examples = encode_pairs(tokenizer, toy_pairs(6))
    alone = torch.cat([model(**collator(tokenizer.pad_token_id)([example]))["logits"] for example in examples])
    for side in ("right", "left"):
        together = model(**collator(tokenizer.pad_token_id, side)(examples))["logits"]
        torch.testing.assert_close(together, alone)


def test_the_verbalizer_head_sees_the_prompt_at_the_same_positions(tokenizer):
    """PromptedMaskedLM gives embeddings and position ids of its own."""
    language_model = lively(tiny_language_model(len(tokenizer)))
    model = PromptedMaskedLM(language_model, None, Verbalizer.for_language(tokenizer, "en")).eval()
    examples = discrete_template("en").encode(tokenizer, toy_pairs(3))
    prompt = DeepPrompt(model.config, 3).attach(model)
    batch = prompt_collator(tokenizer.pad_token_id)(examples)
    hidden = [reference(model, torch.tensor(e["input_ids"]), prompt.rows, 3)[e["mask_positions"]] for e in examples]
    expected = language_model.lm_head(torch.stack(hidden))[:, model.word_ids]
    torch.testing.assert_close(model(**batch)["logits"], expected)


def test_attach_and_remove_leave_the_model_as_it_was(model, batch):
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(**batch)["logits"]
    prompt = DeepPrompt(model.config, 4).attach(model)
    assert set(canonical_parameters(model)) == {*bits, "deep_prompt.rows"}
    prompt.remove()
    assert list(model.state_dict()) == list(bits)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**batch)["logits"], before)
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projection", [None, 7])
def test_gradients_reach_the_prompt_and_the_head_only(model, batch, projection, checkpointing):
    prompt = DeepPrompt(model.config, 4, projection=projection, dropout=0.0).attach(model)
    trained = {*prompt.parameters(), *model.classifier.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
    model.train()
    model(**batch)["loss"].backward()
    assert {p for p in model.parameters() if p.grad is not None} == trained
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
    if checkpointing:
        plain = prompt.rows.grad.clone()
        prompt.zero_grad()
        model.roberta.gradient_checkpointing_enable()
        model(**batch)["loss"].backward()
        torch.testing.assert_close(prompt.rows.grad, plain)


def test_dropout_is_drawn_for_each_example_in_training_only(model, tokenizer):
    example = encode_pairs(tokenizer, toy_pairs(1))
    batch = collator(tokenizer.pad_token_id)(example * 3)
    DeepPrompt(model.config, 8, dropout=0.5).attach(model)
    logits = model.train()(**encoded(batch))["logits"]
    assert not torch.allclose(logits[0], logits[1])
    logits = model.eval()(**encoded(batch))["logits"]
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("projection", [None, 7])
def test_a_baked_prompt_is_the_same(model, batch, projection):
    prompt = DeepPrompt(model.config, 4, projection=projection).attach(model)
    logits = model(**batch)["logits"]
    rows = prompt.bake()
    assert rows.shape == (4, 2 * 2 * 32)
    prompt.remove()
    baked = DeepPrompt(model.config, 4, rows=rows).attach(model)
    torch.testing.assert_close(baked(), prompt())
    torch.testing.assert_close(model(**batch)["logits"], logits)
    if projection is None:
        assert torch.equal(rows, prompt.rows)


def test_autocast(model, batch):
    DeepPrompt(model.config, 4).attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch)["logits"]
    torch.testing.assert_close(rounded, model(**batch)["logits"], atol=0.05, rtol=0.05)


def test_a_copy_of_the_model_has_a_prompt_of_its_own(model, batch):
    DeepPrompt(model.config, 4).attach(model)
    before = model(**batch)["logits"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.deep_prompt.rows.normal_(std=3)
    assert torch.equal(model(**batch)["logits"], before)
    assert not torch.allclose(other(**batch)["logits"], before)


def test_inputs_must_leave_room_for_the_shift(model, tokenizer):
    DeepPrompt(model.config, 10).attach(model)
    long = torch.full((1, 54), 5)
    model(long, torch.ones_like(long))
    long = torch.full((1, 55), 5)
    with pytest.raises(ValueError, match="at most 54 tokens, since positions are shifted by 10, got 55"):
        model(long, torch.ones_like(long))


def test_errors(model):
    from transformers import XLMRobertaConfig

    with pytest.raises(ValueError, match="position_offset at least 0, got 0, None and None"):
        DeepPrompt(model.config, 0)
    with pytest.raises(ValueError, match="2 layers, 2 heads and hidden size 32, got 12, 12, 768"):
        with torch.device("meta"):
            from transformers import XLMRobertaModel

            full = XLMRobertaModel(XLMRobertaConfig(vocab_size=10))
        DeepPrompt(model.config, 4).attach(full)
    with pytest.raises(ValueError, match=r"shape \(4, 128\) and no projection, got \(4, 32\)"):
        DeepPrompt(model.config, 4, rows=torch.zeros(4, 32))
    prompt = DeepPrompt(model.config, 4).attach(model)
    two_dimensional = torch.ones(1, 5)
    with pytest.raises(ValueError, match=r"mask \[B, 1, L, L\], got another kind; call model.set_attn_implementation"):
        model.roberta.encoder.layer[0].attention.self(torch.zeros(1, 5, 32), attention_mask=two_dimensional)
    with pytest.raises(ValueError, match="without 'deep_prompt', it has one"):
        prompt.attach(model)
