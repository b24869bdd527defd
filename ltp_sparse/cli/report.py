"""`ltp-sparse report`: the results of a recipe as tables next to the paper's figures, plots and an HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ltp_sparse.cli.checks import check_writable, need
from ltp_sparse.cli.kinds import expect

HELP = "turn the results of a recipe into tables next to the paper's figures, plots and an HTML page"
EXAMPLES = """\
  ltp-sparse report ltp-table-1 results/table-1
  ltp-sparse report my-recipe.yaml results/mine --output report/"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of the recipe, or its .yaml file")
    parser.add_argument("results", nargs="?", type=Path, help="the folder of results that ltp-sparse run has written")
    parser.add_argument("--allow-plugins", action="store_true", help="run the Python files that the recipe names")
    parser.add_argument("--output", type=Path, help="folder of the report (default: the results' folder)")


def run(options: argparse.Namespace) -> None:
    need(options, "recipe", "results")
    check_writable(options.output, folder=True)
    expect(options, "results", "folder of results")
    from ltp_sparse.recipes import load_recipe, results

    recipe = load_recipe(options.recipe, allow_plugins=options.allow_plugins)
    rows = results.read(options.results / results.RESULTS)
    from ltp_sparse.report.pages import write_report

    files = write_report(recipe, rows, options.output or options.results)
    print(files[0].read_text(encoding="utf-8"))
    print("written:", ", ".join(map(str, files)))
