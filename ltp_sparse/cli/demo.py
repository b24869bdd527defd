"""`ltp-sparse demo`: the whole job, offline, on generated data."""

from __future__ import annotations

import argparse
from pathlib import Path

from ltp_sparse.cli.checks import check_writable
from ltp_sparse.cli.options import add_quiet, add_report_to

HELP = "run the whole job on generated data and the small model of the package: ticket, LTP, controls, report"
EXAMPLES = """\
  ltp-sparse demo
  ltp-sparse demo --output my-report --quiet"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo-report"), help="folder (default: demo-report)")
    add_report_to(parser)
    add_quiet(parser)


def run(options: argparse.Namespace) -> None:
    check_writable(options.output, folder=True)
    from transformers.utils import logging

    from ltp_sparse.demo import demo

    logging.disable_progress_bar()  # loading the small model takes no time
    print(demo(options.output, progress=not options.quiet, report_to=options.report_to))
    print(f"report, plots and ticket: {options.output}/")
