"""`ltp-sparse run`: a recipe, cell by cell."""

from __future__ import annotations

import argparse
import shlex
from contextlib import closing
from pathlib import Path
from typing import Any

from ltp_sparse.cli.checks import CommandError, check_writable, given_of, need, refuse, values_of
from ltp_sparse.cli.kinds import expect_model
from ltp_sparse.cli.options import add_computing, add_data, add_model, add_report_to
from ltp_sparse.recipes import Recipe, load_recipe, recipe_names
from ltp_sparse.weights.reading import FileFormatError, parse_yaml

HELP = "run a recipe: all cells of a table or figure of the papers, or of your own YAML file"
EXAMPLES = """\
  list the recipes, and show what one would do
    ltp-sparse run --list
    ltp-sparse run ltp-table-1 --dry-run
  table 1 of LTP from the original files, on two GPUs; the same command continues after an interruption
    ltp-sparse run ltp-table-1 --data data/ --output results/table-1 --on local:0,1 --bf16
  on a Ray cluster with two cells on each GPU, or as jobs of SLURM
    ltp-sparse run ltp-table-1 --data data/ --output results/table-1 --on ray://head:10001 --gpus-per-cell 0.5
    ltp-sparse run ltp-table-1 --data data/ --output results/table-1 --on slurm:partition=gpu,time=60
  a part of it, with another model and fewer epochs
    ltp-sparse run ltp-table-1 --only method=ltp shots=4 --model my-model/ --set settings.epochs=10 --output results/t
  the table next to the paper's
    ltp-sparse report ltp-table-1 results/table-1"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", help="name of a recipe, or a .yaml file")
    add("--list", action="store_true", help="list the recipes that come with the library")
    add("--dry-run", action="store_true", help="print cells, memory and time without training")
    add_model(parser, "folder or Hub name of the base model, instead of the recipe's")
    add("--allow-plugins", action="store_true", help="run the Python files that the recipe names")
    add_data(parser)
    add("--output", type=Path, help="folder of the results; finished cells in it are not run again")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change values of all cells, e.g. settings.epochs=1")
    add("--only", nargs="+", default=[], metavar="KEY=VALUE", help="run only cells with these values")
    add("--cache", type=Path, help="folder of shared artefacts (see ltp-sparse cache)")
    add("--rates", type=Path, help="folder of results of the recipe that chooses the learning rates of this one")
    add(
        "--on",
        metavar="WHERE",
        help="where to run: local:0,1 (GPUs), ray://HOST:PORT, ray:auto or slurm:partition=NAME,time=MINUTES",
    )
    add("--gpus-per-cell", type=float, help="share of a GPU for each cell, e.g. 0.5 (default: 1 if there are GPUs)")
    add("--retries", type=_at_least_zero, default=3, help="further attempts at a cell whose worker died")
    add("--save-every", type=int, help="epochs between checkpoints inside a cell")
    add("--micro-batch-size", type=int, help="examples per forward pass, to save memory")
    add_report_to(parser)
    add_computing(parser)


def _at_least_zero(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def run(options: argparse.Namespace) -> int:
    if options.list:
        for name in recipe_names():
            recipe = load_recipe(name)
            print(f"{name:<22} {len(recipe.cells):>5} cells  {recipe.title}")
        return 0
    need(options, "recipe")
    recipe = load_recipe(options.recipe, overrides(options), allow_plugins=options.allow_plugins)
    if options.only:
        recipe = recipe.only(map(_pair, options.only))
    if options.dry_run:
        from ltp_sparse.recipes.plan import plan

        print(plan(recipe))
        return 0
    need(options, "output")
    recipe = _with_rates(recipe, options.rates)
    _check_model(options, recipe)
    if options.on is None:
        refuse(options, "gpus_per_cell", why="needs --on; without it, cells run one after the other")
    check_writable(options.output, folder=True)
    from ltp_sparse.recipes.cache import Cache, default_cache
    from ltp_sparse.recipes.engines import Here, engine_on
    from ltp_sparse.recipes.run import run_recipe, unfinished
    from ltp_sparse.recipes.workbench import Workbench

    bench = Workbench(
        cache=Cache(options.cache or default_cache()),
        **values_of(options, "data", "bf16", "micro_batch_size", "report_to"),
    )
    left = len(unfinished(recipe, options.output))
    print(f"{recipe.title}: {len(recipe.cells)} cells, {len(recipe.cells) - left} of them finished before")
    jobs = options.output / "jobs"
    with closing(Here() if options.on is None else engine_on(options.on, jobs, options.gpus_per_cell)) as engine:
        if options.on is not None:
            print(f"on {engine}", flush=True)
        failed = run_recipe(
            recipe,
            options.output,
            bench,
            engine=engine,
            progress=not options.quiet,
            **values_of(options, "retries", "save_every"),
        )
    if failed:
        print(f"{failed} cells failed, see {options.output / 'failures.jsonl'}; run the same command to try them again")
        return 1
    plugins = " --allow-plugins" if options.allow_plugins else ""
    print(f"next: ltp-sparse report {shlex.quote(options.recipe)} {shlex.quote(str(options.output))}{plugins}")
    return 0


def _with_rates(recipe: Recipe, folder: Path | None) -> Recipe:
    if recipe.rates is None and folder is None:
        return recipe
    if recipe.rates is None:
        raise CommandError(f"{recipe.name} has learning rates of its own; leave --rates out")
    if folder is None:
        raise CommandError(
            f"{recipe.name} takes its learning rates from results of {recipe.rates}; run that recipe first, and "
            "pass its folder by --rates"
        )
    from ltp_sparse.recipes import results
    from ltp_sparse.recipes.rates import with_rates

    return with_rates(recipe, results.read(folder / results.RESULTS))


def _check_model(options: argparse.Namespace, recipe: Recipe) -> None:
    """Raises CommandError if all cells have one model, which is unavailable. Of several models, only cells fail."""
    models = {cell["model"] for cell in recipe.cells}
    if len(models) == 1:
        expect_model(argparse.Namespace(model=models.pop(), tokenizer=options.tokenizer, positional=()))


def overrides(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """--model, --tokenizer and --set as (dotted path, value)."""
    return [*given_of(options, "model", "tokenizer").items(), *map(_pair, options.set)]


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise CommandError(f"expected KEY=VALUE, e.g. settings.epochs=1 or shots=[1,2,4], got {text!r}")
    try:
        return key, parse_yaml(value, text)
    except FileFormatError as error:
        raise CommandError(f"{text!r}: the value is not YAML ({error.problem})") from None
