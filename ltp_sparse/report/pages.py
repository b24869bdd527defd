"""A report of a recipe's results: tables, plots, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltp_sparse.recipes.recipe import FOLDER, Recipe
from ltp_sparse.report.chance import chance_sheet
from ltp_sparse.report.escaping import Sheet, for_html, for_markdown
from ltp_sparse.report.kinship import kinship_sheet
from ltp_sparse.report.paired import MARGIN, compare, comparison_sheet, pool
from ltp_sparse.report.plots import PLOTS
from ltp_sparse.report.stage_1 import stage_1_sheet
from ltp_sparse.report.tables import LARGEST_CLASS, Table, figure, latex, make_table, markdown, to_csv
from ltp_sparse.weights.files import atomic_path
from ltp_sparse.weights.reading import read_yaml

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.paper td { color: #777; border-bottom: none; }
.best { font-weight: 700; }
img { max-width: 100%; margin: 1em 0; }
"""


def write_report(recipe: Recipe, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes report.md, report.html, table.csv, table.tex and the recipe's plots; returns the files.

    Raises:
        ValueError: there is no row of the recipe yet.
    """
    rows = [row for row in rows if row["recipe"] == recipe.name]
    if not rows:
        raise ValueError(f"report: no finished cell of the recipe {recipe.name}; run it first")
    table = make_table(rows, recipe.by, paper_of(recipe))
    if unknown := [name for name in recipe.plots if name not in PLOTS]:
        raise ValueError(f"recipe {recipe.name}: unknown plot {unknown[0]!r}; known: {', '.join(PLOTS)}")
    plots = [PLOTS[name](rows, folder / f"{name}.png", recipe) for name in recipe.plots]
    drawn = [path for path in plots if path is not None]
    facts = _facts(recipe, rows)
    tests: dict[str, Sheet] = {}
    for reference in recipe.compare:
        tests |= _comparisons(rows, recipe, reference)
    if recipe.chance is not None:
        tests["Languages above chance"] = chance_sheet(rows, recipe.by, recipe.chance)
    if recipe.kinship:
        tests["Languages related to that of training"] = kinship_sheet(rows, recipe.by)
    if (stage_1 := stage_1_sheet(rows, recipe.by)) is not None:
        tests["Tickets of stage 1"] = stage_1
    written = {
        "report.md": _markdown_page(recipe, table, tests, drawn, facts),
        "report.html": _html_page(recipe, table, tests, drawn, facts),
        "table.csv": to_csv(table),
        "table.tex": latex(table),
    }
    for name, text in written.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*(folder / name for name in written), *drawn]


def _comparisons(rows: Sequence[Mapping[str, Any]], recipe: Recipe, reference: str) -> dict[str, Sheet]:
    """Heading -> paired comparisons, singly and pooled: of the last update, where rows have it, and the best epoch."""
    sheets = {}
    margin = MARGIN if recipe.margin is None else recipe.margin
    for last in (True, False) if all("last_update" in row for row in rows) else (False,):
        kept = ", last update" if last else ", best epoch on dev" if "last_update" in rows[0] else ""
        for heading, make in (("Pooled comparison", pool), ("Paired comparison", compare)):
            if found := make(rows, reference, recipe.by, margin=margin, last=last):
                sheets[f"{heading} with {reference}{kept}"] = comparison_sheet(found, reference, recipe.by, margin)
    return sheets


def paper_of(recipe: Recipe) -> Mapping[str, Any] | None:
    """The printed figures that belong to a recipe."""
    if recipe.paper is None:
        return None
    papers = read_yaml(FOLDER / "papers.yaml", "figures of papers")
    if recipe.paper not in papers:
        raise ValueError(f"recipe {recipe.name}: no figures {recipe.paper!r}; known: {', '.join(papers)}")
    return papers[recipe.paper]


def _facts(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    metrics = sorted({row["metric"] for row in rows})
    base = sorted({str(row["model"]) for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    facts = [
        f"{len(rows)} of {len(recipe.cells)} cells finished, {seconds / 3600:.2f} hours in all; "
        f"{', '.join(metrics)} in percent, mean ± standard deviation over seeds.",
        f"Base model: {', '.join(base)}.",
    ]
    if (paper := paper_of(recipe)) is not None:
        facts.append(f"Figures of the paper: {paper['source']}.")
    return [*facts, *(f"Note: {note}." for note in notes), *([recipe.notes] if recipe.notes else [])]


def _markdown_page(
    recipe: Recipe, table: Table, tests: Mapping[str, Sheet], plots: Sequence[Path], facts: Sequence[str]
) -> str:
    images = [f"![{path.stem}]({path.name})" for path in plots]
    parts = [f"## {heading}\n\n{sheet.markdown()}" for heading, sheet in tests.items()]
    told = [f"# {for_markdown(recipe.title)}", *map(for_markdown, facts)]
    return "\n\n".join([*told, markdown(table), *parts, *images]) + "\n"


def _html_page(
    recipe: Recipe, table: Table, tests: Mapping[str, Sheet], plots: Sequence[Path], facts: Sequence[str]
) -> str:
    images = "".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">\n'
        for path in plots
    )
    paragraphs = "".join(f"<p>{for_html(fact)}</p>\n" for fact in facts)
    comparisons = "".join(f"<h2>{for_html(heading)}</h2>\n{sheet.html()}" for heading, sheet in tests.items())
    title = for_html(recipe.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n{paragraphs}{_html_table(table)}{comparisons}{images}</body></html>\n"
    )


def _html_table(table: Table) -> str:
    best, lines = table.best, []
    head = "".join(f"<th>{for_html(name)}</th>" for name in (*table.by, "runs", *table.columns))
    for line in table.lines:
        cells = [*map(for_html, line.facts), str(line.runs)]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        for column in table.columns:
            mean, deviation = line.values.get(column, (float("nan"), float("nan")))
            text = "" if mean != mean else f"{mean:.2f}" + ("" if deviation != deviation else f" ± {deviation:.2f}")
            body += f"<td{' class=best' if (line.facts, column) in best else ''}>{text}</td>"
        lines.append(f"<tr>{body}</tr>")
        if line.paper:
            figures = "".join(
                f"<td>{line.paper[c]:.2f}</td>" if c in line.paper else "<td></td>" for c in table.columns
            )
            lines.append(f'<tr class="paper"><td>paper</td>{"<td></td>" * len(table.by)}{figures}</tr>')
    if table.largest_class:
        shares = "".join(f"<td>{figure(table.largest_class.get(column))}</td>" for column in table.columns)
        lines.append(f'<tr class="paper"><td>{LARGEST_CLASS}</td>{"<td></td>" * len(table.by)}{shares}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>\n"
