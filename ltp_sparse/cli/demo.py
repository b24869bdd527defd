"""`ltp-sparse demo`: the whole job, offline, on data that it makes itself."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run the whole job on generated data: pre-train a small model, select a ticket, train LTP and controls"
EXAMPLES = """\
  ltp-sparse demo
  ltp-sparse demo --output my-report --quiet"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo-report"), help="folder (default: demo-report)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> None:
    from ltp_sparse.demo.run import demo

    print(demo(options.output, progress=not options.quiet))
    print(f"report, plots, ticket and model: {options.output}/")
