"""Templates, verbalizers, prompt encoders and the prompted model."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_nli import CLUES, TinyPair, tiny_language_model, toy_pairs
from torch.nn import functional as F

from ltp_sparse.methods import Setup
from ltp_sparse.models.masked_prompt import PromptedMaskedLM
from ltp_sparse.models.prompt_encoder import PromptEncoder, vocabulary_rows
from ltp_sparse.prompting import (
    CLASSES,
    WORDS,
    Template,
    Verbalizer,
    cloze_template,
    collator,
    discrete_template,
    soft_template,
)
from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.prompting.templates import label_index, strip_punctuation
from ltp_sparse.recipes import results
from ltp_sparse.report import tables
from ltp_sparse.training import evaluation
from ltp_sparse.weights.names import canonical_parameters


def prompted(tokenizer, *, decoupled=True, kind="bilstm", n=4, seed=0) -> PromptedMaskedLM:
    language_model = tiny_language_model(len(tokenizer), decoupled=decoupled, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PromptEncoder(n, 32, kind)
    return PromptedMaskedLM(language_model, encoder, Verbalizer.for_language(tokenizer, "en")).eval()


def tokens_of(tokenizer, example) -> list[str]:
    return tokenizer.convert_ids_to_tokens(example["input_ids"])


# --- text preparation and templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He left.", "He left"),
        ("Why?!...", "Why"),
        ("...", "..."),
        ("", ""),
        ("a. ", "a. "),
        ("好。", "好。"),
        ('"x"', '"x'),
    ],
)
def test_trailing_ascii_punctuation_goes_unless_nothing_remains(text, expected):
    assert strip_punctuation(text) == expected


def test_soft_template_order_and_positions(tokenizer):
    (example,) = soft_template(4).encode(tokenizer, [TinyPair("word1 word2.", "word3!", "neutral")])
    assert tokens_of(tokenizer, example) == [
        "<s>", "▁word1", "▁word2", "▁", ".", "▁word3", "▁?",
        "<unk>", "<unk>", "<unk>", "<unk>", "<mask>", "▁", ".", "</s>",
    ]  # fmt: skip
    assert example["prompt_positions"] == [7, 8, 9, 10]
    assert example["mask_positions"] == 11
    assert example["labels"] == CLASSES.index("neutral") == 2


def test_templates_of_a_text(tokenizer):
    text = SimpleNamespace(text="word1 word2.", label="sports")
    classes = ("travel", "sports")
    (example,) = soft_template(2, "text").encode(tokenizer, [text], classes=classes)
    assert tokens_of(tokenizer, example) == [
        "<s>", "▁word1", "▁word2", "▁", ".", "<unk>", "<unk>", "<mask>", "▁", ".", "</s>",
    ]  # fmt: skip
    assert (example["prompt_positions"], example["mask_positions"], example["labels"]) == ([5, 6], 7, 1)
    (cut,) = soft_template(2, "text").encode(tokenizer, [text], classes=classes, max_length=10)
    assert tokens_of(tokenizer, cut)[:4] == ["<s>", "▁word1", "▁", "."]
    with pytest.raises(ValueError, match="max_length must be at least 10 .*one token of text each"):
        soft_template(2, "text").encode(tokenizer, [text], classes=classes, max_length=9)
    assert discrete_template("en", 3, "text").parts == ("{text}", ".", "Answer:", "{prompt}", "{mask}", ".")
    assert cloze_template("text").parts == ("{text}", ".", "{mask}", ".")
    with pytest.raises(ValueError, match="expected {text} 1 times"):
        Template(("{text}", "{text}", "{mask}"))


def test_class_order_of_the_loss():
    assert CLASSES == ("contradiction", "entailment", "neutral")
    assert label_index(None) == IGNORED_LABEL
    with pytest.raises(ValueError, match=r"label must be one of contradiction, entailment, neutral, got 'yes'"):
        label_index("yes")


@pytest.mark.slow
def test_each_part_is_encoded_on_its_own(xlmr_tokenizer):
    pair = TinyPair("He left.", "He stayed", "contradiction")
    (example,) = soft_template(2).encode(xlmr_tokenizer, [pair])
    ids = [xlmr_tokenizer.encode(part, add_special_tokens=False) for part in ("He left", ".", "He stayed", "?")]
    slots, mask = [xlmr_tokenizer.unk_token_id] * 2, [xlmr_tokenizer.mask_token_id]
    assert example["input_ids"] == [0, *(i for part in ids for i in part), *slots, *mask, *ids[1], 2]


def test_special_tokens_spelled_out_in_a_text_are_not_special(tokenizer):
    pair = TinyPair("word1 <mask> word2 </s>", "<pad> word3 <s>", "neutral")
    (example,) = soft_template(2).encode(tokenizer, [pair])
    ids = example["input_ids"]
    assert [ids.count(i) for i in (0, 1, 2, tokenizer.mask_token_id)] == [1, 0, 1, 1]
    assert ids[example["mask_positions"]] == tokenizer.mask_token_id


@pytest.mark.parametrize(
    ("premise", "hypothesis", "truncation", "kept"),
    [
        (30, 6, "longest_first", (14, 6)),
        (6, 30, "longest_first", (6, 14)),
        (30, 30, "longest_first", (10, 10)),
        (31, 30, "longest_first", (10, 10)),
        (12, 9, "longest_first", (11, 9)),
        (11, 9, "longest_first", (11, 9)),
        (30, 6, "hypothesis_first", (20, 0)),
        (15, 8, "hypothesis_first", (15, 5)),
    ],
)
def test_truncation(tokenizer, premise, hypothesis, truncation, kept):
    # <s>, ".", "?", 3 slots, <mask>, "." and </s> take 11 of 31 tokens.
    pair = TinyPair(" ".join(["word1"] * premise), " ".join(["word2"] * hypothesis), None)
    (example,) = soft_template(3).encode(tokenizer, [pair], max_length=31, truncation=truncation)
    words = tokens_of(tokenizer, example)
    assert (words.count("▁word1"), words.count("▁word2")) == kept
    assert len(words) == min(31, 11 + premise + hypothesis)
    assert words[example["mask_positions"]] == "<mask>"
    assert words[-1] == "</s>"


def test_longest_first_takes_one_token_at_a_time(tokenizer):
    """The closed form equals the definition: drop the last token of the longer text until all fits."""
    for premise in range(1, 25):
        for hypothesis in range(1, 25):
            p, h = premise, hypothesis
            while p + h > 13:
                p, h = (p - 1, h) if p > h else (p, h - 1)
            pair = TinyPair(" ".join(["word1"] * premise), " ".join(["word2"] * hypothesis), None)
            words = tokens_of(tokenizer, soft_template(1).encode(tokenizer, [pair], max_length=22)[0])
            assert (words.count("▁word1"), words.count("▁word2")) == (p, h)


def test_template_errors(tokenizer):
    with pytest.raises(ValueError, match="truncation must be one of .*, got 'left'"):
        soft_template().encode(tokenizer, [], truncation="left")
    with pytest.raises(ValueError, match=r"max_length must be at least 14 .* got 13"):
        soft_template(4).encode(tokenizer, toy_pairs(1), max_length=13)
    assert len(soft_template(4).encode(tokenizer, toy_pairs(1), max_length=14)[0]["input_ids"]) == 14
    with pytest.raises(ValueError, match=r"expected \{mask\} 1 times"):
        Template(("{premise}", "{hypothesis}"))
    with pytest.raises(ValueError, match=r"expected \{prompt\} 1 times with n_prompt=2, got 0"):
        Template(("{premise}", "{hypothesis}", "{mask}"), n_prompt=2)


def test_batches_are_padded_on_the_right(tokenizer):
    examples = soft_template(4).encode(tokenizer, toy_pairs(3))
    batch = collator(tokenizer.pad_token_id)(examples)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert batch["prompt_positions"].shape == (3, 4)
    rows = torch.arange(3)
    assert (batch["input_ids"][rows, batch["mask_positions"]] == tokenizer.mask_token_id).all()
    assert batch["labels"].tolist() == [0, 1, 2]


# --- verbalizers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_english_words_are_single_word_initial_pieces(xlmr_tokenizer):
    """Trap 10 with the real vocabulary."""
    verbalizer = Verbalizer.for_language(xlmr_tokenizer, "en")
    pieces = [xlmr_tokenizer.convert_ids_to_tokens(ids) for ids in verbalizer.token_ids]
    assert pieces == [["▁wrong"], ["▁right"], ["▁maybe"]]


@pytest.mark.parametrize("language", sorted(WORDS))
def test_every_language_has_three_tokens(xlmr_tokenizer, language):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verbalizer = Verbalizer.for_language(xlmr_tokenizer, language)
    last = [xlmr_tokenizer.encode(word, add_special_tokens=False)[-1] for word in WORDS[language]]
    assert [ids for (ids,) in verbalizer.token_ids] == last
    split = [word for word in WORDS[language] if len(xlmr_tokenizer.encode(word, add_special_tokens=False)) > 1]
    assert [word for word in split if any(repr(word) in str(w.message) for w in caught)] == split
    assert len(caught) == len(split)


def test_a_split_word_falls_back_to_its_last_piece_and_says_so(tokenizer):
    words = {"contradiction": "wrongoff", "entailment": "right", "neutral": ["maybe", "word1"]}
    with pytest.warns(
        UserWarning, match=r"'wrongoff' of class 'contradiction' is not one piece.*▁wrong \+ off; its last"
    ):
        verbalizer = Verbalizer.from_words(tokenizer, words)
    expected = [["off"], ["▁right"], ["▁maybe", "▁word1"]]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in verbalizer.token_ids] == expected
    with pytest.raises(ValueError, match="'wrongoff' of class 'contradiction' is not one piece"):
        Verbalizer.from_words(tokenizer, words, strict=True)


def test_english_words_that_split_are_an_error_at_load(tokenizer, monkeypatch):
    monkeypatch.setitem(WORDS, "en", ("wrongoff", "right", "maybe"))
    with pytest.raises(ValueError, match="use the model's tokenizer"):
        Verbalizer.for_language(tokenizer, "en")


def test_verbalizer_errors(tokenizer):
    with pytest.raises(ValueError, match="words are known for ar, .*, got 'qu'"):
        Verbalizer.for_language(tokenizer, "qu")
    with pytest.raises(ValueError, match="expected words for contradiction, entailment, neutral, got yes"):
        Verbalizer.from_words(tokenizer, {"yes": "right"})
    with pytest.raises(ValueError, match="'żółw' of class 'contradiction' is not in the tokenizer"):
        Verbalizer.from_words(tokenizer, {"contradiction": "żółw", "entailment": "right", "neutral": "maybe"})
    with pytest.raises(ValueError, match="not in the tokenizer, .* choose another word, e.g. 'right'"):
        Verbalizer.from_words(tokenizer, {"contradiction": "Right", "entailment": "wrong", "neutral": "maybe"})
    with pytest.raises(ValueError, match="the same token"):
        Verbalizer.from_words(tokenizer, {"contradiction": "right", "entailment": "right", "neutral": "maybe"})
    with pytest.raises(ValueError, match="expected words for good, bad, got good"):
        Verbalizer.from_words(tokenizer, {"good": "right"}, ("good", "bad"))


def test_verbalizer_of_other_classes_is_in_their_order(tokenizer):
    verbalizer = Verbalizer.from_words(tokenizer, {"bad": "wrong", "good": "right"}, ("good", "bad"))
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in verbalizer.token_ids] == [["▁right"], ["▁wrong"]]


# --- prompt encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count"), [("bilstm", 3_072 + 9_449_472 + 1_771_008), ("mlp", 3_072 + 2 * 590_592), ("none", 3_072)]
)
def test_prompt_encoder_sizes_of_the_full_model(kind, count):
    with torch.device("meta"):
        encoder = PromptEncoder(4, 768, kind)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    if kind == "bilstm":
        assert count == 11_223_552


def test_bilstm_encoder_is_the_formula():
    torch.manual_seed(0)
    encoder = PromptEncoder(3, 8)
    states = encoder.lstm(encoder.rows[None])[0][0]  # [n, 2H]
    first, last = encoder.mlp[0], encoder.mlp[2]
    expected = F.relu(states @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(encoder(), expected)
    assert first.weight.shape == (8, 16)


def test_rows_start_as_normal_draws_or_as_given():
    torch.manual_seed(0)
    rows = PromptEncoder(64, 64, "none").rows
    assert abs(rows.mean()) < 0.1
    assert abs(rows.std() - 1) < 0.05
    given = torch.arange(8.0).view(2, 4)
    encoder = PromptEncoder(2, 4, "mlp", rows=given)
    assert torch.equal(encoder.rows, given)
    assert encoder.rows.data_ptr() != given.data_ptr()


def test_vocabulary_rows_are_distinct_rows_without_the_excluded():
    embedding = torch.arange(10.0)[:, None].expand(10, 4)
    rows = vocabulary_rows(embedding, 6, seed=3, exclude=(0, 1, 2, 3))
    assert sorted(rows[:, 0].tolist()) == [4, 5, 6, 7, 8, 9]
    assert torch.equal(rows, vocabulary_rows(embedding, 6, seed=3, exclude=(0, 1, 2, 3)))
    assert not torch.equal(rows, vocabulary_rows(embedding, 6, seed=4, exclude=(0, 1, 2, 3)))
    with pytest.raises(ValueError, match=r"n must be in \[1, 6\] for this vocabulary, got 7"):
        vocabulary_rows(embedding, 7, seed=0, exclude=(0, 1, 2, 3))


def test_prompt_encoder_errors():
    with pytest.raises(ValueError, match="kind must be one of bilstm, mlp, none, got 'lstm'"):
        PromptEncoder(4, 8, "lstm")
    with pytest.raises(ValueError, match=r"shape \(4, 8\), got \(4, 9\)"):
        PromptEncoder(4, 8, rows=torch.zeros(4, 9))
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        PromptEncoder(0, 8)


# --- the prompted model -----------------------------------------------------------------------------------------------


def reference_logits(model, language_model, batch) -> torch.Tensor:
    """Class logits through the full-vocabulary forward of the language model, one pair at a time, unpadded."""
    rows = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        shift = int(real.long().argmax())  # padding on the left, if any
        ids = batch["input_ids"][row, real][None]
        embeddings = language_model.roberta.embeddings.word_embeddings(ids).clone()
        for slot, vector in zip(batch["prompt_positions"][row].tolist(), model.prompt_encoder(), strict=True):
            embeddings[0, slot - shift] = vector
        logits = language_model(inputs_embeds=embeddings).logits[0, batch["mask_positions"][row] - shift]
        rows.append(logits[model.word_ids])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["bilstm", "mlp", "none"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "tied"])
def test_logits_and_gradients_equal_the_full_vocabulary_forward(tokenizer, decoupled, kind):
    model = prompted(tokenizer, decoupled=decoupled, kind=kind)
    language_model = tiny_language_model(len(tokenizer), decoupled=decoupled)  # same weights, of its own
    batch = collator(1)(soft_template(4).encode(tokenizer, toy_pairs(6)))
    output = model(**batch)
    expected = reference_logits(model, language_model, batch)
    torch.testing.assert_close(output["logits"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["loss"], F.cross_entropy(expected, batch["labels"]), atol=1e-5, rtol=1e-5)

    output["loss"].backward()
    F.cross_entropy(expected, batch["labels"]).backward()
    mine = canonical_parameters(model)
    for name, parameter in canonical_parameters(language_model).items():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    if decoupled:
        assert model.lm_head.decoder.weight.grad is None
    else:
        assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight


def test_shares_the_language_model_under_its_names(tokenizer):
    language_model = tiny_language_model(len(tokenizer))
    model = PromptedMaskedLM(language_model, PromptEncoder(4, 32), Verbalizer.for_language(tokenizer))
    names = dict(model.named_parameters())
    for name, parameter in language_model.named_parameters():
        assert names[name] is parameter
    extra = set(names) - {name for name, _ in language_model.named_parameters()}
    assert extra
    assert all(name.startswith("prompt_encoder.") for name in extra)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_on_either_side(tokenizer, side):
    """Trap 4: positions of `inputs_embeds` would count padding."""
    model = prompted(tokenizer)
    batch = collator(1)(soft_template(4).encode(tokenizer, toy_pairs(3)))
    plain = model(**batch)["logits"]
    pad = torch.ones(3, 9, dtype=torch.long)
    if side == "right":
        batch["input_ids"] = torch.cat([batch["input_ids"], pad], 1)
    else:
        batch["input_ids"] = torch.cat([pad, batch["input_ids"]], 1)
        batch["prompt_positions"] += 9
        batch["mask_positions"] += 9
    batch["attention_mask"] = (batch["input_ids"] != 1).long()
    torch.testing.assert_close(model(**batch)["logits"], plain, atol=1e-5, rtol=1e-5)
    language_model = tiny_language_model(len(tokenizer))
    torch.testing.assert_close(plain, reference_logits(model, language_model, batch), atol=1e-5, rtol=1e-5)


def test_mask_embedding_is_looked_up_and_only_slots_pass_no_gradient(tokenizer):
    """Trap 5."""
    model = prompted(tokenizer)
    batch = collator(1)(soft_template(4).encode(tokenizer, [TinyPair("word1", "word2", "neutral")]))
    embedded = model._embed(batch["input_ids"], batch["prompt_positions"])[0]
    weight = model.get_input_embeddings().weight
    mask = batch["mask_positions"][0]
    assert torch.equal(embedded[mask], weight[tokenizer.mask_token_id])
    slots = batch["prompt_positions"][0]
    assert torch.equal(embedded[slots], model.prompt_encoder())

    model(**batch)["loss"].backward()
    gradient = weight.grad.abs().sum(1)
    used = set(batch["input_ids"][0].tolist()) - {tokenizer.unk_token_id}  # the slots hold <unk>
    assert set(gradient.nonzero().flatten().tolist()) == used
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.prompt_encoder.parameters())


def test_prompt_rows_go_in_before_positions_and_norm(tokenizer):
    """A prompt made of a word's embedding is that word."""
    model = prompted(tokenizer, kind="none", n=2)
    word = tokenizer.convert_tokens_to_ids("▁word7")
    with torch.no_grad():
        model.prompt_encoder.rows.copy_(model.get_input_embeddings().weight[[word, word]])
    batch = collator(1)(soft_template(2).encode(tokenizer, toy_pairs(2)))
    ids = batch["input_ids"].scatter(1, batch["prompt_positions"], word)
    language_model = tiny_language_model(len(tokenizer)).eval()
    logits = language_model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    expected = logits[torch.arange(2), batch["mask_positions"]][:, model.word_ids]
    torch.testing.assert_close(model(**batch)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_the_decoder_sees_only_masks_and_verbalizer_rows(tokenizer):
    """The LM head runs on [B, H], and nothing of the size of the vocabulary is made."""
    model = prompted(tokenizer)
    seen = []
    model.lm_head.dense.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model.lm_head.decoder.register_forward_hook(lambda *_: pytest.fail("the full decoder ran"))
    model(**collator(1)(soft_template(4).encode(tokenizer, toy_pairs(5))))
    assert seen == [(5, 32)]


def test_several_words_score_their_mean(tokenizer):
    language_model = tiny_language_model(len(tokenizer))
    words = {"contradiction": ["wrong", "word1", "word2"], "entailment": "right", "neutral": ["maybe", "word3"]}
    encoder = PromptEncoder(4, 32)
    model = PromptedMaskedLM(language_model, encoder, Verbalizer.from_words(tokenizer, words)).eval()
    batch = collator(1)(soft_template(4).encode(tokenizer, toy_pairs(3)))
    single = reference_logits(model, tiny_language_model(len(tokenizer)), batch)  # [3, 6] words
    expected = torch.stack([single[:, :3].mean(1), single[:, 3], single[:, 4:].mean(1)], 1)
    torch.testing.assert_close(model(**batch)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_pairs_without_a_label_are_left_out_of_the_loss(tokenizer):
    model = prompted(tokenizer)
    pairs = toy_pairs(3)
    unlabelled = [TinyPair(p.premise, p.hypothesis, None) for p in pairs]
    both = model(**collator(1)(soft_template(4).encode(tokenizer, pairs + unlabelled)))
    alone = model(**collator(1)(soft_template(4).encode(tokenizer, pairs)))
    torch.testing.assert_close(both["loss"], alone["loss"])
    batch = collator(1)(soft_template(4).encode(tokenizer, pairs))
    del batch["labels"]
    assert set(model(**batch)) == {"logits"}


def test_sparse_embedding_gradients_stay_sparse(tokenizer):
    """Tied, the input lookup and the verbalizer rows share a weight; both must give the same kind of gradient."""
    batch = collator(1)(soft_template(4).encode(tokenizer, toy_pairs(4)))
    dense, sparse = (prompted(tokenizer, decoupled=False) for _ in range(2))
    sparse.get_input_embeddings().sparse = True
    dense(**batch)["loss"].backward()
    sparse(**batch)["loss"].backward()
    gradient = sparse.get_input_embeddings().weight.grad
    assert gradient.is_sparse
    torch.testing.assert_close(gradient.to_dense(), dense.get_input_embeddings().weight.grad)


def test_bfloat16_autocast_stays_close_and_gives_float32_logits(tokenizer):
    model = prompted(tokenizer)
    batch = collator(1)(soft_template(4).encode(tokenizer, toy_pairs(4)))
    exact = model(**batch)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch)["logits"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(half, exact)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()  # torch's LSTM rounds differently when it records gradients
def test_baked_prompt_gives_the_same_bits(tokenizer, dtype):
    model = prompted(tokenizer)
    batch = collator(1)(soft_template(4).encode(tokenizer, toy_pairs(4)))
    rows = model.prompt_encoder.bake()
    assert rows.shape == (4, 32)
    assert not rows.requires_grad
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        before = model(**batch)["logits"]
        model.prompt_encoder = PromptEncoder(4, 32, "none", rows=rows)
        assert torch.equal(model(**batch)["logits"], before)


def test_model_errors(tokenizer):
    language_model = tiny_language_model(len(tokenizer))
    verbalizer = Verbalizer.for_language(tokenizer)
    with pytest.raises(ValueError, match="hidden size 32, that of the language model, got 16"):
        PromptedMaskedLM(language_model, PromptEncoder(4, 16), verbalizer)
    with pytest.raises(ValueError, match="token 5000, the model"):
        PromptedMaskedLM(language_model, PromptEncoder(4, 32), Verbalizer(((1,), (5000,))))
    model = prompted(tokenizer, n=4)
    batch = collator(1)(soft_template(3).encode(tokenizer, toy_pairs(1)))
    with pytest.raises(ValueError, match="3 prompt slots, the prompt encoder gives 4"):
        model(**batch)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_predictions_keep_the_order_of_the_pairs(tokenizer):
    model = prompted(tokenizer).train()
    examples = soft_template(4).encode(tokenizer, toy_pairs(11))
    with torch.no_grad():  # without this a random model gives the same class to all of them
        model.lm_head.decoder.bias[model.word_ids] -= model(**collator(1)(examples))["logits"].mean(0)
    together = evaluation.predict(model, examples, collator(1), batch_size=3)
    assert model.training
    model.eval()
    one_by_one = [model(**collator(1)([example]))["logits"].argmax().item() for example in examples]
    assert together.tolist() == one_by_one
    assert len(set(one_by_one)) > 1


def test_accuracy_per_language(tokenizer, monkeypatch):
    def encode(pairs):
        return soft_template(4).encode(tokenizer, pairs)

    ready = Setup(model=prompted(tokenizer), encode=encode, collate=collator(1))
    answers = {"en": torch.tensor([0, 1, 2, 0]), "sw": torch.tensor([0, 0, 0])}
    replies = iter(answers.values())
    monkeypatch.setattr(evaluation, "predict", lambda *args, **kwargs: next(replies))
    pairs = {"en": toy_pairs(4), "sw": toy_pairs(3, language="sw")}
    assert evaluation.evaluate(ready, pairs, progress=False) == {"en": 1.0, "sw": 1 / 3}
    with pytest.raises(ValueError, match="labelled examples in 'sw'"):
        evaluation.evaluate(ready, {"sw": [TinyPair("word1", "word2", None)]}, progress=False)
    with pytest.raises(ValueError, match="labelled examples in 'sw'"):
        evaluation.evaluate(ready, {"sw": []}, progress=False)


def test_rows_and_tables(tmp_path):
    runs = [
        evaluation.result_row({"en": 0.40, "sw": 0.30}, method="LTP", shots=4, seed=1),
        evaluation.result_row({"en": 0.44, "sw": 0.36}, method="LTP", shots=4, seed=2),
        evaluation.result_row({"en": 0.35, "sw": 0.31}, method="SP", shots=4, seed=1),
    ]
    assert runs[0]["mean"] == pytest.approx(0.35)
    for row in runs:
        results.append(tmp_path / "deep" / "rows.jsonl", row)
    rows = results.read(tmp_path / "deep" / "rows.jsonl")
    assert rows == runs
    table = tables.make_table(rows, ("method", "shots"))
    assert tables.markdown(table).splitlines() == [
        "| method | shots | runs | en | sw | AVG |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| LTP | 4 | 2 | **42.00 ± 2.83** | **33.00 ± 4.24** | **37.50 ± 3.54** |",
        "| SP | 4 | 1 | 35.00 | 31.00 | 33.00 |",
    ]
    assert table.means()["SP"] == pytest.approx({"en": 0.35, "sw": 0.31, "AVG": 0.33})


def test_a_row_that_a_kill_cut_off_is_left_out_and_not_glued_to_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    results.append(path, {"seed": 1})
    with path.open("a") as file:
        file.write('{"seed": 2, "sco')
    with path.open("ab") as file:
        file.write("\u00e9".encode()[:1])  # a character that was cut in two
    results.append(path, {"seed": 3})
    with pytest.warns(UserWarning, match="line 2: unfinished, left out"):
        assert results.read(path) == [{"seed": 1}, {"seed": 3}]


def test_toy_words_are_in_the_tiny_vocabulary(tokenizer):
    """The toy task is learnable only if no clue is unknown."""
    assert tokenizer.unk_token_id not in tokenizer(" ".join(CLUES.values()))["input_ids"]
    assert copy.copy(tokenizer).mask_token_id == len(tokenizer) - 1
