"""`ltp-sparse predict`: labels for a file of sentence pairs."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ltp_sparse.cli.options import add_computing, at_least_one, check_writable, need, quieten

HELP = "label the sentence pairs of a file with a trained run"
EXAMPLES = """\
  pairs.tsv: a header with the columns premise and hypothesis, then a pair a line
    ltp-sparse predict runs/ltp-4 pairs.tsv --output labelled.tsv
  the third seed, to the screen
    ltp-sparse predict runs/ltp-4 pairs.tsv --seed 3"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="a run of ltp-sparse train")
    parser.add_argument(
        "pairs", nargs="?", type=Path, help="the pairs: .tsv, .csv or .jsonl with premise and hypothesis"
    )
    parser.add_argument("--seed", type=int, help="default: the first that is trained")
    parser.add_argument("--batch-size", type=at_least_one, default=64)
    parser.add_argument("--output", type=Path, help="a .tsv file (default: the screen)")
    add_computing(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "folder", "pairs")
    import torch
    from tqdm.auto import tqdm

    from ltp_sparse.cli.runs import Run, load_seed
    from ltp_sparse.files import atomic_path
    from ltp_sparse.prompting.templates import CLASSES
    from ltp_sparse.tasks import read_pairs
    from ltp_sparse.training.evaluation import predict

    quieten(options)
    pairs = read_pairs(options.pairs)
    if options.output is not None:
        check_writable("predict", options.output)
    setup, _ = load_seed(Run.load(options.folder), options.folder, options.seed)
    dtype = torch.bfloat16 if options.bf16 else None
    with tqdm(total=len(pairs), unit="pair", disable=options.quiet) as bar:
        inputs = setup.encode(pairs)
        labels = predict(
            setup.model, inputs, setup.collate, batch_size=options.batch_size, dtype=dtype, progress=bar.update
        )
    rows = [(pair.premise, pair.hypothesis, CLASSES[label]) for pair, label in zip(pairs, labels.tolist(), strict=True)]
    if options.output is None:
        _write(sys.stdout, rows)
        return
    with atomic_path(options.output) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        _write(file, rows)
    print(f"{len(rows)} pairs labelled in {options.output}")


def _write(file, rows: list[tuple[str, str, str]]) -> None:  # type: ignore[no-untyped-def]
    """Without quoting, as `read_pairs` reads a .tsv: tabs and line breaks inside a text become spaces."""
    for row in (("premise", "hypothesis", "label"), *rows):
        file.write("\t".join(re.sub(r"[\t\r\n]+", " ", cell) for cell in row) + "\n")
