"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltp_sparse import __version__
from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.methods import METHODS
from ltp_sparse.weights.card import cell, front_matter, score_lines
from ltp_sparse.weights.files import write_text

_HOW = (
    "",
    "The classes are words at `<mask>` in a template with learned prompt embeddings, which transformers cannot",
    "build by itself: `predict.py` does. Prompt and label words are the last rows of the vocabulary. There is no",
    "classification head; `classifier_dropout` is -1 in `config.json`, so that loading one fails.",
)


def write_card(path: Path, base: str, trained: SparseDelta, kind: str, facts: Mapping[str, Any]) -> None:
    """Writes a card with the model, its training data, its scores, and an example of use.

    Args:
        path: the file.
        base: name of the base model.
        trained: the baked delta of a run.
        kind: the kind of the examples, "pair" or "text".
        facts: "data", a description of the training data; "scores", rows of `evaluate` with "task", "metric", "scores".
    """
    about, ticket = trained.metadata, trained.ticket
    method = METHODS[about["method"]]
    prompted, language = "verbalizer" in about, facts.get("language", about["language"])
    trust = ", trust_remote_code=True" if prompted else ""
    example = '{"text": "...", "text_pair": "..."}' if kind == "pair" else '"..."'
    entries = f"{ticket.k:,} of {ticket.n:,} entries" + (f" ({ticket.density:.2%})" if ticket.n else "")
    lines = [
        *front_matter("transformers", "pipeline_tag: text-classification", f"base_model: {json.dumps(base)}"),
        f"# {method.name} on {base}",
        "",
        f"| | |\n| --- | --- |\n| base model | {base} |",
        f"| method | {method.name} (`{about['method']}` of ltp_sparse {__version__}), seed {about['seed']} |",
        f"| trained | {entries} of the weights in its pool{', and a prompt' if prompted else ', and a head'} |",
        f"| classes | {cell(', '.join(about['labels']))} |",
        f"| training data | {cell(facts.get('data', 'unknown'))} |",
        *([] if language is None else [f"| language of training | {cell(language)} |"]),
        f"| kept | evaluation at epoch {about['epoch']:g}, {about['metric']} on dev {about['dev_score']:.4f} |",
        "",
        "## Scores",
        "",
        *score_lines(facts.get("scores", ())),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'classify = pipeline("text-classification", "FOLDER"{trust})',
        f"classify({example}, top_k=None)  # the probability of every class",
        "```",
        "",
        f"or `python predict.py TEXT{' SECOND' if kind == 'pair' else ''}`. "
        f"Inputs have at most {about['settings']['max_length']} tokens"
        + ("; longer ones are cut." if prompted else ": pass `truncation=True` for longer ones."),
        *(_HOW if prompted else ()),
        "",
    ]
    write_text(path, "\n".join(lines))
