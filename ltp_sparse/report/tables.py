"""Tables of results: mean and standard deviation over seeds, next to a paper's figures; Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ltp_sparse.recipes.recipe import look_up
from ltp_sparse.report.escaping import Bold, Sheet, for_csv, for_latex, plain

AVERAGE = "AVG"
LARGEST_CLASS = "always the largest class"


@dataclass
class Line:
    """A line of a table.

    Attributes:
        facts: the values of `Table.by` in it.
        values: column -> (mean, standard deviation over seeds), in percent; the deviation of a single run is NaN.
        runs: the number of seeds.
        paper: column -> the figure of the paper, in percent.
        notes: notes of its runs, e.g. on stand-ins.
    """

    facts: tuple[Any, ...]
    values: dict[str, tuple[float, float]]
    runs: int
    paper: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class Table:
    """Lines with common columns.

    Attributes:
        by: dotted paths of the facts.
        columns: languages, and their average.
        lines: the lines.
        largest_class: column -> the score of always naming the largest class, in percent; empty if rows do not have it.
    """

    by: tuple[str, ...]
    columns: tuple[str, ...]
    lines: list[Line]
    largest_class: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> set[tuple[tuple[Any, ...], str]]:
        """(facts of a line, column) of the best means among lines that differ in their first fact only."""
        rivals: dict[tuple[Any, ...], list[Line]] = {}
        for line in self.lines:
            rivals.setdefault(line.facts[1:], []).append(line)
        found = set()
        for group in rivals.values():
            for column in self.columns if len(group) > 1 else ():
                present = [line for line in group if column in line.values]
                top = max((line.values[column][0] for line in present), default=None)
                found |= {(line.facts, column) for line in present if line.values[column][0] == top}
        return found

    def means(self) -> dict[str, dict[str, float]]:
        """First fact of a line -> column -> mean in [0, 1], as `plot_accuracy` takes it."""
        return {
            str(line.facts[0]): {name: mean / 100 for name, (mean, _) in line.values.items()} for line in self.lines
        }

    def deviations(self) -> dict[str, dict[str, float]]:
        """The same for the standard deviations over seeds; lines with one run have none."""
        return {
            str(line.facts[0]): {name: sd / 100 for name, (_, sd) in line.values.items() if not math.isnan(sd)}
            for line in self.lines
        }


def make_table(rows: Iterable[Mapping[str, Any]], by: Sequence[str], paper: Mapping[str, Any] | None = None) -> Table:
    """Results as a table.

    Args:
        rows: results, each with a "seed".
        by: dotted paths of facts. Rows with the same facts are runs of one line: its seeds and, if every language was
            trained on its own, its languages.
        paper: an entry of `papers.yaml`.
    """
    rows = list(rows)
    printed = paper_figures(paper)
    lines, columns = [], dict.fromkeys((paper or {}).get("columns", []))
    for facts, members in grouped(rows, by).items():
        by_seed: dict[Any, dict[str, float]] = {}
        for row in members:
            by_seed.setdefault(row["seed"], {}).update(row["scores"])
        languages = dict.fromkeys(language for scores in by_seed.values() for language in scores)
        samples = {name: [100 * s[name] for s in by_seed.values() if name in s] for name in languages}
        samples[AVERAGE] = [100 * statistics.fmean(scores.values()) for scores in by_seed.values()]
        columns |= dict.fromkeys(languages)
        notes = dict.fromkeys(note for row in members for note in row.get("notes", ()))
        values = {
            name: (statistics.fmean(sample), statistics.stdev(sample) if len(sample) > 1 else math.nan)
            for name, sample in samples.items()
        }
        lines.append(Line(facts, values, len(by_seed), printed.get(facts, {}), tuple(notes)))
    # numbers in their order, then all else as it came
    lines.sort(key=lambda line: [(0, x) if isinstance(x, int | float) else (1, 0) for x in reversed(line.facts)])
    columns.pop(AVERAGE, None)
    return Table(tuple(by), (*columns, AVERAGE), lines, _largest_class(rows))


def grouped(rows: Iterable[Mapping[str, Any]], by: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Facts (dotted paths `by`) -> the rows that have them, in the order in which these first occur."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        facts = (look_up(row, path) for path in by)
        groups.setdefault(tuple(str(f) if isinstance(f, Mapping | list) else f for f in facts), []).append(row)
    return groups


def _largest_class(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of the largest class, in percent, of each column in which all rows give the same one.

    Rows of different test data give different ones."""
    shares: dict[str, set[float]] = {}
    for row in rows:
        for language in row["scores"]:
            shares.setdefault(language, set()).add(row.get("largest_class", {}).get(language))
    found = {name: 100 * values.pop() for name, values in shares.items() if len(values) == 1 and None not in values}
    return found | {AVERAGE: statistics.fmean(found.values())} if found and len(found) == len(shares) else found


