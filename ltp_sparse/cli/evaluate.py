"""`ltp-sparse evaluate`: scores per language, over the seeds of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.cli.checks import CommandError, check_plot, check_writable, need
from ltp_sparse.cli.kinds import expect, expect_source
from ltp_sparse.cli.options import add_computing, add_data, at_least_one, quieten
from ltp_sparse.cli.own import SOURCE, add_columns, add_metric, given_columns, refuse_own
from ltp_sparse.cli.tables import TASK_NAMES, TEST_TASKS
from ltp_sparse.tasks import task
from ltp_sparse.tasks.own import read_own

if TYPE_CHECKING:
    from ltp_sparse.cli.runs import Run

HELP = "evaluate a trained run per language: mean and standard deviation over its seeds, as a table"
EXAMPLES = """\
  on all of XNLI, from the Hub or from the original files
    ltp-sparse evaluate runs/ltp-4
    ltp-sparse evaluate runs/ltp-4 --data data/xnli
    ltp-sparse evaluate runs/ltp-4 --task americasnli --languages aym quy --plot aym-quy.png
  a run on your own data, on the test file that was given to train or on another one
    ltp-sparse evaluate runs/quy
    ltp-sparse evaluate runs/quy --test other.tsv --language-column language --plot languages.png"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="a run of ltp-sparse train")
    add("--task", choices=TASK_NAMES, help="a known task to test on (default: that of the run)")
    add("--split", default="test", help="split of the task")
    add("--languages", nargs="+", help="languages to test on (default: all of the task or file)")
    add("--test", metavar="FILE", help=f"your own data to test on: {SOURCE}")
    add_columns(parser, default="; default: as the run was trained")
    add_metric(parser)
    add("--limit", type=at_least_one, help="evaluate only this many examples of each language, the first ones")
    add("--seeds", nargs="+", type=int, help="seeds to evaluate (default: all that are trained)")
    add("--batch-size", type=at_least_one, default=64, help="examples per forward pass")
    add("--plot", type=Path, help="also draw bars per language")
    add_data(parser)
    add_computing(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "folder")
    if options.task is not None:
        refuse_own(options, why="is for your own data, --task for a known task; leave one out")
    expect(options, "folder", "run of ltp-sparse train")
    expect_source(options, "test")
    from ltp_sparse.cli.runs import Run, finished_seeds
    from ltp_sparse.recipes import results

    trained = Run.load(options.folder)
    trained.check_model()
    check_writable(options.folder / results.RESULTS, option="results")
    check_plot(options.plot)
    seeds = finished_seeds(options.folder, options.seeds)
    begun = {path.name.removeprefix("seed-") for path in options.folder.glob("seed-*") if path.is_dir()}
    if options.seeds is None and (open_seeds := sorted(begun - set(map(str, seeds)))):
        print(f"not finished, so left out: seed {', '.join(open_seeds)}; ltp-sparse train --resume goes on with it")
    on_own = options.test is not None or (trained.task is None and options.task is None)
    name, metric, examples = (_own_examples if on_own else _task_examples)(options, trained)
    examples = {language: tested[: options.limit] for language, tested in examples.items()}
    from ltp_sparse.report.tables import make_table, markdown

    quieten(options)
    rows = []
    for seed in seeds:
        rows.append(_row(options, trained, seed, name, metric, examples))
        results.append(options.folder / results.RESULTS, rows[-1])
    table = make_table(rows, ("method", "shots"))
    print(f"{metric} in percent on {name}, {sum(map(len, examples.values()))} examples\n")
    print(markdown(table))
    print(f"rows added to {options.folder / results.RESULTS}")
    if options.plot is not None:
        from ltp_sparse.report.plots import plot_accuracy

        path = plot_accuracy(
            table.means(),
            options.plot,
            errors=table.deviations(),
            chance=1 / len(trained.labels) if metric == "accuracy" else None,
            title=f"{name}; whiskers: standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else name,
            metric=metric,
        )
        print(f"plot written to {path}")


def _row(
    options: argparse.Namespace, run: Run, seed: int, name: str, metric: str, examples: dict[str, list[Any]]
) -> dict[str, Any]:
    """The row of results of one seed: its scores by language on the examples of `name`, and the facts of the run."""
    import torch

    from ltp_sparse.cli.runs import load_seed
    from ltp_sparse.training.evaluation import evaluate, largest_class, result_row

    setup, delta = load_seed(run, options.folder, seed)
    notes: list[str] = []
    scores = evaluate(
        setup,
        examples,
        metric=metric,
        labels=run.labels,
        batch_size=options.batch_size,
        dtype=torch.bfloat16 if options.bf16 else None,
        progress=not options.quiet,
        notes=notes,
    )
    return result_row(
        scores,
        method=run.method,
        shots=run.shots,
        language=run.language,
        seed=seed,
        task=name,
        metric=metric,
        examples={language: len(tested) for language, tested in examples.items()},
        largest_class=largest_class(examples, metric),
        notes=notes,
        split=options.split,
        limit=options.limit,
        epoch=delta.metadata["epoch"],
        k=delta.ticket.k,
    )


def _own_examples(options: argparse.Namespace, run: Run) -> tuple[str, str, dict[str, list[Any]]]:
    """(name, metric, language -> examples) of your own data."""
    source = options.test or run.test
    if source is None:
        raise CommandError("the run was trained without --test; pass a file to test on, --test FILE")
    if options.data is not None or options.split != "test":
        option = "--split" if options.data is None else "--data"
        raise CommandError(f"{option} is for a known task, not for your own data; leave it out")
    examples = read_own(
        source,
        given_columns(options, run),
        language=run.language,
        split="test",
        config=options.hub_config or run.hub_config,
    )
    if foreign := [example.label for example in examples if example.label not in run.labels]:
        raise CommandError(
            f"{source} has the class {foreign[0]!r} ({len(foreign)} examples of unknown classes); the "
            f"run was trained on {', '.join(run.labels)}"
        )
    found: dict[str, list[Any]] = {}
    for example in examples:
        found.setdefault(example.language, []).append(example)
    if unknown := [language for language in options.languages or () if language not in found]:
        raise CommandError(f"{source} has no example of language {unknown[0]!r}, only {', '.join(found)}")
    return source, options.metric or run.metric, {name: found[name] for name in options.languages or found}


def _task_examples(options: argparse.Namespace, run: Run) -> tuple[str, str, dict[str, list[Any]]]:
    """(name, metric, language -> examples) of a known task."""
    refuse_own(options, why="is for your own data; pass its file, --test")
    known = task(options.task or TEST_TASKS.get(run.task or "", run.task or ""))
    if known.kind != run.kind or set(known.labels) != set(run.labels):
        raise CommandError(
            f"the run was trained on {run.kind}s of the classes {', '.join(run.labels)}, but "
            f"--task {known.name} has {known.kind}s of the classes {', '.join(known.labels)}"
        )
    languages = options.languages or known.languages
    examples = {language: list(known.load(options.split, language, data=options.data)) for language in languages}
    return known.name, known.metric, examples
