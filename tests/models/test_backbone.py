"""Backbones: the tied matrix, the decoupled LM head, and what loading refuses (traps 1 to 3 of docs/papers.md)."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForMaskedLM

from ltp_sparse import Ticket, canonical_parameters
from ltp_sparse.models.backbone import backbone_from_config, decouple, is_decoupled, load_backbone
from ltp_sparse.selection import pools
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.weights.names import is_layer_norm

E_IN, E_OUT = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"


def tiny_config(vocab_size=60):
    return XLMRobertaConfig(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, type_vocab_size=1,
    )  # fmt: skip


def tiny_model(*, decoupled=True):
    model = backbone_from_config(tiny_config(), decoupled=decoupled).eval()
    with torch.no_grad():  # a bias that is seen when it is lost
        model.lm_head.bias.normal_()
    return model


def tiny_tokenizer(words=50, pad_token="<pad>"):
    special = ["<s>", pad_token, "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(words)), "<mask>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token=pad_token, eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", padding_side="left",
    )  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 16).view(2, 6)).logits


@pytest.fixture(scope="module")
def base_config():
    """XLM-R-base; used on the meta device only."""
    return XLMRobertaConfig(
        vocab_size=250_002, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("decoupled", "total"), [(False, 278_295_186), (True, 470_296_722)], ids=["tied", "decoupled"])
def test_xlm_r_base_has_the_known_sizes(base_config, decoupled, total):
    """Trap 1: newer transformers list the tied matrix as lm_head.decoder.weight only."""
    with torch.device("meta"):
        model = backbone_from_config(base_config, decoupled=decoupled)
    parameters = canonical_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == total
    assert (E_OUT in parameters) == decoupled
    ticket = Ticket.full(model, pool=pools.maskable)
    assert (ticket.n, len(ticket.names)) == (277_414_656, 147)
    assert entries_for(ticket.n, density=0.2) == 55_482_931
    assert entries_for(ticket.n, density=0.75) == 208_060_992
    assert Ticket.full(model, pool=pools.without_embeddings).n == 85_017_600
    assert {Ticket.full(model, pool=pools.segment(s, 12)).n for s in ("lower", "middle", "upper")} == {28_339_200}
    assert sum(p.numel() for name, p in parameters.items() if is_layer_norm(name)) == 38_400


def test_layer_norm_of_the_head_is_not_a_frozen_layer_norm():
    """Trap 3: the rule is the substring LayerNorm."""
    parameters = canonical_parameters(tiny_model())
    assert not is_layer_norm("lm_head.layer_norm.weight") and "lm_head.layer_norm.weight" in parameters
    assert not any(name.startswith("lm_head.") for name in parameters if pools.maskable(name))


def test_decoupling_copies_and_freezes():
    model = tiny_model(decoupled=False)
    assert not is_decoupled(model)
    before, config = logits(model), model.config
    assert decouple(model) is model and model.config is config and config.tie_word_embeddings is False
    assert is_decoupled(model)
    assert torch.equal(model.lm_head.decoder.weight, model.roberta.embeddings.word_embeddings.weight)
    assert not model.lm_head.decoder.weight.requires_grad
    assert model.roberta.embeddings.word_embeddings.weight.requires_grad
    assert model.lm_head.decoder.bias is model.lm_head.bias and model.lm_head.bias.requires_grad
    assert torch.equal(logits(model), before)


def test_config_of_the_caller_is_not_touched():
    config = tiny_config()
    assert backbone_from_config(config).config.tie_word_embeddings is False
    assert config.tie_word_embeddings is True


def test_output_embedding_gets_no_gradient_of_the_input_embedding():
    model = tiny_model()
    model(input_ids=torch.arange(4, 10)[None], labels=torch.arange(4, 10)[None]).loss.backward()
    seen = model.roberta.embeddings.word_embeddings.weight.grad.abs().sum(1) > 0
    assert seen.nonzero().flatten().tolist() == list(range(4, 10))  # tied, every row would get a gradient
    assert model.lm_head.decoder.weight.grad is None


@pytest.mark.parametrize("retie", ["tie_weights", "init_weights", "save", "copy", "resize"])
def test_nothing_ties_it_again(retie, tmp_path):
    """Trap 2: transformers ties again in saving, loading, resizing and initialising."""
    model = tiny_model()
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight += 1
    e_in, e_out = (module.weight.detach().clone() for module in (model.get_input_embeddings(), model.lm_head.decoder))
    if retie == "save":
        model.save_pretrained(tmp_path)
    elif retie == "copy":
        model = copy.deepcopy(model)
    elif retie == "resize":
        model.resize_token_embeddings(70, mean_resizing=False)
        decouple(model)
        assert model.lm_head.decoder.bias is model.lm_head.bias and len(model.lm_head.bias) == 70
    else:
        getattr(model, retie)()
    assert is_decoupled(model)
    assert torch.equal(model.get_input_embeddings().weight[:60], e_in)
    assert torch.equal(model.lm_head.decoder.weight[:60], e_out)
    assert not model.lm_head.decoder.weight.requires_grad


@pytest.mark.parametrize("loader", ["load_backbone", "transformers"])
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "tied"])
def test_saved_folder_gives_the_same_model(decoupled, loader, tmp_path):
    """Also without this library: an untied folder must hold the bias under both names."""
    model = tiny_model(decoupled=decoupled)
    if decoupled:
        with torch.no_grad():
            model.roberta.embeddings.word_embeddings.weight += 1
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if loader == "load_backbone":
        loaded, _ = load_backbone(tmp_path, decoupled=decoupled)
        assert loaded.lm_head.decoder.bias is loaded.lm_head.bias
        assert loaded.lm_head.decoder.weight.requires_grad != decoupled
    else:
        loaded = XLMRobertaForMaskedLM.from_pretrained(tmp_path)
    assert is_decoupled(loaded) == decoupled
    assert torch.equal(logits(loaded.eval()), logits(model))
    before, after = canonical_parameters(model), canonical_parameters(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loading(tmp_path):
    tiny_model(decoupled=False).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model, tokenizer = load_backbone(tmp_path / "model", tokenizer=tmp_path / "tokenizer", dtype=torch.bfloat16)
    assert is_decoupled(model) and model.dtype is torch.bfloat16
    assert tokenizer.padding_side == "right"  # trap 4


def test_loading_refuses(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "nothing")
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone("./nothing")
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(words=100).save_pretrained(folder)
    with pytest.raises(ValueError, match="105 tokens, the model 60"):
        load_backbone(folder)
    wrong_pad = tiny_tokenizer()
    wrong_pad.pad_token = "<s>"
    wrong_pad.save_pretrained(folder)
    with pytest.raises(ValueError, match="pad id 1, got mask id 54 and pad id 0"):
        load_backbone(folder)
    from transformers import RobertaConfig

    RobertaConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match="of type 'xlm-roberta' or 'bert', got 'roberta'"):
        load_backbone(folder)


def test_incomplete_folders_are_refused_in_one_line(tmp_path):
    tiny_model(decoupled=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected the files of a tokenizer in .*model', found none; save it there"):
        load_backbone(tmp_path / "model")  # transformers would make one in which every word is unknown
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert load_backbone(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="complete model or tokenizer in .*: Error while deserializing") as damaged:
        load_backbone(tmp_path / "model")
    weights.unlink()
    with pytest.raises(ValueError, match="complete model or tokenizer in .*: Error no file named") as missing:
        load_backbone(tmp_path / "model")
    with pytest.raises(ValueError, match="no model 'no-such-name'.*the Hub cannot be reached; closest: 'xlm-") as hub:
        load_backbone("no-such-name")
    assert all("\n" not in str(error.value) for error in (damaged, missing, hub))


@pytest.mark.slow
def test_real_tokenizer_fits(shared_data, tmp_path):
    config = tiny_config(vocab_size=250_002)
    backbone_from_config(config).save_pretrained(tmp_path)
    _, tokenizer = load_backbone(tmp_path, tokenizer=shared_data / "tokenizers" / "xlm_roberta_base")
    assert tokenizer.mask_token_id == 250_001
    assert [len(tokenizer.tokenize(f" {word}")) for word in ("right", "wrong", "maybe", "the")] == [1, 1, 1, 1]


def rewritten(folder, change):
    """A folder of the tiny model, its tensors changed."""
    from safetensors.torch import load_file, save_file

    tiny_model(decoupled=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return folder


QUERY = "roberta.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "lm_head" not in n}, "5 weights of the model are not in its files"),
        (lambda t: {n: v for n, v in t.items() if n != QUERY}, f"1 weights of the model are not .*'{QUERY}'"),
        (lambda t: {f"module.{n}": v for n, v in t.items()}, "have no place in the model, e.g. 'module.lm_head"),
        (lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}, "have no place in the model, e.g. '_orig_mod.lm_head"),
        (lambda t: {**t, "lora_A.weight": torch.zeros(2)}, "1 weights there have no place .*'lora_A.weight'"),
        (lambda t: {**t, QUERY: t[QUERY][:-1].clone()}, f"1 weights have another shape there .*'{QUERY}'"),
        (lambda t: {**t, QUERY: t[QUERY] / 0}, f"'{QUERY}': .* holds NaN or infinite values"),
    ],
)
def test_no_weight_is_left_random(change, message, tmp_path):
    """transformers logs a line and goes on with random weights."""
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(rewritten(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "roberta.pooler.dense.weight": torch.zeros(16, 16)},
        lambda t: {**t, "roberta.embeddings.position_ids": torch.arange(20)},
        lambda t: {**t, E_OUT: t[E_IN].clone(), "lm_head.decoder.bias": t["lm_head.bias"].clone()},
    ],
)
def test_what_a_language_model_does_not_need_may_be_there(change, tmp_path):
    assert load_backbone(rewritten(tmp_path, change))


def test_another_model_is_no_language_model_and_is_refused(tmp_path):
    from transformers import XLMRobertaForSequenceClassification

    XLMRobertaForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not in its files, e.g. 'lm_head.bias'.*e.g. 'classifier.dense.bias'"):
        load_backbone(tmp_path)