def paper_figures(paper: Mapping[str, Any] | None) -> dict[tuple[Any, ...], dict[str, float]]:
    """Facts -> column -> figure of an entry of `papers.yaml`."""
    figures = {}
    for row in (paper or {}).get("rows", []):
        columns = paper["columns"]  # type: ignore[index]
        facts, numbers = row[: -len(columns)], row[-len(columns) :]
        named = zip(columns, numbers, strict=True)
        figures[tuple(facts)] = {name: float(number) for name, number in named if number != "-"}
    return figures


def markdown(table: Table, *, bold: bool = True) -> str:
    """A table in Markdown. Under a line with figures of the paper are these, and the difference to them.

    Args:
        table: the table.
        bold: whether the best means are bold.
    """
    best = table.best if bold else set()
    out: list[list[str]] = [[*table.by, "runs", *table.columns]]
    for line in table.lines:
        out.append([*map(plain, line.facts), str(line.runs), *_means(table, line, best)])
        if line.paper:
            out.append(["↳ paper", *[""] * len(table.by), *(figure(line.paper.get(c)) for c in table.columns)])
            out.append(["↳ difference", *[""] * len(table.by), *(_difference(line, c) for c in table.columns)])
    if table.largest_class:
        cells = [figure(table.largest_class.get(column)) for column in table.columns]
        out.append([LARGEST_CLASS, *[""] * len(table.by), *cells])
    return Sheet(out, [False] * len(table.by) + [True] * (1 + len(table.columns))).markdown()


def to_csv(table: Table) -> str:
    """A table as CSV, a line per cell: facts, column, mean, deviation, runs, figure of the paper."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*map(for_csv, table.by), "column", "mean", "deviation", "runs", "paper"])
    for line in table.lines:
        for column in table.columns:
            if column in line.values:
                mean, deviation = line.values[column]
                spread = "" if math.isnan(deviation) else f"{deviation:.4f}"
                figures = [f"{mean:.4f}", spread, line.runs, figure(line.paper.get(column))]
                writer.writerow([*map(for_csv, (*line.facts, column)), *figures])
    return out.getvalue()


def latex(table: Table) -> str:
    """A table in LaTeX (booktabs), with the best means in bold."""
    best = table.best
    head = [for_latex(name) for name in (*table.by, *table.columns)]
    body = []
    for line in table.lines:
        cells = [rf"\textbf{{{text}}}" if isinstance(text, Bold) else text for text in _means(table, line, best)]
        body.append([*map(for_latex, line.facts), *(text.replace("±", r"$\pm$") for text in cells)])
        if line.paper:
            body.append(["paper", *[""] * (len(table.by) - 1), *(figure(line.paper.get(c)) for c in table.columns)])
    lines = [rf"\begin{{tabular}}{{{'l' * len(table.by)}{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & ".join(head) + r" \\", r"\midrule"]
    lines += [" & ".join(cells) + r" \\" for cells in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _means(table: Table, line: Line, best: set[tuple[tuple[Any, ...], str]]) -> list[str]:
    """The means and deviations of a line, the best ones as `Bold`."""
    texts = {column: _number(line.values.get(column)) for column in table.columns}
    return [Bold(text) if (line.facts, column) in best else text for column, text in texts.items()]


def _number(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    mean, deviation = value
    return f"{mean:.2f}" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def figure(value: float | None, form: str = "{:.2f}") -> str:
    """A figure as a text; None is nothing."""
    return "" if value is None else form.format(value)


def _difference(line: Line, column: str) -> str:
    if column not in line.paper or column not in line.values:
        return ""
    return f"{line.values[column][0] - line.paper[column]:+.2f}"
