"""Soft prompt tuning of causal language models, on tiny random XGLM and BLOOM models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.tiny_causal import HIDDEN, causal_model, causal_tokenizer
from helpers.tiny_texts import TinyText
from torch import nn
from torch.nn import functional as F

from ltp_sparse.models import (
    TOPIC_WORDS,
    TOPICS,
    CausalPrompt,
    PromptedCausalLM,
    collator,
    encode_prompted,
    vocabulary_loss,
    word_tokens,
)
from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.weights.names import canonical_parameters

KINDS = ("xglm", "bloom")
CLASSES = ("a", "b", "c")
WORD_IDS = (7, 21, 30)


TEXTS = [TinyText("w1 w2 w3", "b"), TinyText("w4", "a"), TinyText("w5 w6 w7 w8 w9", "c"), TinyText("w2 w9", "a")]


@pytest.fixture(scope="module")
def tokenizer():
    return causal_tokenizer()


def prompted(kind: str, n=3, bottleneck=None) -> PromptedCausalLM:
    model = causal_model(kind)
    return PromptedCausalLM(model, CausalPrompt(n, HIDDEN, bottleneck), WORD_IDS).eval()


def reference(model: PromptedCausalLM, batch) -> torch.Tensor:
    """Logits of the whole vocabulary [B, V], text by text, with the prompt as further rows of the embedding matrix."""
    whole = copy.deepcopy(model)
    lookup, prompt = whole.get_input_embeddings(), model.prompt()
    size = lookup.weight.shape[0]
    lookup.weight = nn.Parameter(torch.cat([lookup.weight, prompt]))
    base = getattr(whole, whole.base_model_prefix)
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()].clone()
        ids[-1 - len(prompt) : -1] = size + torch.arange(len(prompt))
        rows.append(model.lm_head(base(ids[None]).last_hidden_state[0, -2]))
    return torch.stack(rows)


def batch_of(tokenizer, side="right", n=3, texts=TEXTS):
    return collator(tokenizer.pad_token_id, side)(encode_prompted(tokenizer, texts, CLASSES, n))


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_layout(tokenizer):
    (example,) = encode_prompted(tokenizer, [TinyText("w1 w2", "c")], CLASSES, 3)
    ids = example["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["▁w1", "▁w2"]
    assert len(ids) == 6
    assert ids[-1] == tokenizer.eos_token_id
    assert example["prompt_positions"] == [2, 3, 4]
    assert example["labels"] == 2


def test_only_the_text_is_cut(tokenizer):
    long = TinyText(" ".join(f"w{i}" for i in range(20)), None)
    (example,) = encode_prompted(tokenizer, [long], CLASSES, 4, max_length=10)
    assert tokenizer.convert_ids_to_tokens(example["input_ids"][:5]) == [f"▁w{i}" for i in range(5)]
    assert len(example["input_ids"]) == 10
    assert example["prompt_positions"] == [5, 6, 7, 8]
    assert example["labels"] == IGNORED_LABEL
    with pytest.raises(ValueError, match=r"max_length at least n_prompt \+ 2, got 4 and 5"):
        encode_prompted(tokenizer, [long], CLASSES, 4, max_length=5)
    many = TinyText(" ".join(["w1"] * 300), None)
    assert len(encode_prompted(tokenizer, [many], CLASSES, 4)[0]["input_ids"]) == 128


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_positions_follow_the_padding(tokenizer, side):
    batch = batch_of(tokenizer, side)
    rows = torch.arange(len(TEXTS))
    assert (batch["input_ids"][rows, batch["prompt_positions"][:, -1] + 1] == tokenizer.eos_token_id).all()
    last = batch["attention_mask"].cumsum(1).argmax(1)
    assert (batch["prompt_positions"][:, -1] == last - 1).all()


def test_topics_and_words():
    assert [TOPIC_WORDS["xglm"][topic] for topic in TOPICS] == [
        "science", "travel", "politics", "sports", "health", "entertainment", "earth",
    ]  # fmt: skip
    assert [TOPIC_WORDS["bloom"][topic] for topic in TOPICS] == [
        "science", "travel", "government", "play", "health", "fun", "earth",
    ]  # fmt: skip


def test_topics_are_those_of_the_data(shared_data):
    assert TOPICS == tuple((shared_data / "sib200" / "labels.txt").read_text().split())


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_are_one_token(kind):
    words = TOPIC_WORDS[kind]
    tokenizer = causal_tokenizer(tuple(words.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = word_tokens(tokenizer, words)
    assert tokenizer.convert_ids_to_tokens(tokens) == [f"▁{words[topic]}" for topic in TOPICS]


def test_a_split_word_falls_back_to_its_last_piece_and_says_so(tokenizer):
    words = {"a": "w1", "b": "w2", "c": "earth"}
    with pytest.warns(UserWarning, match=r"'earth' to be one token, got .*'h'.*the last one, 'h', is used") as caught:
        tokens = word_tokens(tokenizer, words, CLASSES)
    assert tokenizer.convert_ids_to_tokens(tokens) == ["▁w1", "▁w2", "h"]
    assert caught[0].filename == __file__


def test_word_errors(tokenizer):
    with pytest.raises(ValueError, match="a word for each of a, b, c, none for 'c'"):
        word_tokens(tokenizer, {"a": "w1", "b": "w2"}, CLASSES)
    with pytest.raises(ValueError, match="the same token"):
        word_tokens(tokenizer, {"a": "w1", "b": "w1", "c": "w2"}, CLASSES)
    with pytest.raises(ValueError, match="no piece for 'zzz'"):
        word_tokens(tokenizer, {"a": "w1", "b": "zzz", "c": "w2"}, CLASSES)


# --- the prompt -------------------------------------------------------------------------------------------------------


def test_rows_start_uniform_or_as_given():
    rows = CausalPrompt(100, 100).rows
    assert -0.5 <= rows.min() < -0.49
    assert 0.49 < rows.max() <= 0.5
    given = torch.arange(8.0).view(2, 4)
    assert torch.equal(CausalPrompt(2, 4, rows=given)(), given)


def test_reparameterisation_is_the_formula_without_residual():
    prompt = CausalPrompt(3, 8, 5)
    first, last, norm = prompt.mlp[0], prompt.mlp[2], prompt.mlp[3]
    with torch.no_grad():
        norm.weight.uniform_()
        norm.bias.uniform_()
    inner = F.relu(prompt.rows @ first.weight.T + first.bias) @ last.weight.T + last.bias
    centred = inner - inner.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(prompt(), expected)
    baked = CausalPrompt(3, 8, rows=prompt.bake())
    assert torch.equal(baked(), prompt())
    assert not prompt.bake().requires_grad


def test_compat_leaves_the_norm_at_its_initial_values():
    prompt = CausalPrompt(3, 8, 5, compat=True)
    assert set(dict(prompt.named_parameters())) == {"rows", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    ours = CausalPrompt(3, 8, 5)
    ours.load_state_dict(prompt.state_dict(), strict=False)
    assert torch.equal(ours(), prompt())


@pytest.mark.parametrize(("bottleneck", "count"), [(None, 10_240), (200, 10_240 + 410_824 + 2_048)])
def test_sizes(bottleneck, count):
    with torch.device("meta"):
        prompt = CausalPrompt(10, 1024, bottleneck)
    assert sum(parameter.numel() for parameter in prompt.parameters()) == count


def test_prompt_errors():
    with pytest.raises(ValueError, match="at least 1, got 0, 8 and None"):
        CausalPrompt(0, 8)
    with pytest.raises(ValueError, match="at least 1, got 2, 8 and 0"):
        CausalPrompt(2, 8, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 8\), got \(4, 9\)"):
        CausalPrompt(4, 8, rows=torch.zeros(4, 9))


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bottleneck", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_an_extended_embedding_matrix(tokenizer, kind, bottleneck, side):
    model = prompted(kind, bottleneck=bottleneck)
    batch = batch_of(tokenizer, side)
    outputs, vocabulary = model(**batch), reference(model, batch)
    torch.testing.assert_close(outputs["logits"], vocabulary[:, WORD_IDS])
    torch.testing.assert_close(outputs["log_partition"], vocabulary.logsumexp(-1))
    words = torch.tensor(WORD_IDS)[batch["labels"]]
    torch.testing.assert_close(outputs["loss"], F.cross_entropy(vocabulary, words))
    assert outputs["logits"].std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_changes_the_answer_and_what_follows_it_does_not(tokenizer, kind):
    model = prompted(kind)
    batch = batch_of(tokenizer)
    before = model(**batch)["logits"]
    batch["input_ids"][batch["input_ids"] == tokenizer.eos_token_id] = 9
    assert torch.equal(model(**batch)["logits"], before)
    with torch.no_grad():
        model.prompt.rows[0] += torch.randn(HIDDEN)  # a constant would vanish in the LayerNorm
    assert not torch.allclose(model(**batch)["logits"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_runs_at_one_position(tokenizer, kind):
    model = prompted(kind)
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    model(**batch_of(tokenizer))
    assert shapes == [(len(TEXTS), HIDDEN)]


def test_loss_of_a_part_of_a_batch(tokenizer):
    model = prompted("xglm")
    batch = batch_of(tokenizer)
    batch["labels"][1] = IGNORED_LABEL
    labels = batch.pop("labels")
    outputs = model(**batch)
    whole = vocabulary_loss(outputs, labels)
    parts = [
        vocabulary_loss({name: tensor[rows] for name, tensor in outputs.items()}, labels[rows], 3)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    keep = torch.tensor([0, 2, 3])
    words = torch.tensor(WORD_IDS)[labels[keep]]
    torch.testing.assert_close(whole, F.cross_entropy(reference(model, batch)[keep], words))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_gradients_reach_the_prompt_only(tokenizer, kind):
    model = prompted(kind, bottleneck=6)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("prompt."))
    model(**batch_of(tokenizer))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("prompt.")
    assert model.prompt.rows.grad.abs().sum() > 0


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unfrozen_gradients_reach_the_tied_matrix_from_both_ends(tokenizer, kind, sparse):
    model = prompted(kind)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.get_input_embeddings().sparse = sparse
    batch = batch_of(tokenizer)
    model(**batch)["loss"].backward()
    grad = model.get_input_embeddings().weight.grad
    grad = grad.to_dense() if grad.is_sparse else grad
    whole = reference(model, batch)
    expected = torch.autograd.grad(
        F.cross_entropy(whole, torch.tensor(WORD_IDS)[batch["labels"]]), model.lm_head.weight
    )
    seen = batch["input_ids"].unique()
    unseen = torch.ones(len(grad), dtype=torch.bool).index_fill(0, seen, False)
    torch.testing.assert_close(grad[unseen], expected[0][unseen])  # the reference's lookup is a copy
    assert not torch.allclose(grad[batch["input_ids"][0, 0]], expected[0][batch["input_ids"][0, 0]])


@pytest.mark.parametrize(("kind", "tied"), [("xglm", "model.embed_tokens"), ("bloom", "transformer.word_embeddings")])
def test_weights_are_shared_and_names_canonical(kind, tied):
    inner = causal_model(kind)
    names = canonical_parameters(inner)
    model = PromptedCausalLM(inner, CausalPrompt(3, HIDDEN), WORD_IDS)
    own = canonical_parameters(model)
    assert f"{tied}.weight" in own
    assert "lm_head.weight" not in own
    assert set(own) == {*names, "prompt.rows"}
    assert all(own[name] is names[name] for name in names)
    assert set(model.state_dict()) == {*inner.state_dict(), "prompt.rows"}


def test_model_errors(tokenizer):
    inner = causal_model("bloom")
    with pytest.raises(ValueError, match="hidden size 32, that of the language model, got 8"):
        PromptedCausalLM(inner, CausalPrompt(2, 8), WORD_IDS)
    with pytest.raises(ValueError, match=r"tokens below 60, the rows of the embedding, got \(1, 60\)"):
        PromptedCausalLM(inner, CausalPrompt(2, HIDDEN), (1, 60))
    with pytest.raises(ValueError, match="the input has 2 prompt slots, the prompt 3 rows; encode with n_prompt=3"):
        prompted("bloom")(**batch_of(tokenizer, n=2))
    inner.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="of type xglm or bloom, got 'gpt2'"):
        PromptedCausalLM(inner, CausalPrompt(2, HIDDEN), WORD_IDS)
