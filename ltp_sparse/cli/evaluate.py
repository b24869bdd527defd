"""`ltp-sparse evaluate`: accuracy per language, over the seeds of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ltp_sparse.cli.options import add_computing, add_data, at_least_one, check_writable, need, quieten

HELP = "evaluate a trained run per language: mean and standard deviation over its seeds, as a table"
EXAMPLES = """\
  ltp-sparse evaluate runs/ltp-4
  ltp-sparse evaluate runs/ltp-4 --task americasnli --languages aym quy --plot aym-quy.png
  from the original files
    ltp-sparse evaluate runs/ltp-4 --data data/xnli"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, help="a run of ltp-sparse train")
    parser.add_argument("--task", default="xnli", help="labelled pairs to test on (default: xnli)")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--languages", nargs="+", help="default: all languages of the task")
    parser.add_argument("--limit", type=at_least_one, help="at most so many pairs per language, the first ones")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all that are trained")
    parser.add_argument("--batch-size", type=at_least_one, default=64)
    parser.add_argument("--plot", type=Path, help="also draw bars per language")
    add_data(parser)
    add_computing(parser)


def run(options: argparse.Namespace) -> None:
    need(options, "folder")
    import torch

    from ltp_sparse import results
    from ltp_sparse.cli.runs import Run, finished_seeds, load_pairs, load_seed
    from ltp_sparse.report.tables import make_table, markdown
    from ltp_sparse.tasks import languages
    from ltp_sparse.training.evaluation import evaluate, result_row

    quieten(options)
    made = Run.load(options.folder)
    check_writable("evaluate", options.folder / results.RESULTS, option="results")
    if options.plot is not None:
        check_writable("evaluate", options.plot, option="--plot")
    seeds = finished_seeds(options.folder, options.seeds)
    pairs = {
        language: load_pairs("evaluate", options.task, options.split, language, data=options.data)[: options.limit]
        for language in options.languages or languages(options.task)
    }
    rows = []
    for seed in seeds:
        setup, delta = load_seed(made, options.folder, seed)
        scores = evaluate(
            setup,
            pairs,
            batch_size=options.batch_size,
            dtype=torch.bfloat16 if options.bf16 else None,
            progress=not options.quiet,
        )
        facts = {
            "method": made.method,
            "shots": made.shots,
            "language": made.language,
            "seed": seed,
            "task": options.task,
        }
        facts |= {"split": options.split, "limit": options.limit, "epoch": delta.metadata["epoch"], "k": delta.ticket.k}
        rows.append(result_row(scores, **facts))
        results.append(options.folder / results.RESULTS, rows[-1])
    table = make_table(rows, ("method", "shots"))
    print(markdown(table))
    print(f"rows added to {options.folder / results.RESULTS}")
    if options.plot is not None:
        from ltp_sparse.report.plots import plot_accuracy

        print(f"plot written to {plot_accuracy(table.means(), options.plot, chance=1 / 3)}")
