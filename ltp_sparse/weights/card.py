"""Cards: the README.md of a repository, with facts, scores and an example of use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ltp_sparse import __version__

_USE = {
    "ticket": """\
ticket = ls.load("{name}")
optimizer = ls.MaskedAdamW(model, ticket, lr=1e-3)  # trains the active entries, every other keeps its bits""",
    "delta": """\
delta = ls.load("{name}")
delta.apply(model)  # the base model above; delta.revert(model) gives it back bit for bit""",
    "run": """\
from ltp_sparse.models.backbone import load_backbone
from ltp_sparse.training.method import load_trained

delta = ls.load("{name}")
model, tokenizer = load_backbone({base!r}, decoupled=delta.metadata["decoupled"])  # the base model above
setup = load_trained(model, tokenizer, delta)  # setup.model(**setup.collate(setup.encode(examples)))["logits"]""",
}
"""Examples for a ticket, a delta, and a delta of `ltp-sparse train`, which includes prompt or head."""


def write_up(
    kind: str,
    name: str,
    *,
    active: str,
    base: str | None,
    data: str | None,
    scores: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
) -> str:
    """The card of a ticket or a delta.

    Args:
        kind: "ticket" or "delta".
        name: the repository, owner/name.
        active: the number of active entries, as text.
        base: Hub name of the base model.
        data: the data of selection or training, as text.
        scores: rows of `evaluate`, with "task", "metric" and "scores".
        metadata: that of the ticket or delta, JSON values.

    Returns:
        The text of the card.
    """
    facts = {
        "base model": base or "not stated; the fingerprint in the file identifies it",
        "active": active,
        "method": metadata.get("method", "not stated"),
        "data": data or metadata.get("source") or "not stated",
        **{key: metadata[key] for key in ("labels", "language", "seed", "epoch", "steps", "hub") if key in metadata},
        "made with": f"ltp_sparse {__version__}",
    }
    model = [] if base is None else [f"base_model: {json.dumps(base.partition('@')[0])}"]
    return "\n".join(
        [
            *front_matter("ltp_sparse", *model, f"tags: [ltp_sparse, {kind}]"),
            f"# A {kind}" + ("" if base is None else f" of {cell(base)}"),
            "",
            "| | |\n| --- | --- |",
            *(f"| {key} | {cell(value)} |" for key, value in facts.items()),
            "",
            "## Scores",
            "",
            *score_lines(scores),
            "",
            "## Use",
            "",
            "```python",
            "import ltp_sparse as ls  # pip install ltp-sparse[hub]",
            "",
            _USE["run" if "labels" in metadata else kind].format(name=name, base=base or "BASE MODEL"),
            "```",
            "",
        ]
    )


def front_matter(library: str, *lines: str) -> list[str]:
    """The lines at the top of a card that the Hub reads."""
    return ["---", f"library_name: {library}", *lines, "---", ""]


def score_lines(rows: Iterable[Mapping[str, Any]]) -> Sequence[str]:
    """A table of rows of `evaluate`, with their notes."""
    if not (rows := list(rows)):
        return ["There are none; `ltp-sparse evaluate` computes them."]
    lines = ["| data | metric | language | score | always the largest class |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        for language, score in row["scores"].items():
            largest = row.get("largest_class", {}).get(language)
            cells = [cell(row.get("task")), str(row.get("metric", "accuracy")), cell(language), f"{score:.4f}"]
            cells.append("" if largest is None else f"{largest:.4f}")
            lines.append("| " + " | ".join(cells) + " |")
    notes = dict.fromkeys(f"{cell(row.get('task'))}: {cell(n)}." for row in rows for n in row.get("notes", ()))
    return [*lines, "", *notes] if notes else lines


def cell(value: Any) -> str:
    """A fact as the text of a table cell, which cannot add columns, lines or tags."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
