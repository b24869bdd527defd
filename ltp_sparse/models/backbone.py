"""Language models to train: loading masked ones (XLM-R, BERT) and causal ones, and decoupling the LM head."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ltp_sparse.models.bert import xlm_roberta_config, xlm_roberta_tensors
from ltp_sparse.weights.locating import _SHIPPED, SIZES, locate  # noqa: F401 (`_SHIPPED` by its place before)
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.reading import FileFormatError, reader

if TYPE_CHECKING:
    from transformers import (
        BloomForCausalLM,
        PreTrainedTokenizerBase,
        XGLMForCausalLM,
        XLMRobertaConfig,
        XLMRobertaForMaskedLM,
    )

_DECODER_BIAS = "lm_head.decoder.bias"
_SPARE = re.compile(r"(^|\.)(pooler|seq_relationship)\.|(^|\.)position_ids$")


@reader("model")
def load_backbone(
    name_or_path: str | os.PathLike[str],
    *,
    decoupled: bool = True,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[XLMRobertaForMaskedLM, PreTrainedTokenizerBase]:
    """An `XLMRobertaForMaskedLM` and its tokenizer, from a local folder or the Hub.

    A BERT is turned into the XLM-R that computes the same (`ltp_sparse.models.bert`), and is saved as one.

    Args:
        name_or_path: a folder, a Hub name, or "mini-xlmr", the small model that comes with this package.
        decoupled: gives the LM head its own frozen copy of the word embedding (`decouple`). A model that was saved
            decoupled always stays so.
        dtype: dtype of the weights. Changes of about 1e-4 vanish in bfloat16, so train float32 weights, under autocast
            if you like.
        tokenizer: folder or Hub name of the tokenizer, if it is not in the folder of the weights.

    Raises:
        ValueError: the folder or name does not exist; a file is missing or damaged; it is another architecture; the
            files lack a weight, hold one of another shape, or hold weights without a place in the model (no LM head,
            names with a prefix); a weight is NaN or infinite; the tokenizer is empty or does not fit the model.
    """
    from transformers import BertForMaskedLM, XLMRobertaForMaskedLM

    source, local, config = _read_config("load_backbone", name_or_path)
    kinds = {"xlm-roberta": XLMRobertaForMaskedLM, "bert": BertForMaskedLM}
    if (kind := config.model_type) not in kinds:
        raise ValueError(
            "load_backbone: expected a masked language model of type 'xlm-roberta' or 'bert', got "
            f"{kind!r} in {source!r}; pass a folder or Hub name such as 'FacebookAI/xlm-roberta-base'"
        )
    target = xlm_roberta_config(config) if kind == "bert" else config
    model = _complete("load_backbone", kinds[kind], source, config=config, dtype=dtype, local_files_only=local)
    if kind == "bert":
        weights = xlm_roberta_tensors(model.state_dict(), target.pad_token_id)
        model = backbone_from_config(target, decoupled=False, dtype=model.dtype)
        model.load_state_dict(weights)
        del weights
    if decoupled or not config.tie_word_embeddings:
        decouple(model)
    loaded = _load_tokenizer("load_backbone", name_or_path if tokenizer is None else tokenizer)
    _check_tokenizer(loaded, model.config)
    return model, loaded


@reader("causal model")
def load_causal(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[XGLMForCausalLM | BloomForCausalLM, PreTrainedTokenizerBase]:
    """An XGLM or BLOOM language model and its tokenizer, from a local folder or the Hub.

    Args:
        name_or_path: a folder or a Hub name.
        dtype: dtype of the weights.
        tokenizer: folder or Hub name of the tokenizer, if it is not in the folder of the weights.

    Raises:
        ValueError: as in `load_backbone`.
    """
    from transformers import AutoModelForCausalLM

    source, local, config = _read_config("load_causal", name_or_path)
    if config.model_type not in ("xglm", "bloom"):
        raise ValueError(
            f"load_causal: expected a model of type xglm or bloom, got {config.model_type!r} in {source!r}; pass a "
            "folder or Hub name such as 'facebook/xglm-564M' or 'bigscience/bloom-560m'"
        )
    model = _complete("load_causal", AutoModelForCausalLM, source, config=config, dtype=dtype, local_files_only=local)
    return model, _load_tokenizer("load_causal", name_or_path if tokenizer is None else tokenizer)


def backbone_from_config(
    config: XLMRobertaConfig, *, decoupled: bool = True, dtype: torch.dtype = torch.float32
) -> XLMRobertaForMaskedLM:
    """An `XLMRobertaForMaskedLM` with random weights from torch's global generator. It can be on the meta device."""
    from transformers import XLMRobertaForMaskedLM

    # a copy of the config, since decoupling changes it
    model = XLMRobertaForMaskedLM(type(config).from_dict(config.to_dict())).to(dtype)
    return decouple(model) if decoupled else model


