"""`ltp-sparse export`: a trained run as a folder that works without this library."""

from __future__ import annotations

import argparse
from pathlib import Path

from ltp_sparse.cli.options import check_writable, need

HELP = "write a trained run as a plain transformers folder, the prompt baked into its vocabulary"
EXAMPLES = """\
  ltp-sparse export runs/ltp-4 --output exported
  python exported/predict.py "A man sleeps." "A person rests."      # transformers alone"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="a run of ltp-sparse train")
    parser.add_argument("--seed", type=int, help="default: the first that is trained")
    parser.add_argument("--output", type=Path, help="the folder to write")


def run(options: argparse.Namespace) -> None:
    need(options, "folder", "output")
    from ltp_sparse.cli.runs import BAKED, Run, finished_seeds
    from ltp_sparse.training.export import export

    made = Run.load(options.folder)
    seed = finished_seeds(options.folder, None if options.seed is None else [options.seed])[0]
    check_writable("export", options.output, folder=True)
    export(made.model, options.folder / f"seed-{seed}" / BAKED, options.output, tokenizer=made.tokenizer)
    print(
        f"seed {seed} of {made.method} written to {options.output}; "
        f"try: python {options.output}/predict.py PREMISE HYPOTHESIS"
    )
