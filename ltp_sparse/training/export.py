"""Export: a trained model with merged weights, as a folder for transformers alone.

Methods with a head become a sequence classifier. Methods that score words become a plain masked language model with new
rows in the vocabulary: one for each prompt slot, and one for each label word with its row of the output embedding, so
that a decoupled LM head needs no second matrix. `standalone.py`, which is copied as `predict.py`, builds the inputs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
)

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.methods import METHODS
from ltp_sparse.methods.prompt_learning import BAKED_PROMPT, PromptMethod
from ltp_sparse.models import SequenceClassifier
from ltp_sparse.models.backbone import load_backbone
from ltp_sparse.models.masked_prompt import PromptedMaskedLM
from ltp_sparse.training.card import write_card
from ltp_sparse.training.method import load_trained
from ltp_sparse.weights.files import atomic_folder
from ltp_sparse.weights.hub import EXPORT, files_in, kind_held, upload
from ltp_sparse.weights.locating import locate
from ltp_sparse.weights.reading import FileFormatError

SCRIPT = "predict.py"

_NO_HEAD = -1.0
"""`classifier_dropout` of an exported masked language model, so that loading it as a classifier fails."""


def export(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    kind: str = "pair",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes config, merged weights, tokenizer, a model card and a `predict.py` that needs transformers only.

    Args:
        model: folder or Hub name of the base model.
        delta: the baked delta of a run (`Trained.baked`).
        output: the folder to write, new or empty. Its files appear together, when all are written.
        tokenizer: folder or Hub name of the tokenizer, if it is not with the model.
        kind: the kind of the examples, "pair" or "text".
        facts: for the model card: "data", a description of the training data, and "scores", rows of `evaluate`.

    Raises:
        ValueError: the method attaches modules, which models of transformers do not have, or `output` is the folder of
            the base model or of its tokenizer.
        OSError: `output` is not empty, or cannot be written.
    """
    for source in (model, model if tokenizer is None else tokenizer):
        where, local = locate(source)
        if local and Path(where).resolve() == Path(output).resolve():
            raise ValueError(
                f"export: expected another folder to write to, but {where!r} is the base model or tokenizer"
            )
    trained = SparseDelta.load(delta)
    language_model, pieces = load_backbone(
        model, decoupled=trained.metadata.get("decoupled", False), tokenizer=tokenizer
    )
    ready = load_trained(language_model, pieces, trained).model
    attached = [name for name in trained.dense if name != BAKED_PROMPT and not name.startswith("classifier.")]
    if attached or not isinstance(ready, PromptedMaskedLM | SequenceClassifier):
        raise ValueError(
            f"export: expected a method whose result is a model of transformers, got {trained.metadata['method']!r}, "
            f"which attaches modules ({', '.join(attached[:2])}); use ltp-sparse predict"
        )
    labels = trained.metadata["labels"]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if isinstance(ready, SequenceClassifier):
        plain = _classifier(language_model, ready, names)
        _read_pairs_as_trained(pieces)
    else:
        plain = _masked(language_model, ready, {**names, "prompt": _prompt(trained, kind)})
    pieces.model_max_length = trained.metadata["settings"]["max_length"]
    with atomic_folder(output) as folder:
        plain.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # safetensors makes its files private, whatever the umask
            weights.chmod((folder / "config.json").stat().st_mode)
        pieces.save_pretrained(folder)
        shutil.copyfile(Path(__file__).with_name("standalone.py"), folder / SCRIPT)
        write_card(folder / "README.md", str(model), trained, kind, dict(facts or {}))


