"""`ltp-sparse export`: a trained run as a folder that works without this library."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.cli.checks import CommandError, check_writable, need
from ltp_sparse.cli.kinds import expect
from ltp_sparse.cli.options import add_quiet, quieten
from ltp_sparse.tasks.own import UNDETERMINED

if TYPE_CHECKING:
    from ltp_sparse.cli.runs import Run

HELP = "write a trained run as a folder that works with transformers alone, with a model card"
EXAMPLES = """\
  ltp-sparse export runs/ltp-4 --output exported
  python exported/predict.py "A man sleeps." "A person rests."      # transformers alone
  in Python: pipeline("text-classification", "exported", trust_remote_code=True)"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="a run of ltp-sparse train")
    parser.add_argument("--seed", type=int, help="seed to export (default: the first that is trained)")
    parser.add_argument("--output", type=Path, help="the folder to write")
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "folder", "output")
    expect(options, "folder", "run of ltp-sparse train")
    if options.output.is_dir() and any(options.output.iterdir()):
        raise CommandError(f"--output {options.output} is not empty; choose a new or empty folder")
    from ltp_sparse.cli.runs import BAKED, Run, first_seed

    trained = Run.load(options.folder)
    trained.check_model()
    seed = first_seed(options.folder, options.seed)
    check_writable(options.output, folder=True)
    quieten(options)
    from ltp_sparse.training.export import SCRIPT, export

    known = trained.columns is None or (trained.columns.language is None and trained.language != UNDETERMINED)
    language = trained.language if known else None  # with a language per row, the card has scores by language
    export(
        trained.model,
        options.folder / f"seed-{seed}" / BAKED,
        options.output,
        tokenizer=trained.tokenizer,
        kind=trained.kind,
        facts={**data_and_scores(trained, options.folder, seed), "language": language},
    )
    texts = "PREMISE HYPOTHESIS" if trained.kind == "pair" else "TEXT"
    print(
        f"seed {seed} of {trained.method} written to {options.output}; "
        f"try: python {shlex.quote(str(options.output / SCRIPT))} {texts}"
    )


def data_and_scores(run: Run, folder: Path, seed: int) -> dict[str, Any]:
    """Facts for a card: the training data of a run, and the latest scores of a seed on each whole set of examples."""
    from ltp_sparse.recipes import results

    rows = [row for row in results.read(folder / results.RESULTS) if row["seed"] == seed and row.get("limit") is None]
    latest = {(row["task"], row.get("split"), row.get("metric"), *sorted(row["scores"])): row for row in rows}
    data = run.train or f"{run.task}" + ("" if run.shots is None else f", {run.shots} examples per class")
    return {"data": data, "scores": list(latest.values())}
