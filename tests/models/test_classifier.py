"""The sequence classifier: its inputs, its head, and what it shares with the language model."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_nli import TinyPair, tiny_language_model, tiny_tokenizer, toy_pairs
from helpers.tiny_texts import TinyText
from torch.nn import functional as F

from ltp_sparse.models import SequenceClassifier, collator, encode_pairs, encode_texts
from ltp_sparse.prompting import CLASSES
from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.weights.names import canonical_parameters


def classifier(tokenizer, *, classes=3, linear=False, dropout=0.0) -> SequenceClassifier:
    language_model = tiny_language_model(len(tokenizer), dropout=dropout)
    torch.manual_seed(0)
    model = SequenceClassifier(language_model, classes, linear=linear)
    for parameter in model.classifier.parameters():  # logits of a fresh head are all but equal
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_pair_layout(tokenizer):
    (example,) = encode_pairs(tokenizer, [TinyPair("word1 word2.", "word3", "neutral")])
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert tokens == ["<s>", "▁word1", "▁word2", ".", "</s>", "</s>", "▁word3", "</s>"]
    assert example["labels"] == CLASSES.index("neutral")


def test_text_layout_and_labels(tokenizer):
    examples = encode_texts(tokenizer, [TinyText("word1 word2", "b"), TinyText("word3", None)], ("a", "b"))
    assert tokenizer.convert_ids_to_tokens(examples[0]["input_ids"]) == ["<s>", "▁word1", "▁word2", "</s>"]
    assert [example["labels"] for example in examples] == [1, IGNORED_LABEL]
    with pytest.raises(ValueError, match="label must be one of a, b, got 'c'"):
        encode_texts(tokenizer, [TinyText("word1", "c")], ("a", "b"))
    assert encode_texts(tokenizer, [], ("a", "b")) == encode_pairs(tokenizer, []) == []


@pytest.mark.slow
def test_layout_is_that_of_the_real_tokenizer(xlmr_tokenizer):
    pair = TinyPair("He left.", "Elle est restée !", None)
    assert (
        encode_pairs(xlmr_tokenizer, [pair])[0]["input_ids"]
        == xlmr_tokenizer(pair.premise, pair.hypothesis)["input_ids"]
    )
    assert (
        encode_texts(xlmr_tokenizer, [TinyText("He left.", None)], CLASSES)[0]["input_ids"]
        == xlmr_tokenizer("He left.")["input_ids"]
    )


def test_longest_first_takes_one_token_at_a_time(tokenizer):
    for premise in range(14):
        for hypothesis in range(14):
            p, h = premise, hypothesis
            while p + h > 9:
                p, h = (p - 1, h) if p > h else (p, h - 1)
            pair = TinyPair(" ".join(["word1"] * premise), " ".join(["word2"] * hypothesis), None)
            (example,) = encode_pairs(tokenizer, [pair], max_length=13)
            words = tokenizer.convert_ids_to_tokens(example["input_ids"])
            assert (words.count("▁word1"), words.count("▁word2")) == (p, h)


def test_long_text_loses_its_end(tokenizer):
    (example,) = encode_texts(tokenizer, [TinyText("word1 word2 word3 word4", None)], CLASSES, max_length=4)
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["<s>", "▁word1", "▁word2", "</s>"]


def test_special_tokens_spelled_out_are_not_special(tokenizer):
    (example,) = encode_pairs(tokenizer, [TinyPair("word1 </s> <mask>", "<s> <pad> word2", None)])
    ids = example["input_ids"]
    assert [ids.count(i) for i in (0, 1, 2, tokenizer.mask_token_id)] == [1, 0, 3, 0]


def test_input_errors(tokenizer):
    with pytest.raises(ValueError, match="max_length must be at least 6 .* got 5"):
        encode_pairs(tokenizer, toy_pairs(1), max_length=5)
    with pytest.raises(ValueError, match="max_length must be at least 3 .* got 2"):
        encode_texts(tokenizer, [], CLASSES, max_length=2)
    with pytest.raises(ValueError, match="side must be one of right, left, got 'middle'"):
        collator(1, "middle")


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches(tokenizer, side):
    examples = encode_pairs(tokenizer, toy_pairs(3))
    batch = collator(tokenizer.pad_token_id, side)(examples)
    for row, example in enumerate(examples):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row, real].tolist() == example["input_ids"]
        assert (batch["input_ids"][row, ~real] == tokenizer.pad_token_id).all()
        assert real[0 if side == "right" else -1]
    assert batch["labels"].tolist() == [0, 1, 2]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("linear", "count"), [(False, 592_899), (True, 768 * 3 + 3)])
def test_sizes_of_the_full_model(linear, count):
    from transformers import XLMRobertaConfig

    from ltp_sparse.models.backbone import backbone_from_config

    config = XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    with torch.device("meta"):
        model = SequenceClassifier(backbone_from_config(config), 3, linear=linear)
    assert sum(p.numel() for p in model.classifier.parameters()) == count
    assert sum(p.numel() for p in model.parameters()) == 277_453_056 + count
    if not linear:
        assert 277_453_056 + count == 278_045_955


def test_logits_and_loss_are_those_of_transformers(tokenizer):
    from transformers import XLMRobertaForSequenceClassification

    model = classifier(tokenizer)
    config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 3})
    theirs = XLMRobertaForSequenceClassification(config).eval()
    theirs.load_state_dict(model.state_dict())  # every name and shape fits
    batch = collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(5)))
    mine, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(mine["logits"], expected.logits)
    torch.testing.assert_close(mine["loss"], expected.loss)
    assert set(model(batch["input_ids"], batch["attention_mask"])) == {"logits"}


def test_linear_head_reads_the_first_token(tokenizer):
    model = classifier(tokenizer, classes=5, linear=True)
    batch = collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(4)))
    hidden = model.roberta(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
    head = model.classifier.out_proj
    logits = model(batch["input_ids"], batch["attention_mask"])["logits"]
    torch.testing.assert_close(logits, F.linear(hidden, head.weight, head.bias))
    assert logits.shape == (4, 5)


def test_the_head_starts_as_that_of_transformers():
    model = classifier(tiny_tokenizer())
    fresh = SequenceClassifier(model.roberta, 200).classifier
    assert abs(fresh.out_proj.weight.std() - model.config.initializer_range) < 0.002
    assert not fresh.out_proj.bias.any()
    assert not fresh.dense.bias.any()


def test_padding_changes_nothing(tokenizer):
    model = classifier(tokenizer)
    examples = encode_pairs(tokenizer, toy_pairs(6))
    alone = torch.cat([model(**collator(tokenizer.pad_token_id)([example]))["logits"] for example in examples])
    for side in ("right", "left"):
        together = model(**collator(tokenizer.pad_token_id, side)(examples))["logits"]
        torch.testing.assert_close(together, alone)
    assert alone.std() > 0.1


def test_examples_without_a_label_are_left_out_of_the_loss(tokenizer):
    model = classifier(tokenizer)
    batch = collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(4)))
    batch["labels"][1] = IGNORED_LABEL
    keep = torch.tensor([0, 2, 3])
    outputs = model(**batch)
    torch.testing.assert_close(outputs["loss"], F.cross_entropy(outputs["logits"][keep], batch["labels"][keep]))


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "tied"])
def test_weights_are_shared_and_names_canonical(tokenizer, decoupled):
    language_model = tiny_language_model(len(tokenizer), decoupled=decoupled)
    names = canonical_parameters(language_model)
    model = SequenceClassifier(language_model, 3)
    own = canonical_parameters(model)
    assert [name for name in own if not name.startswith("roberta.")] == [
        "classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias", "classifier.out_proj.weight",
    ]  # fmt: skip
    encoder = {name for name in names if name.startswith("roberta.")}
    assert {name for name in own if name.startswith("roberta.")} == encoder
    assert all(own[name] is names[name] for name in encoder)
    assert model.get_input_embeddings() is language_model.get_input_embeddings()


def test_gradients_reach_the_encoder_and_the_head(tokenizer):
    model = classifier(tokenizer)
    model(**collator(tokenizer.pad_token_id)(encode_pairs(tokenizer, toy_pairs(3))))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.classifier.parameters())
    assert model.roberta.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_too_few_classes(tokenizer):
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        classifier(tokenizer, classes=1)
