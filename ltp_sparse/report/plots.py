"""Plots of tickets and results. matplotlib (extra `train` or `bench`) is needed only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.files import atomic_path

if TYPE_CHECKING:
    from ltp_sparse.ticket import Ticket


def plot_ticket(ticket: Ticket, path: str | os.PathLike[str], *, by: str = "layer") -> Path:
    """Draws where a ticket lives: the share of active entries per layer, module type or parameter.

    Args:
        path: the file; its suffix (.png, .pdf, .svg) is the format.
        by: "layer", "module" or "parameter", as in `Ticket.counts`.
    """
    counts = {place: (k, n) for place, (k, n) in ticket.counts(by).items() if n}
    figure, axes = _figure(len(counts))
    bars = axes.bar(list(counts), [100 * k / n for k, n in counts.values()], color="tab:blue")
    axes.bar_label(bars, [_short(k) for k, _ in counts.values()], fontsize=7)
    axes.axhline(100 * ticket.density, color="tab:gray", linestyle="--", linewidth=1)
    axes.set_ylabel("active entries (%)")
    axes.set_title(
        f"{ticket.k:,} of {ticket.n:,} entries active; dashed: {100 * ticket.density:.4g} % overall", fontsize=9
    )
    return _save(figure, path)


def plot_accuracy(
    scores: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    errors: Mapping[str, Mapping[str, float]] | None = None,
    chance: float | None = None,
    title: str = "",
) -> Path:
    """Draws accuracy per language, a bar per method.

    Args:
        scores: method -> language -> accuracy in [0, 1]; a language that a method lacks has no bar.
        path: the file; its suffix (.png, .pdf, .svg) is the format.
        errors: method -> language -> standard deviation over seeds, drawn as whiskers.
        chance: accuracy of guessing, drawn as a line.
    """
    languages = list(dict.fromkeys(language for row in scores.values() for language in row))
    figure, axes = _figure(len(languages) * (len(scores) + 1) / 2)
    width = 0.8 / max(len(scores), 1)
    for position, (method, row) in enumerate(scores.items()):
        present = [language for language in languages if language in row]
        spread = (errors or {}).get(method)
        axes.bar(
            [languages.index(language) + (position - (len(scores) - 1) / 2) * width for language in present],
            [100 * row[language] for language in present],
            width,
            label=method,
            yerr=[100 * spread.get(language, 0.0) for language in present] if spread else None,
            error_kw={"linewidth": 0.8},
        )
    if chance is not None:
        axes.axhline(100 * chance, color="tab:gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def _figure(bars: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(max(5.0, 0.45 * bars), 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelrotation=45 if bars > 8 else 0, labelsize=8)
    return figure, axes


def _short(count: int) -> str:
    """1234 -> "1.23k"."""
    value = float(count)
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)
    return path