def decouple(model: XLMRobertaForMaskedLM) -> XLMRobertaForMaskedLM:
    """Unties the LM head in place: `lm_head.decoder.weight` becomes a frozen copy of the word embedding.

    `lm_head.bias` and `decoder.bias` stay one parameter. A decoder that is already separate keeps its values and is
    frozen. Call this again after `resize_token_embeddings`, which splits the bias of an untied model.
    `config.tie_word_embeddings` becomes False; otherwise saving, loading and resizing would tie the two again.
    transformers 5 then stops tying the bias too, so that a saved folder gets both names of the bias and loads anywhere.

    Returns:
        The same model.
    """
    head, embedding = model.lm_head, model.get_input_embeddings()
    if head.decoder.weight is embedding.weight:
        head.decoder.weight = nn.Parameter(embedding.weight.detach().clone())
    head.decoder.weight.requires_grad_(False)
    if head.decoder.bias.shape == head.bias.shape:
        head.decoder.bias = head.bias
    else:  # resize_token_embeddings of an untied model resizes the decoder and leaves lm_head.bias behind
        head.bias = head.decoder.bias
    model.config.tie_word_embeddings = False
    # tie_weights(recompute_mapping=False) reads this public attribute instead of the config
    model.all_tied_weights_keys = {}
    if not getattr(model, "saves_both_biases", False):
        model.register_state_dict_post_hook(_save_both_biases)
        model.saves_both_biases = True
    return model


def longest_input(config: XLMRobertaConfig) -> int:
    """How many tokens an XLM-R has positions for. The first position is behind the padding index."""
    return config.max_position_embeddings - config.pad_token_id - 1


def is_decoupled(model: Any) -> bool:
    """Whether the LM head reads another tensor than the word embedding."""
    return model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def _save_both_biases(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    # shared tensors are saved under one name, and a loader that does not tie them would leave the other one zero
    name = prefix + _DECODER_BIAS
    if name in state_dict:
        state_dict[name] = state_dict[name].clone()


def _complete(what: str, cls: Any, source: str, **options: Any) -> Any:
    """`cls.from_pretrained`, with an error for absent weights, which transformers makes random with a mere warning.

    Raises:
        FileFormatError: a weight of the model is not in the files or has another shape there, or the files hold weights
            without a place in the model, as under names with a prefix.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings are the error below
    try:
        with _loading(what, source):
            model, found = cls.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    finally:
        logging.set_verbosity(verbosity)
    named = canonical_parameters(model)
    missing = sorted({named.called(name) or name for name in found["missing_keys"]} - set(named.buffers))
    reshaped = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in found["mismatched_keys"])
    # a language model has no pooler, and files can hold a tied parameter under several names
    strange = sorted(n for n in found["unexpected_keys"] if named.called(n) is None and not _SPARE.search(n))
    problems = [
        f"{text}, e.g. {names[0]!r}"
        for names, text in (
            (missing, f"{len(missing)} weights of the model are not in its files"),
            (reshaped, f"{len(reshaped)} weights have another shape there than the model"),
            (strange, f"{len(strange)} weights there have no place in the model"),
        )
        if names
    ]
    if problems:
        raise FileFormatError(
            source,
            f"{what}: expected all weights of a {type(model).__name__}: {'; '.join(problems)}. "
            "Weights that are not read would be random. Pass a checkpoint of the language model with its LM head, "
            "saved by save_pretrained without a wrapper around it",
        )
    for name, parameter in named.items():
        if parameter.numel() and not bool(torch.stack(torch.aminmax(parameter.detach())).isfinite().all()):
            raise FileFormatError(source, f"{what}: it holds NaN or infinite values; copy it again", repr(name))
    return model


def _read_config(what: str, name_or_path: str | os.PathLike[str]) -> tuple[str, bool, Any]:
    """(source, whether it is a folder, configuration)"""
    from transformers import AutoConfig

    source, local = locate(name_or_path)
    with _loading(what, source):
        return source, local, AutoConfig.from_pretrained(source, local_files_only=local)


@contextmanager
def _loading(what: str, source: str) -> Iterator[None]:
    """Turns any exception of `from_pretrained` for missing and damaged files into an error of one line."""
    try:
        yield
    except Exception as error:  # transformers and tokenizers raise all kinds of exceptions for damaged files
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise FileFormatError(
            source,
            f"{what}: expected a complete model or tokenizer in {source!r}, a folder or a Hub name: {reason}",
        ) from error


@reader("tokenizer")
def _load_tokenizer(what: str, name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source, local = locate(name_or_path)
    with _loading(what, source):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers makes such a tokenizer from a folder with only a config; every word would be unknown
        raise ValueError(
            f"{what}: expected the files of a tokenizer in {source!r}, found none; save it there, or pass tokenizer= "
            "(--tokenizer), its folder or Hub name"
        )
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: XLMRobertaConfig) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"load_backbone: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} embedding rows; "
            "pass the tokenizer that the model was trained with"
        )
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"load_backbone: expected a tokenizer with a mask token and pad id {config.pad_token_id}, got mask id "
            f"{tokenizer.mask_token_id} and pad id {tokenizer.pad_token_id}; pass an XLM-R tokenizer"
        )
    # with `inputs_embeds`, positions are counted from the left and ignore padding
    tokenizer.padding_side = "right"


@reader("config.json")
def load_config(what: str, name_or_path: str | os.PathLike[str]) -> Any:
    """The configuration of a model, from a local folder or the Hub, without its weights.

    Args:
        what: the caller's name, for messages.
        name_or_path: a folder or a Hub name. For a BERT, the configuration is that of the equal XLM-R. Those of XLM-R
            (`SIZES`) are known without a download.
    """
    from transformers import XLMRobertaConfig

    path = Path(name_or_path)
    if path.name in SIZES and not path.exists():
        hidden, layers, heads, inner = SIZES[path.name]
        return XLMRobertaConfig(
            vocab_size=250002, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, max_position_embeddings=514, type_vocab_size=1,
        )  # fmt: skip
    _, _, config = _read_config(what, name_or_path)
    return xlm_roberta_config(config) if config.model_type == "bert" else config
