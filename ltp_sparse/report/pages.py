"""A report of a recipe's results: tables, plots, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

from ltp_sparse.recipes.recipe import FOLDER, Recipe
from ltp_sparse.report.chance import chance_sheet
from ltp_sparse.report.escaping import Sheet, for_markdown, plain
from ltp_sparse.report.kinship import kinship_sheet
from ltp_sparse.report.paired import MARGIN, compare, comparison_sheet, pool
from ltp_sparse.report.plots import PLOTS
from ltp_sparse.report.stage_1 import stage_1_sheet
from ltp_sparse.report.tables import Table, latex, make_table, markdown, to_csv
from ltp_sparse.weights.files import write_text
from ltp_sparse.weights.reading import read_yaml


def write_report(recipe: Recipe, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes report.md, report.html, table.csv, table.tex and the recipe's plots.

    Args:
        recipe: the recipe.
        rows: results, also those of other recipes, which are left out.
        folder: the folder to write to.

    Returns:
        The files.

    Raises:
        ValueError: there is no row of the recipe yet.
    """
    rows = [row for row in rows if row["recipe"] == recipe.name]
    if not rows:
        raise ValueError(f"report: no finished cell of the recipe {recipe.name}; run it first")
    table = make_table(rows, recipe.by, paper_of(recipe))
    if unknown := [name for name in recipe.plots if name not in PLOTS]:
        raise ValueError(f"recipe {recipe.name}: unknown plot {unknown[0]!r}; known: {', '.join(PLOTS)}")
    drawn = list(filter(None, (PLOTS[name](rows, folder / f"{name}.png", recipe) for name in recipe.plots)))
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
    embedded = {plot.stem: _embedded(plot) for plot in drawn}
    written = {
        "report.md": _markdown(recipe, table, tests, {plot.stem: plot.name for plot in drawn}, facts),
        "report.html": _html(recipe.title, _markdown(recipe, table, tests, embedded, facts)),
        "table.csv": to_csv(table),
        "table.tex": latex(table),
    }
    for name, text in written.items():
        write_text(folder / name, text)
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


def _markdown(
    recipe: Recipe, table: Table, tests: Mapping[str, Sheet], images: Mapping[str, str], facts: Sequence[str]
) -> str:
    """The page; `images` are their names and addresses."""
    parts = [f"## {for_markdown(heading)}\n\n{sheet.markdown()}" for heading, sheet in tests.items()]
    head = [f"# {for_markdown(recipe.title)}", *map(for_markdown, facts)]
    shown = [f"![{name}]({address})" for name, address in images.items()]
    return "\n\n".join([*head, markdown(table), *parts, *shown]) + "\n"


def _html(title: str, page: str) -> str:
    """A page in Markdown as one in HTML. Tags inside are text: the parser makes none of them, the template escapes."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(page)
    templates = Environment(loader=PackageLoader("ltp_sparse", "report"), autoescape=True, keep_trailing_newline=True)
    return templates.get_template("page.html.jinja").render(title=plain(title), body=Markup(body))


def _embedded(plot: Path) -> str:
    """The address of a plot that is part of its page."""
    return f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"
