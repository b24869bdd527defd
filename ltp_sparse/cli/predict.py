"""`ltp-sparse predict`: labels for a file of sentence pairs."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from ltp_sparse.cli.options import add_computing, need

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
    parser.add_argument("--batch-size", type=int, default=64)
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

    pairs = read_pairs(options.pairs)
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
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(("premise", "hypothesis", "label"))
    writer.writerows(rows)
