"""Export: the trained weights merged, the prompt baked into the vocabulary, as a folder for transformers alone.

The n prompt rows become n new tokens, so that an input is plain text and the model a plain masked language model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ltp_sparse.delta import SparseDelta
from ltp_sparse.files import atomic_folder
from ltp_sparse.prompting import PromptedMaskedLM
from ltp_sparse.prompting.templates import CLASSES, soft_template
from ltp_sparse.training.backbone import decouple, load_backbone, locate
from ltp_sparse.training.method import load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCRIPT = '''"""Labels a sentence pair with torch and transformers alone: python predict.py PREMISE HYPOTHESIS."""

import json
import string
import sys
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent
PROMPT = json.loads((FOLDER / "prompt.json").read_text(encoding="utf-8"))


def encode(tokenizer, premise, hypothesis):
    """Token ids: every part of the template on its own, joined between <s> and </s>; long texts lose their ends."""
    special = set(tokenizer.all_special_ids)
    parts = {"{prompt}": tokenizer.convert_tokens_to_ids(PROMPT["tokens"]), "{mask}": [tokenizer.mask_token_id]}
    for part in PROMPT["parts"]:
        if part not in parts:
            parts[part] = tokenizer(part, add_special_tokens=False)["input_ids"]
    for part, text in (("{premise}", premise), ("{hypothesis}", hypothesis)):
        ids = tokenizer(text.rstrip(string.punctuation) or text, add_special_tokens=False)["input_ids"]
        parts[part] = [tokenizer.unk_token_id if token in special else token for token in ids]
    first, second = parts["{premise}"], parts["{hypothesis}"]
    while sum(len(parts[part]) for part in PROMPT["parts"]) > PROMPT["max_length"] - 2:
        cut_second = second if PROMPT["truncation"] == "hypothesis_first" else len(second) >= len(first)
        (second if cut_second else first).pop()
    ids = [token for part in PROMPT["parts"] for token in parts[part]]
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def predict(model, tokenizer, premise, hypothesis):
    """label -> score, the mean logit of its words at <mask>."""
    ids = torch.tensor([encode(tokenizer, premise, hypothesis)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, (ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]]
    return {label: logits[words].mean().item() for label, words in PROMPT["verbalizer"].items()}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForMaskedLM.from_pretrained(FOLDER).eval()
    scores = predict(model, tokenizer, *sys.argv[1:])
    print(max(scores, key=scores.get), scores)
'''


def export(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Writes config, merged weights, tokenizer, `prompt.json` and a `predict.py` that needs transformers alone.

    Args:
        model: folder or Hub name of the base model.
        delta: the baked delta of a run (`Trained.baked`).
        output: the folder to write, new or empty; it is there when all of it is.
        tokenizer: folder or Hub name of the tokenizer, where it is not beside the model.

    Raises:
        ValueError: the result has no soft prompt or is not of pairs, or `output` is the folder of the base model or of
            its tokenizer.
        OSError: `output` holds something, or cannot be written.
    """
    for source in (model, model if tokenizer is None else tokenizer):
        where, local = locate(source)
        if local and Path(where).resolve() == Path(output).resolve():
            raise ValueError(f"export: expected a folder of its own to write to, {where!r} holds what it is made from")
    trained = SparseDelta.load(delta)
    language_model, pieces = load_backbone(model, decoupled=trained.metadata["decoupled"], tokenizer=tokenizer)
    setup = load_trained(language_model, pieces, trained)
    prompted = setup.model
    if not isinstance(prompted, PromptedMaskedLM) or prompted.prompt_encoder is None:
        raise ValueError(
            f"export: expected the result of a method with a soft prompt, got {trained.metadata['method']!r}"
        )
    if tuple(trained.metadata["labels"]) != CLASSES:
        raise ValueError(
            f"export: expected a result for sentence pairs with the classes {', '.join(CLASSES)}, got one for "
            f"{', '.join(trained.metadata['labels'])}"
        )
    prompt = prompted.prompt_encoder.bake()
    tokens = _prompt_tokens(pieces, len(prompt))
    first = language_model.config.vocab_size
    pieces.add_tokens(tokens, special_tokens=True)
    ids = pieces.convert_tokens_to_ids(tokens)
    if max(ids) >= first:  # rows past the vocabulary may already exist as padding of the matrix
        language_model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        if trained.metadata["decoupled"]:
            decouple(language_model)  # resizing splits the bias of the LM head from its decoder's
    with torch.no_grad():
        language_model.get_input_embeddings().weight[ids] = prompt.to(language_model.dtype)
    with atomic_folder(output) as folder:
        _write(folder, language_model, pieces, tokens, trained.metadata)


def _write(
    output: Path,
    language_model: PreTrainedModel,
    pieces: PreTrainedTokenizerBase,
    tokens: list[str],
    metadata: dict[str, Any],
) -> None:
    language_model.save_pretrained(output)
    pieces.save_pretrained(output)
    verbalizer = dict(zip(CLASSES, metadata["verbalizer"], strict=True))
    parts = soft_template(len(tokens)).parts
    settings = {key: metadata["settings"][key] for key in ("max_length", "truncation")}
    description = {"parts": parts, "tokens": tokens, "verbalizer": verbalizer, "method": metadata["method"]}
    description |= settings
    (output / "prompt.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (output / "predict.py").write_text(_SCRIPT, encoding="utf-8")


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, n: int) -> list[str]:
    taken = set(tokenizer.get_vocab())
    tokens = [f"<p{i + 1}>" for i in range(n)]
    if taken & set(tokens):
        raise ValueError(f"export: the tokenizer already has the tokens {sorted(taken & set(tokens))}")
    return tokens
