"""Plots of tickets and results. matplotlib (extra `train` or `bench`) is needed only when one is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltp_sparse.recipes.recipe import Recipe, look_up
from ltp_sparse.report.escaping import for_plot
from ltp_sparse.report.tables import AVERAGE, make_table
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.files import atomic_path
from ltp_sparse.weights.names import natural_key


def plot_ticket(ticket: Ticket, path: str | os.PathLike[str], *, by: str = "layer") -> Path:
    """Draws the share of active entries per layer, module type or parameter.

    Args:
        ticket: the ticket.
        path: the file; its suffix (.png, .pdf, .svg) is the format.
        by: "layer", "module" or "parameter", as in `Ticket.counts`.
    """
    counts = {place: (k, n) for place, (k, n) in ticket.counts(by).items() if n}
    figure, axes = _figure(len(counts))
    places = [for_plot(place) for place in counts]
    axes.bar(places, [100 * k / n for k, n in counts.values()], color="tab:blue")
    for position, (k, _) in enumerate(counts.values()):  # in a row above all, where neither bars nor the line are
        axes.text(position, 1.02, _short(k), transform=axes.get_xaxis_transform(), ha="center", fontsize=7)
    axes.margins(x=0.01)
    axes.axhline(100 * ticket.density, color="tab:gray", linestyle="--", linewidth=1)
    axes.set_ylabel("active entries (%)")
    axes.set_title(
        f"{ticket.k:,} of {ticket.n:,} entries active; dashed: {100 * ticket.density:.4g} % overall",
        fontsize=9,
        pad=16,
    )
    return _save(figure, path)


def plot_accuracy(
    scores: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    errors: Mapping[str, Mapping[str, float]] | None = None,
    chance: float | None = None,
    title: str = "",
    metric: str = "accuracy",
) -> Path:
    """Draws accuracy, or another metric, per language, a bar per method.

    Args:
        scores: method -> language -> accuracy in [0, 1]; a language that a method lacks has no bar.
        path: the file; its suffix (.png, .pdf, .svg) is the format.
        errors: method -> language -> standard deviation over seeds, drawn as whiskers.
        chance: accuracy of guessing, drawn as a line.
        title: the title.
        metric: its name, for the axis.
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
            label=for_plot(method),
            yerr=[100 * spread.get(language, 0.0) for language in present] if spread else None,
            error_kw={"linewidth": 0.8, "capsize": 2},
        )
    if chance is not None:
        axes.axhline(100 * chance, color="tab:gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(languages)), [for_plot(language) for language in languages])
    axes.set_ylabel(f"{metric} (%)")
    axes.set_title(for_plot(title), fontsize=9)
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


Rows = Sequence[Mapping[str, Any]]
_NOTHING = (math.nan, math.nan)


def plot_density(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """Average score against the ticket's density, a line per number of shots (LTP, figure 2b)."""
    return _lines(rows, path, ("ticket.density", "shots"), "density of the ticket (%)", group="shots", factor=100)


def plot_shots(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """Average score against the number of shots, a line per label."""
    return _lines(rows, path, ("shots", "label"), "examples per class", log=True)


def plot_prompt_length(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """Average score against the length of the prompt, a line per label (SPT, figure 4)."""
    return _lines(rows, path, ("options.n", "label"), "prompt embeddings", log=True)


def plot_labels(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """Average score per label, a group of bars per number of shots: strategies and segments (LTP, figure 2a)."""
    table = make_table(rows, ("label", "shots"))
    scores: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for line in table.lines:
        label, shots = str(line.facts[0]), str(line.facts[1])
        mean, deviation = line.values[AVERAGE]
        scores.setdefault(label, {})[shots] = mean / 100
        errors.setdefault(label, {})[shots] = 0.0 if math.isnan(deviation) else deviation / 100
    return plot_accuracy(scores, path, errors=errors, title="average over languages, by examples per class")


def plot_languages(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """A heat map: lines of the table by language."""
    table = make_table(rows, recipe.by)
    grid = [[line.values.get(column, _NOTHING)[0] for column in table.columns] for line in table.lines]
    return _heat_map([line.facts for line in table.lines], table.columns, grid, path, "score (%)", "{:.0f}")


def plot_relative_change(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """A heat map of gains and losses in percent, against the line whose last fact is not set.

    In SPT's figure 5 these are reparameterised prompts against plain ones.
    """
    table = make_table(rows, recipe.by)
    plain = {line.facts[:-1]: line for line in table.lines if line.facts[-1] is None}
    changed = [line for line in table.lines if line.facts[-1] is not None and line.facts[:-1] in plain]
    if not changed:
        return None
    grid = []
    for line in changed:
        sides = (line.values, plain[line.facts[:-1]].values)
        means = ([side.get(column, _NOTHING)[0] for side in sides] for column in table.columns)
        grid.append([100 * (after / before - 1) if before > 0 else math.nan for after, before in means])
    return _heat_map([line.facts for line in changed], table.columns, grid, path, "change of the score (%)", "{:+.0f}")


def _heat_map(
    facts: Sequence[Sequence[Any]], columns: Sequence[str], grid: list[list[float]], path: Path, label: str, form: str
) -> Path:
    names = [for_plot(" ".join(str(fact) for fact in of_line if fact is not None)) for of_line in facts]
    figure, axes = _figure(len(columns) * 1.4)
    figure.set_size_inches(max(5.0, 0.55 * len(columns) + 2), max(2.0, 0.3 * len(names) + 1))
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [for_plot(column) for column in columns])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for y, line_of_values in enumerate(grid):
        for x, value in enumerate(line_of_values):
            if not math.isnan(value):
                axes.text(x, y, form.format(value), ha="center", va="center", fontsize=6, color="white")
    figure.colorbar(image, label=label)
    return _save(figure, path)


def plot_layers(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """The entries of each label's ticket by layer: attention below, all other parts above."""
    tickets = {str(row["label"]): row["active"] for row in rows if row["k"]}
    for row in rows:
        tickets |= {f"language SFT, {language}": active for language, active in row["language_active"].items()}
    if not tickets:
        return None
    places = sorted({p for active in tickets.values() for p in active}, key=natural_key)
    places.sort(key=lambda place: place != "embeddings")
    figure, axes = _figure(len(places) * (len(tickets) + 1) / 2)
    width = 0.8 / len(tickets)
    for position, (label, active) in enumerate(tickets.items()):
        total = sum(sum(counts) for counts in active.values())
        at = [i + (position - (len(tickets) - 1) / 2) * width for i in range(len(places))]
        attention = [100 * active.get(place, [0, 0])[0] / total for place in places]
        others = [100 * active.get(place, [0, 0])[1] / total for place in places]
        color = f"C{position}"
        axes.bar(at, attention, width, color=color, alpha=0.5)
        axes.bar(at, others, width, bottom=attention, color=color, label=for_plot(label))
    axes.set_xticks(range(len(places)), [for_plot(place) for place in places])
    axes.set_ylabel("share of the ticket (%)")
    axes.set_title("light: attention, full: other parts", fontsize=9)
    axes.legend(fontsize=7)
    return _save(figure, path)


def plot_overlap(rows: Rows, path: Path, recipe: Recipe) -> Path | None:
    """The share that tickets of two seeds of stage 1 have in common, against updates; a line per density and rate.

    Dashed: the same for random tickets.
    """
    lines: dict[tuple[float, float], dict[int, tuple[float, float]]] = {}
    for row in rows:
        facts = row.get("stage_1") or {}
        if "overlap" in facts and "updates" in facts:
            line = lines.setdefault((look_up(row, "ticket.density"), facts["learning_rate"]), {})
            line[facts["updates"]] = 100 * facts["overlap"]["share"], 100 * facts["overlap"]["chance"]
    if not lines:
        return None
    figure, axes = _figure(8)
    for position, ((density, rate), points) in enumerate(sorted(lines.items())):
        updates = sorted(points)
        shared, chance = zip(*(points[n] for n in updates), strict=True)
        label, color = f"{100 * density:g} %, rate {rate:g}", f"C{position}"
        axes.plot(updates, shared, marker="o", markersize=3, color=color, label=label)
        axes.plot(updates, chance, linestyle="--", linewidth=0.8, color=color)
    axes.set(xscale="log", xlabel="updates of stage 1", ylabel="shared by two seeds (%); dashed: chance")
    axes.legend(fontsize=7)
    return _save(figure, path)


PLOTS: dict[str, Callable[[Rows, Path, Recipe], Path | None]] = {
    "density": plot_density,
    "shots": plot_shots,
    "prompt-length": plot_prompt_length,
    "labels": plot_labels,
    "languages": plot_languages,
    "layers": plot_layers,
    "overlap": plot_overlap,
    "relative-change": plot_relative_change,
}
"""The plots that a recipe can name: (rows, file, recipe) -> the file, or None where there is nothing to draw."""


def _lines(
    rows: Rows, path: Path, by: tuple[str, str], x_label: str, *, group: str = "", factor: float = 1, log: bool = False
) -> Path | None:
    """Average score (y) against the first fact (x) times a factor, a line per second fact."""
    points: dict[Any, list[tuple[float, float, float]]] = {}
    for line in make_table(rows, by).lines:
        if line.facts[0] is not None:
            mean, deviation = line.values[AVERAGE]
            spread = 0.0 if math.isnan(deviation) else deviation
            points.setdefault(line.facts[1], []).append((factor * float(line.facts[0]), mean, spread))
    if not points:
        return None
    figure, axes = _figure(8)
    for name, of_line in points.items():
        xs, means, spreads = zip(*sorted(of_line), strict=True)
        axes.errorbar(xs, means, spreads, marker="o", markersize=3, capsize=2, label=for_plot(f"{name} {group}"))
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for of_line in points.values() for x, _, _ in of_line}))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=x_label, ylabel="average over languages (%)")
    axes.legend(fontsize=7)
    return _save(figure, path)
