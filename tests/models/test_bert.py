"""BERT as a backbone: the XLM-R that it becomes computes the same."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast, XLMRobertaForMaskedLM

from ltp_sparse.models.backbone import is_decoupled, load_backbone, load_config, longest_input
from ltp_sparse.weights.reading import FileFormatError


def saved(folder, pad_token_id=0, cls=BertForMaskedLM, **changes):
    """A tiny BERT with its tokenizer in a folder."""
    names = ["[CLS]", "[SEP]", "[UNK]"]
    names.insert(pad_token_id, "[PAD]")
    vocabulary = {token: i for i, token in enumerate([*names, "[MASK]", *(f"w{i}" for i in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(**{
        "vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": pad_token_id, "initializer_range": 0.5,
        **changes,
    })  # fmt: skip
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight[pad_token_id] = 0
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("decoupled", [False, True], ids=["tied", "decoupled"])
@pytest.mark.parametrize("pad_token_id", [0, 1])
def test_a_bert_gives_its_logits(tmp_path, pad_token_id, decoupled):
    bert = saved(tmp_path, pad_token_id)
    model, tokenizer = load_backbone(tmp_path, decoupled=decoupled)
    assert isinstance(model, XLMRobertaForMaskedLM) and is_decoupled(model) == decoupled
    assert longest_input(model.config) == longest_input(load_config("test", tmp_path)) == 20
    ids = torch.randint(5, 44, (3, 20), generator=torch.Generator().manual_seed(1))
    ids[1, 12:] = pad_token_id
    mask = (ids != pad_token_id).long()
    with torch.no_grad():
        theirs, ours = (m.eval()(input_ids=ids, attention_mask=mask).logits for m in (bert, model))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load_backbone(tmp_path / "again", decoupled=decoupled)
    assert torch.equal(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_an_xlm_roberta_cannot_be_is_refused(tmp_path):
    saved(tmp_path / "relu", hidden_act="relu")
    with pytest.raises(ValueError, match="expected a BERT with hidden_act 'gelu', got 'relu'"):
        load_backbone(tmp_path / "relu")
    saved(tmp_path / "headless", cls=BertModel)
    with pytest.raises(FileFormatError, match=r"weights of the model are not in its files.*with its LM head"):
        load_backbone(tmp_path / "headless")
