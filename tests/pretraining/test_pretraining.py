"""Pre-training a small model: tokenizer, batches, resume to the same bits, losses beside a unigram model; mini-xlmr."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import ltp_sparse
from ltp_sparse.models.backbone import load_backbone
from ltp_sparse.pretraining import (
    Documents,
    PretrainSettings,
    Sentences,
    Translations,
    held_out_losses,
    mini_xlmr,
    parallel_embeddings,
    pretrain,
    start_from,
    train_tokenizer,
)
from ltp_sparse.tasks.generated.inference import documents, sentences
from ltp_sparse.tasks.generated.languages import LANGUAGES
from ltp_sparse.weights.locating import MINI_XLMR

ANSWERS = [word for language in LANGUAGES.values() for word in language.answers.values()]
SETTINGS = PretrainSettings(steps=6, tokens=256, warm_up=2, bf16=False, save_steps=2)


@pytest.fixture(scope="module")
def text():
    return list(documents(600))


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer([document.text for document in text], 1200, ANSWERS)


def model_of(tokenizer):
    return mini_xlmr(len(tokenizer), hidden=32, layers=1, positions=64)


def sources(tokenizer, text):
    plain = {language: sentences(60, language) for language in ("en", "sw")}
    return [(3, Sentences(plain, tokenizer, length=32)), (1, Documents(text, tokenizer))]


def test_tokenizer_has_the_layout_of_xlmr(tokenizer, text, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert loaded.mask_token_id == len(loaded) - 1 < 1200
    assert loaded(text[0].text)["input_ids"] == tokenizer(text[0].text)["input_ids"]
    assert all(3 not in ids for ids in loaded([document.text for document in text])["input_ids"])
    for word in ANSWERS:
        assert len(loaded(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_tokenizer_parts_punctuation_and_drops_case_and_vowel_marks(tokenizer):
    assert tokenizer.tokenize("The man.") == tokenizer.tokenize("the man .")
    assert tokenizer.tokenize("\u0643\u064e") == tokenizer.tokenize("\u0643")
    text = "is it true? the man sleeps."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_needs_text():
    with pytest.raises(ValueError, match="expected texts"):
        train_tokenizer(["", ""], 100)


def test_blocks_of_sentences(tokenizer):
    source = Sentences({"en": sentences(400, "en"), "sw": sentences(100, "sw")}, tokenizer, length=32)
    assert 1.5 < source.shares["en"] / source.shares["sw"] < 2.5  # the square root of four
    batch = source.draw(np.random.default_rng(0), 32 * 400)
    assert batch.tokens.shape == batch.seen.shape == batch.chosen.shape == (400, 32)
    assert (batch.tokens[:, 0] == 0).all()
    assert not batch.chosen[batch.tokens < 4].any()
    assert torch.equal(batch.seen[~batch.chosen], batch.tokens[~batch.chosen])
    words = int((batch.tokens >= 4).sum())
    assert abs(int(batch.chosen.sum()) / words - 0.15) < 0.02
    hidden = batch.seen[batch.chosen] == tokenizer.mask_token_id
    kept = batch.seen[batch.chosen] == batch.tokens[batch.chosen]
    assert abs(hidden.float().mean() - 0.8) < 0.04 and abs(kept.float().mean() - 0.1) < 0.04
    again = source.draw(np.random.default_rng(0), 32 * 400)
    assert torch.equal(batch.seen, again.seen) and torch.equal(batch.tokens, again.tokens)


def test_begins_predict_the_rarest_masked_piece_of_their_text(tokenizer):
    plain = {"en": sentences(200, "en")}
    rng = np.random.default_rng(0)
    batch = Sentences(plain, tokenizer, length=32, summarise=True).draw(rng, 32 * 50)
    as_before = Sentences(plain, tokenizer, length=32).draw(np.random.default_rng(0), 32 * 50)
    assert torch.equal(batch.seen, as_before.seen)
    begins = as_before.tokens == tokenizer.bos_token_id
    assert torch.equal(batch.tokens[~begins], as_before.tokens[~begins])
    asked = 0
    for row, begin in begins.nonzero().tolist():
        after = begins[row, begin + 1 :].nonzero()
        end = begin + 1 + int(after[0]) if len(after) else begins.shape[1]
        pieces = as_before.tokens[row, begin:end][as_before.chosen[row, begin:end]]
        assert bool(batch.chosen[row, begin]) == bool(len(pieces))
        assert batch.tokens[row, begin] == (pieces.max() if len(pieces) else tokenizer.bos_token_id)
        asked += len(pieces) > 0
    assert asked > 50


def test_answers_of_documents_are_always_masked(tokenizer, text):
    batch = Documents(text, tokenizer).draw(np.random.default_rng(0), 4000)
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(["\u2581" + word for word in ANSWERS]))
    lengths = (batch.tokens != tokenizer.pad_token_id).sum(1)
    last = batch.tokens[torch.arange(len(lengths)), lengths - 3]  # before the stop and </s>
    asks = torch.isin(last, answers)
    assert 0.5 < asks.float().mean() < 1
    rows = asks.nonzero()[:, 0]
    assert batch.chosen[rows, lengths[rows] - 3].all()
    assert (batch.seen[rows, lengths[rows] - 3] == tokenizer.mask_token_id).all()
    alone = batch.chosen[rows].sum(1) == 1
    assert 0.7 < alone.float().mean() < 0.9
    assert not batch.chosen[batch.tokens < 4].any()


def test_words_of_parallel_rows_lie_near_their_translations():
    """24 words in two made-up languages, rows of four of them: the nearest word of the other language is it."""
    rng = np.random.default_rng(0)
    english, other = ([letter + word for word in "bakdufigemon" for letter in letters] for letters in ("st", "pl"))
    picks = [rng.choice(24, 4, replace=False) for _ in range(400)]
    rows = [{"en": " ".join(english[i] for i in row), "xx": " ".join(other[i] for i in reversed(row))} for row in picks]
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], 200, english + other)
    found = parallel_embeddings(rows, tokenizer, 24)
    assert torch.equal(found, parallel_embeddings(rows, tokenizer, 24))
    ids = [torch.tensor(tokenizer.convert_tokens_to_ids(["\u2581" + w for w in words])) for words in (english, other)]
    assert torch.equal((found[ids[0]] @ found[ids[1]].T).argmax(1), torch.arange(24))
    lengths = found.norm(dim=1)
    assert torch.allclose(lengths[torch.cat(ids)], torch.ones(48)) and not lengths[:4].any()

    model = model_of(tokenizer)
    before = model.roberta.embeddings.word_embeddings.weight.detach().clone()
    start_from(model, torch.nn.functional.pad(found, (0, 8)))
    after = model.lm_head.decoder.weight.detach()
    assert torch.equal(after[lengths == 0], before[lengths == 0])
    assert torch.allclose(after[ids[0]].norm(dim=1), before[4:].norm(dim=1).mean(), rtol=0.1)


def test_parallel_embeddings_need_rows(tokenizer):
    with pytest.raises(ValueError, match="expected at least 40 rows for 24 dimensions, got 1"):
        parallel_embeddings([{"en": "the man", "de": "der Mann"}], tokenizer, 24)


def test_words_learn_at_their_own_rate(tokenizer, text):
    model = model_of(tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = PretrainSettings(steps=1, tokens=256, warm_up=1, weight_decay=0.0, bf16=False, word_rate=0.1)
    pretrain(model, sources(tokenizer, text), settings, progress=False)
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert moved["lm_head.decoder.weight"] == pytest.approx(1.5e-4, rel=1e-2)  # Adam's first step
    assert moved["lm_head.dense.weight"] == pytest.approx(1.5e-3, rel=1e-2)


def test_translations_are_of_one_row_in_two_languages(tokenizer):
    rows = [{language: sentences(1, language, seed=row)[0] for language in ("en", "de", "sw")} for row in range(30)]
    encoded = [
        {tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:14]) for text in row.values()} for row in rows
    ]
    batch = Translations(rows, tokenizer, length=32).draw(np.random.default_rng(0), 1000)
    assert batch.tokens.shape[1] <= 32
    for tokens in batch.tokens.tolist():
        first = tokens.index(2)
        second = tokens.index(2, first + 2)
        assert tokens[0] == 0 and tokens[first + 1] == 2 and set(tokens[second + 1 :]) <= {tokenizer.pad_token_id}
        one, two = tuple(tokens[1:first]), tuple(tokens[first + 2 : second])
        assert one != two and any({one, two} <= row for row in encoded)
    assert not batch.chosen[batch.tokens < 4].any() and batch.chosen.any()


class Interrupted(Exception):
    pass


class Breaking:
    """A source that fails at its nth batch."""

    def __init__(self, source, n):
        self.source, self.left = source, n

    def draw(self, rng, tokens):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return self.source.draw(rng, tokens)


def test_an_interrupted_run_ends_with_the_same_bits(tokenizer, text, tmp_path):
    whole, parts, fresh = (model_of(tokenizer) for _ in range(3))
    [(_, source), _] = sources(tokenizer, text)
    pretrain(whole, [(1, source)], SETTINGS, progress=False)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        pretrain(parts, [(1, Breaking(source, 5))], SETTINGS, checkpoint=checkpoint, progress=False)
    with pytest.raises(ValueError, match="other settings"):
        pretrain(fresh, [(1, source)], PretrainSettings(steps=7), checkpoint=checkpoint, progress=False)
    pretrain(fresh, [(1, source)], SETTINGS, checkpoint=checkpoint, progress=False)
    again = model_of(tokenizer)
    pretrain(again, [(1, Breaking(source, 0))], SETTINGS, checkpoint=checkpoint, progress=False)  # it is at its end
    assert torch.equal(again.lm_head.bias, fresh.lm_head.bias)
    for one, other in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_it_learns_and_beats_the_unigram_model(tokenizer, text):
    training = {"en": sentences(300, "en"), "de": sentences(300, "de")}
    held_out = {"en": sentences(40, "en", seed=1)}
    model = model_of(tokenizer)
    before = held_out_losses(model, tokenizer, training, held_out, length=32, tokens=4096)
    settings = PretrainSettings(steps=60, tokens=1024, learning_rate=1e-2, warm_up=10, bf16=True)
    pretrain(model, [(1, Sentences(training, tokenizer, length=32))], settings, progress=False)
    after = held_out_losses(model, tokenizer, training, held_out, length=32, tokens=4096)
    assert before["en"][1] == after["en"][1]
    assert after["en"][0] < after["en"][1] < before["en"][0]
    assert not model.training


def test_unigram_loss_is_that_of_counted_frequencies(tokenizer):
    word = tokenizer(LANGUAGES["en"].answers["entailment"], add_special_tokens=False)["input_ids"][0]
    line = " ".join([LANGUAGES["en"].answers["entailment"]] * 5)
    losses = held_out_losses(model_of(tokenizer), tokenizer, {"en": [line] * 8}, {"en": [line]}, length=16, tokens=4096)
    counts = Counter({word: 40})
    expected = -math.log((counts[word] + 1) / (counts.total() + len(tokenizer)))
    assert losses["en"][1] == pytest.approx(expected)


def test_mini_xlmr_is_what_its_card_says():
    folder = Path(ltp_sparse.__file__).parent / "mini_xlmr"
    card = (folder / "README.md").read_text(encoding="utf-8")
    model, tokenizer = load_backbone(MINI_XLMR, decoupled=False)
    size = model.num_parameters()
    assert 5e6 <= size <= 9e6 and f"{size:,} parameters" in card
    assert f"{len(tokenizer):,} pieces" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
    assert model.dtype == torch.float32
    for word in ANSWERS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_mini_xlmr_knows_sentences_it_never_saw():
    model, tokenizer = load_backbone(MINI_XLMR, decoupled=False)
    unseen = {
        "en": ["the children went to school in the morning .", "he was born in a small town near the river ."] * 8
    }
    ours, unigram = held_out_losses(model, tokenizer, {"en": sentences(400, "en")}, unseen, tokens=4096)["en"]
    assert ours < 0.7 * unigram
