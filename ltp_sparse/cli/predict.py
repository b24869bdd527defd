"""`ltp-sparse predict`: labels and probabilities for a file of texts or pairs."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ltp_sparse.cli.checks import CommandError, check_writable, need
from ltp_sparse.cli.kinds import expect, expect_source
from ltp_sparse.cli.options import add_computing, at_least_one, quieten
from ltp_sparse.cli.own import SOURCE, add_columns, given_columns
from ltp_sparse.tasks.own import columns_of, read_own, texts_of, warn_of_gaps

HELP = "label the texts or pairs of a file with a trained run, with the probability of each class"
EXAMPLES = """\
  pairs.tsv has a header with the columns premise and hypothesis, then one pair per line
    ltp-sparse predict runs/ltp-4 pairs.tsv --output labelled.tsv
  the third seed, to the screen
    ltp-sparse predict runs/ltp-4 pairs.tsv --seed 3
  a run on your own data reads the columns of training, or those that you name
    ltp-sparse predict runs/quy new.jsonl --text-column sentence --output labelled.jsonl"""

_SUFFIXES = (".tsv", ".jsonl")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="a run of ltp-sparse train")
    add("examples", nargs="?", help=f"examples to label, without classes: {SOURCE}")
    add_columns(parser, default="; default: as the run was trained")
    add("--seed", type=int, help="seed to label with (default: the first that is trained)")
    add("--batch-size", type=at_least_one, default=64, help="examples per forward pass")
    add("--output", type=Path, help="a .tsv or .jsonl file (default: the screen, as .tsv)")
    add_computing(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "folder", "examples")
    if options.output is not None and options.output.suffix not in _SUFFIXES:
        raise CommandError(f"--output must end in {' or '.join(_SUFFIXES)}, got {options.output}")
    expect(options, "folder", "run of ltp-sparse train")
    expect_source(options, "examples")
    from ltp_sparse.cli.runs import Run, first_seed, load_seed
    from ltp_sparse.weights.files import atomic_path

    trained = Run.load(options.folder)
    trained.check_model()
    columns = given_columns(options, trained)
    if options.language_column is None and columns.language is not None and os.path.isfile(options.examples):
        if columns.language not in columns_of(options.examples):
            warnings.warn(f"no column {columns.language!r}: the texts are labelled without it", stacklevel=2)
            columns = replace(columns, language=None)
    of_result = columns.label, "probabilities"
    if taken := [name for name in (columns.text, columns.pair, columns.language) if name in of_result]:
        raise CommandError(
            f"{options.examples}: the column {taken[0]!r} has the name of a column of the result; rename it in the file"
        )
    examples = read_own(
        options.examples, columns, language=trained.language, labelled=False, split="test", config=options.hub_config
    )
    warn_of_gaps(examples, None, options.examples)
    check_writable(options.output)
    seed = first_seed(options.folder, options.seed)
    import torch
    from tqdm.auto import tqdm

    from ltp_sparse.training.evaluation import class_logits

    quieten(options)
    setup, _ = load_seed(trained, options.folder, seed)
    dtype = torch.bfloat16 if options.bf16 else None
    with tqdm(total=len(examples), unit="example", disable=options.quiet) as bar:
        inputs = setup.encode(examples)
        logits = class_logits(
            setup.model, inputs, setup.collate, batch_size=options.batch_size, dtype=dtype, progress=bar.update
        )
    probabilities = logits.softmax(-1).tolist()
    names = [name for name in (columns.text, columns.pair) if name is not None]
    rows = []
    for example, of_class in zip(examples, probabilities, strict=True):
        row: dict[str, Any] = dict(zip(names, texts_of(example), strict=True))
        if columns.language is not None:
            row[columns.language] = example.language
        row[columns.label] = trained.labels[of_class.index(max(of_class))]
        row["probabilities"] = dict(zip(trained.labels, of_class, strict=True))
        rows.append(row)
    if options.output is None:
        _write_tsv(sys.stdout, rows)
        return
    with atomic_path(options.output) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        (_write_tsv if options.output.suffix == ".tsv" else _write_jsonl)(file, rows)
    print(f"{len(rows)} examples labelled in {options.output}")


def _write_tsv(file: IO[str], rows: list[dict[str, Any]]) -> None:
    """Writes a .tsv without quotes, as it is read. Tabs and line breaks inside a text become spaces."""
    for number, row in enumerate(rows):
        of_class = row.pop("probabilities")
        if number == 0:
            _write_cells(file, [*row, *(f"p({label})" for label in of_class)])
        _write_cells(file, [*row.values(), *(f"{value:.6f}" for value in of_class.values())])


def _write_cells(file: IO[str], cells: list[str]) -> None:
    file.write("\t".join(re.sub(r"[\t\r\n]+", " ", cell) for cell in cells) + "\n")


def _write_jsonl(file: IO[str], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
