"""Options for your own labelled data, for train, evaluate and predict."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ltp_sparse.cli.checks import CommandError, refuse
from ltp_sparse.cli.tables import METRIC_NAMES
from ltp_sparse.tasks.own import Columns

if TYPE_CHECKING:
    from ltp_sparse.cli.runs import Run

SOURCE = "a .tsv, .csv, .jsonl or .parquet file, or a Hub data set as NAME or NAME@SPLIT"

_COLUMNS = {
    "text": "column of the text, or of the first text of a pair (default: text; for pairs: premise)",
    "pair": "column of the second text of a pair",
    "label": "column of the class (default: label)",
    "language": "column with the language of each row, for scores per language from one file",
}


def add_columns(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Adds --text-column and the other options that describe a file. `default` is added to their help."""
    for name, description in _COLUMNS.items():
        parser.add_argument(f"--{name}-column", metavar="NAME", help=description + default)
    parser.add_argument(
        "--quoted", action="store_true", help="cells of a .tsv are in double quotes where needed, as in a .csv"
    )
    parser.add_argument("--hub-config", metavar="NAME", help="configuration of a Hub data set")


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Adds --metric."""
    parser.add_argument("--metric", choices=METRIC_NAMES, help="for your own data (default: accuracy)")


def given_columns(options: argparse.Namespace, run: Run | None = None) -> Columns:
    """The columns that the options name. Others are those of the run, or have their usual names."""
    if run is not None and run.columns is not None:
        base = run.columns
    elif (options.pair_column is not None) if run is None else run.kind == "pair":
        base = Columns(text="premise", pair="hypothesis")
    else:
        base = Columns()
    named = {name: getattr(options, f"{name}_column") for name in _COLUMNS}
    columns = replace(base, **{name: value for name, value in named.items() if value is not None})
    if run is not None and columns.kind != run.kind:
        raise CommandError("--pair-column is for pairs, but the run was trained on single texts; leave it out")
    return replace(columns, quoted=True) if options.quoted else columns


def refuse_own(options: argparse.Namespace, *more: str, why: str) -> None:
    """`refuse` for the options for your own data, except its source, and for `more`."""
    columns = (f"{name}_column" for name in _COLUMNS)
    refuse(options, *columns, "quoted", "hub_config", "metric", "dev", "test", *more, why=why)


def words_of(texts: list[str] | None) -> dict[str, list[str]] | None:
    """Class -> words, from `--words CLASS=WORD ...`; several words of a class are separated by commas."""
    if texts is None:
        return None
    found: dict[str, list[str]] = {}
    for text in texts:
        label, equals, words = text.rpartition("=")
        if not equals or not label or not all(words.split(",")):
            raise CommandError(f"--words expects CLASS=WORD, e.g. positive=good, got {text!r}")
        if label in found:
            raise CommandError(f"--words has two entries for {label!r}; write several words of a class as {label}=a,b")
        found[label] = words.split(",")
    return found