def push_to_hub(folder: str | os.PathLike[str], name: str, *, private: bool = False) -> str:
    """Uploads an exported folder to a repository of the Hub, which is created if it is missing.

    Args:
        folder: a folder that `export` has written.
        name: the repository, owner/name. It replaces the folder in the card's example.
        private: whether a new repository is private.

    Returns:
        The address with the hash of the commit, which `ltp_sparse.load` accepts.

    Raises:
        FileFormatError: the folder is no export, or the repository holds something else.
        OSError: the Hub cannot be reached or refuses, e.g. without a token.
    """
    folder = Path(folder)
    if (held := kind_held(files_in(folder), folder)) != EXPORT:
        raise FileFormatError(folder, f"expected an {EXPORT}, but it holds a {held}")
    files: dict[str, Path | bytes] = {path: folder / path for path in files_in(folder)}
    if (card := folder / "README.md").is_file():
        files[card.name] = card.read_text(encoding="utf-8").replace('"FOLDER"', f'"{name}"').encode()
    return upload(name, files, message=f"An {EXPORT}", private=private)


def _classifier(language_model: Any, ready: SequenceClassifier, names: Mapping[str, Any]) -> PreTrainedModel:
    config = _config(language_model, **names, problem_type="single_label_classification")
    plain = XLMRobertaForSequenceClassification(config)
    plain.load_state_dict({k: v for k, v in ready.state_dict().items() if k.startswith(("roberta.", "classifier."))})
    return plain.to(ready.classifier.out_proj.weight.dtype)


def _masked(language_model: Any, ready: PromptedMaskedLM, facts: dict[str, Any]) -> PreTrainedModel:
    """The masked language model, with rows for prompt and label words at the end of its tied embedding."""
    embedding, head = language_model.get_input_embeddings().weight.detach(), language_model.lm_head
    encoder, ids = ready.prompt_encoder, ready.word_ids
    prompt = embedding[:0] if encoder is None else encoder.bake().to(embedding)
    words: Tensor = head.decoder.weight.detach()[ids] if ready.word_rows is None else ready.word_rows
    rows = torch.cat([embedding, prompt, words.to(embedding)])
    bias = head.decoder.bias.detach()
    bias = torch.cat([bias, bias.new_zeros(len(prompt)), bias[ids]])

    first = len(embedding)
    facts["prompt"]["slots"] = list(range(first, first + len(prompt)))
    places = iter(range(first + len(prompt), len(rows)))
    facts["prompt"]["words"] = [[next(places) for _ in of_class] for of_class in facts["prompt"]["words"]]
    task = {"impl": "predict.PromptPipeline", "pt": ["AutoModelForMaskedLM"], "type": "text"}
    config = _config(
        language_model,
        **facts,
        vocab_size=len(rows),
        tie_word_embeddings=True,
        classifier_dropout=_NO_HEAD,
        custom_pipelines={"text-classification": task, "sentiment-analysis": dict(task)},
    )
    plain = XLMRobertaForMaskedLM(config)
    state = {name: tensor for name, tensor in ready.state_dict().items() if name.startswith(("roberta.", "lm_head."))}
    state["roberta.embeddings.word_embeddings.weight"] = state["lm_head.decoder.weight"] = rows
    state["lm_head.bias"] = state["lm_head.decoder.bias"] = bias
    plain.load_state_dict(state)
    return plain.to(embedding.dtype)


def _config(language_model: Any, **facts: Any) -> Any:
    config = language_model.config
    return type(config).from_dict({**config.to_dict(), **facts})


def _prompt(trained: SparseDelta, kind: str) -> dict[str, Any]:
    """The facts from which `standalone.py` builds an input."""
    facts = trained.metadata
    method = METHODS[facts["method"]].from_description(facts)
    assert isinstance(method, PromptMethod)  # other methods that score words attach modules
    settings = {key: facts["settings"][key] for key in ("max_length", "truncation")}
    parts = list(method.template(facts["language"], kind).parts)
    return {"parts": parts, "words": facts["verbalizer"], **settings}


def _read_pairs_as_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the tokenizer encode a pair as `<s> A </s></s> B </s>`, as `encode_pairs` does."""
    start, end = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} {end} $B {end}",
        special_tokens=[(start, tokenizer.cls_token_id), (end, tokenizer.sep_token_id)],
    )
