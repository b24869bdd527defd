"""Writes the figures of docs/evidence.md from rows: the page's summary, and a report for each folder of results.

    python examples/evidence.py                        # all
    python examples/evidence.py study-zero-shot        # the summary, and some reports
    python examples/evidence.py --from study           # copies the rows of a study (examples/study.py) first

A folder of docs/evidence holds the results of one `ltp-sparse run`; its rows name their recipe.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study import SMALL, STEPS

from ltp_sparse.recipes import load_recipe, results
from ltp_sparse.report.escaping import Sheet
from ltp_sparse.report.pages import write_report
from ltp_sparse.report.paired import MARGIN, Comparison, combine, compare, pool
from ltp_sparse.report.stage_1 import stage_1_sheet
from ltp_sparse.report.tables import AVERAGE, make_table
from ltp_sparse.weights.files import atomic_path, write_text

FOLDER = Path(__file__).parents[1] / "docs" / "evidence"
BEGIN, END = "<!-- from rows: begin -->", "<!-- from rows: end -->"
TICKETS, CURVE, LEVELS = "study-tickets", "study-rate-curve", ("study-backbone", "study-baselines")
CLAIMS = ("study-zero-shot", "study-in-language", "study-sft", "study-nusax")
TOGETHER = CLAIMS[:2]  # with the same reference
ADDED = {(0.01, 0.1), (0.05, 0.03)}  # (density, rate) of the small model, run because the largest of three was the best
FIGURE = "differences.png"
NAMES = {
    "ticket.density": "density", "options.density": "density", "ticket.mlm.max_steps": "updates",
    "settings.learning_rate": "learning rate", "label": "method",
}  # fmt: skip
"""Fact -> its name on the page."""

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="names of folders (default: all)")
    parser.add_argument("--evidence", type=Path, default=FOLDER, help="folder of the folders (default: docs/evidence)")
    parser.add_argument("--page", type=Path, help="with the summary (default: beside that folder, docs/evidence.md)")
    parser.add_argument("--from", dest="study", type=Path, help="output of a study, whose rows are copied first")
    options = parser.parse_args()
    if options.study is not None:
        take_over(options.study, options.evidence)
    for folder in sorted(options.evidence.iterdir()):
        if (folder / results.RESULTS).is_file() and (not options.folders or folder.name in options.folders):
            rows = results.read(folder / results.RESULTS)
            write_report(load_recipe(rows[0]["recipe"]), rows, folder)
            (folder / "report.html").unlink()  # the site has its own pages, and LaTeX nobody reads there
            (folder / "table.tex").unlink()
            print(f"{folder.name}: {len(rows)} rows")
    page = options.page or options.evidence.with_suffix(".md")
    fill_in(page, summary(options.evidence))


def take_over(study: Path, evidence: Path) -> None:
    """Copies rows and failures of every recipe. They must include the rows that are there already."""
    for source in sorted(study.glob(f"*/{results.RESULTS}")):
        target = evidence / source.parent.name / results.RESULTS
        known = {row["id"] for row in results.read(target)}
        if lost := known - {row["id"] for row in results.read(source)}:
            raise ValueError(f"{source}: {len(lost)} rows of {target} are not in it; it is another study")
        target.parent.mkdir(exist_ok=True)
        for name in (results.RESULTS, results.FAILURES):
            if (source.parent / name).is_file():
                shutil.copyfile(source.parent / name, target.parent / name)


def fill_in(page: Path, text: str) -> None:
    """Puts a text between the marks of a page."""
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}, between which the summary stands")
    write_text(page, f"{before}{BEGIN}\n{text}{END}{after}")


def summary(evidence: Path) -> str:
    """The summary of the rows of the study, in Markdown, with its figure as a file next to them."""
    rows = {name: results.read(evidence / name / results.RESULTS) for name in dict.fromkeys(name for name, _ in STEPS)}
    parts = [progress(rows, evidence)]
    studies = {name: differences(name, rows[name]) for name in CLAIMS}
    together = combine([[comparison for _, comparison in studies[name]] for name in TOGETHER])
    where = " and ".join(name.removeprefix("study-") for name in TOGETHER)
    found = [(TOGETHER[0], where, comparison) for comparison in together]
    found += [(name, *each) for name in CLAIMS for each in studies[name]]
    parts.append("### Selected weights against others\n")
    if found:
        parts.append(claims_sheet(found).markdown())
        shown = [(f"{where}: {claim.label}", claim) for _, where, claim in found if claim.runs > 1]
        if shown:
            draw(shown, evidence / FIGURE)
            parts.append(f"![Differences, with intervals]({evidence.name}/{FIGURE})\n")
    else:
        parts.append("No pair of runs yet.\n")
    if rows[SMALL[1]]:
        parts.append("### The same for a small model\n")
        parts.append(claims_sheet(small_differences(rows[SMALL[1]])).markdown())
    parts.append("### How far two seeds of stage 1 agree\n")
    tickets = stage_1_sheet(rows[TICKETS] + rows[SMALL[0]], ("model", *load_recipe(TICKETS).by))
    parts.append("No ticket yet.\n" if tickets is None else tickets.markdown())
    if rows[CURVE]:
        parts.append("### Accuracy by learning rate\n")
        parts.append(levels_sheet(rows[CURVE], ("label", "settings.learning_rate")).markdown())
    parts.append("### What the backbone reaches\n")
    levels = [row for name in LEVELS for row in rows[name]]
    parts.append(levels_sheet(levels, ("recipe", "label")).markdown() if levels else "No run yet.\n")
    return "\n".join(parts)


def progress(rows: Mapping[str, Rows], evidence: Path) -> str:
    """The finished part of the study, by recipe."""
    out = [["recipe", "cells done", "of", "failed", "hours of cells"]]
    for name, done in rows.items():
        finished = {row["id"] for row in done}
        failed = {row["id"] for row in results.read(evidence / name / results.FAILURES)} - finished
        hours = sum(row["seconds"] for row in done) / 3600
        out.append([name, str(len(done)), str(len(load_recipe(name).cells)), str(len(failed)), f"{hours:.1f}"])
    links = {name: f"[{name}]({evidence.name}/{name}/report.md)" for name, done in rows.items() if done}
    table = Sheet(out, [False, True, True, True, True]).markdown()
    for name, link in links.items():
        table = table.replace(f"| {name} |", f"| {link} |")
    return table


def differences(name: str, rows: Rows) -> list[tuple[str, Comparison]]:
    """(where, comparison with the recipe's reference), pooled ones first; of the last update, where rows have it."""
    recipe = load_recipe(name)
    (reference,) = recipe.compare
    last = bool(rows) and all("last_update" in row for row in rows)
    paths = [NAMES.get(path, path) for path in recipe.by if path != "label"]
    found = []
    for make in (pool, compare):
        for made in make(rows, reference, recipe.by, last=last):
            facts = zip(paths, made.facts, strict=True) if made.facts else [("pooled over", " and ".join(paths))]
            where = ", ".join([name.removeprefix("study-"), *(f"{path} {fact}" for path, fact in facts)])
            found.append((where, made))
    return found


def small_differences(rows: Rows) -> list[tuple[str, str, Comparison]]:
    """(recipe, where, comparison) for the small model, pooled also without the rates that were added."""
    name = SMALL[1]
    planned = [row for row in rows if (row["ticket"]["density"], row["settings"]["learning_rate"]) not in ADDED]
    pooled = [(name, f"{where}, planned", claim) for where, claim in differences(name, planned) if "pooled" in where]
    return [*pooled, *((name, *each) for each in differences(name, rows))]


def claims_sheet(found: Sequence[tuple[str, str, Comparison]]) -> Sheet:
    """The table of the page: every label minus the reference of its recipe, in points."""
    out = [["where", "trained instead", "minus", "pairs", "points", "95 % interval", "p, Holm", "finding"]]
    for name, where, claim in found:
        (reference,) = load_recipe(name).compare
        cells = [str(claim.runs), *claim.cells(), f"{claim.adjusted:.3f}", claim.verdict()]
        out.append([where, claim.label, reference, *cells])
    return Sheet(out, [False, False, False, True, True, True, True, False])


def levels_sheet(rows: Rows, by: Sequence[str]) -> Sheet:
    """Mean accuracy by some facts, in percent, with the worst and the best language."""
    out = [[*(NAMES.get(path, path) for path in by), "runs", "accuracy", "worst", "best"]]
    for line in sorted(make_table(rows, by).lines, key=lambda line: line.facts):
        mean, spread = line.values.pop(AVERAGE)
        shown = f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"
        order = sorted(line.values, key=line.values.__getitem__)
        ends = [f"{language} {line.values[language][0]:.1f}" for language in (order[0], order[-1])]
        out.append([*map(str, line.facts), str(line.runs), shown, *ends])
    return Sheet(out, [False, False, True, True, False, False])


def draw(shown: Sequence[tuple[str, Comparison]], path: Path) -> None:
    """Differences with their intervals, one below the other, and the margin of equality as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.8 + 0.25 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvspan(-MARGIN, MARGIN, color="tab:gray", alpha=0.2, linewidth=0)
    axes.axvline(0, color="tab:gray", linewidth=0.8)
    for at, (_, of) in enumerate(shown):
        axes.plot(of.interval, (at, at), color="tab:blue", linewidth=1)
        axes.plot(of.mean, at, marker="o", markersize=4, color="tab:blue")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("points above the selected weights; band: counted as equal")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


if __name__ == "__main__":
    main()
