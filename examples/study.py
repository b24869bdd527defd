"""The study of docs/evidence.md, the most decisive cells first, in one process that can be stopped at any time.

    python examples/study.py --data DATA --model real-xlmr --output study

`real-xlmr` is the output of examples/real_backbone.py. Finished cells have a row in OUTPUT/RECIPE/results.jsonl and are
not run again, so the same command continues a study that was stopped or killed. Reports are written after every step.
`--workers 2` runs two cells at a time on the CPU, with the same rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltp_sparse.recipes import Recipe, load_recipe, results
from ltp_sparse.recipes.cache import Cache
from ltp_sparse.recipes.engines import Here, Local
from ltp_sparse.recipes.rates import with_rates
from ltp_sparse.recipes.run import run_recipe, unfinished
from ltp_sparse.recipes.workbench import Workbench
from ltp_sparse.report.pages import write_report

DENSITY, SCORE = "ticket.density", "ticket.score"
RATE, UPDATES = "ticket.mlm.learning_rate", "ticket.mlm.max_steps"
CLAIM = [("label", "LTP"), ("label", "random")]
SWAPPED = [("label", "LTP at 0.01"), ("label", "random at 0.03")]
PROMPTS = [("label", "SP"), ("label", "DP")]
OTHERS = [*PROMPTS, *(("label", name) for name in ("FT", "BitFit", "head only", "prompt only"))]
SFT = [("label", "LT-SFT"), ("label", "Rand-SFT")]
SMALL = ("study-tickets-small", "study-small")  # of the model that the library ships
STEPS: list[tuple[str, Sequence[tuple[str, Any]]]] = [
    ("study-backbone", []),
    ("study-tickets", [(RATE, 5e-4), (UPDATES, 17), (UPDATES, 125), (UPDATES, 500), (SCORE, None)]),
    ("study-rates", [(DENSITY, 0.01), *CLAIM]),
    ("study-rates", PROMPTS),
    ("study-in-language", [("shots", 1)]),
    ("study-in-language", [("shots", 4), *CLAIM]),
    ("study-zero-shot", [(DENSITY, 0.01), (UPDATES, 125), *CLAIM]),
    ("study-in-language", [("shots", 4)]),
    ("study-zero-shot", [(DENSITY, 0.01), (UPDATES, 500), *CLAIM, *SWAPPED]),
    ("study-rate-curve", []),
    ("study-zero-shot", [(DENSITY, 0.01)]),
    ("study-nusax", [(DENSITY, 0.01)]),
    ("study-tickets", [(SCORE, "gradient")]),
    ("study-rates", [(DENSITY, 0.05), *CLAIM]),
    ("study-zero-shot", [(DENSITY, 0.05), *CLAIM]),
    ("study-zero-shot", [(DENSITY, 0.05), (DENSITY, 0.01)]),
    ("study-tickets", [(RATE, 5e-4), (UPDATES, 1000)]),
    *((name, []) for name in SMALL),
    ("study-in-language", []),
    ("study-rates", OTHERS),
    ("study-baselines", []),
    ("study-rates", SFT),
    ("study-sft", []),
    ("study-rates", []),
    ("study-zero-shot", []),
    ("study-nusax", []),
    ("study-tickets", []),
]
"""(recipe, which of its cells), in order."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="folder of the backbone, or a Hub name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--float32", action="store_true", help="not bfloat16, which few processors are fast at")
    parser.add_argument("--workers", type=int, default=1, help="processes on the CPU (default: this one, or its GPU)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of workers
    engine = Local([""], options.workers) if options.workers > 1 else Here()
    bench = Workbench(data=options.data, cache=Cache(options.output / "cache"), bf16=not options.float32)
    failed = 0
    for name, wanted in STEPS:
        folder = options.output / name
        recipe = step(name, wanted, options.model, options.output)
        print(f"{time.strftime('%H:%M')} {name}: {len(unfinished(recipe, folder))} cells to do", flush=True)
        failed += run_recipe(recipe, folder, bench, engine=engine)
        write_report(load_recipe(name), results.read(folder / results.RESULTS), folder)
    engine.close()
    print(f"{failed} cells failed")
    return min(failed, 1)


def step(name: str, wanted: Sequence[tuple[str, Any]], model: str, output: Path) -> Recipe:
    """Some cells of a recipe with the chosen rates, in the order of their seeds, so that pairs are complete early."""
    recipe = load_recipe(name, [] if name in SMALL else [("model", model)])
    if wanted:
        recipe = recipe.only(wanted)
    if recipe.rates is not None:
        recipe = with_rates(recipe, results.read(output / recipe.rates / results.RESULTS))
    return replace(recipe, cells=tuple(sorted(recipe.cells, key=lambda cell: cell["seed"])))


if __name__ == "__main__":
    sys.exit(main())
