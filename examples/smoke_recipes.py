"""Runs every recipe on real data with small random models: one seed, two updates a phase, 20 test rows a language.

    python examples/smoke_recipes.py --data DATA --output smoke/

DATA holds the data sets and the XLM-R tokenizer, which XGLM and BLOOM get as well. All parts of every recipe run to the
end (tickets, language SFTs, adapters, all methods, tests in all languages, report). The scores are those of chance,
since the weights are random. --thin runs one cell of each label, with two languages, less text and fewer layers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, XGLMConfig, XGLMForCausalLM, XLMRobertaConfig

from ltp_sparse.models.backbone import backbone_from_config
from ltp_sparse.recipes import Recipe, load_recipe, recipe_names, results
from ltp_sparse.recipes.cache import Cache
from ltp_sparse.recipes.run import run_recipe
from ltp_sparse.recipes.workbench import Workbench
from ltp_sparse.report.pages import write_report
from ltp_sparse.tasks import tested

TOKENIZER = "tokenizers/xlm_roberta_base"
MLM = {"max_steps": 2, "step_bounds": None, "length": 32, "eval_steps": 2}
OVERRIDES: list[tuple[str, Any]] = [
    ("seed", 1),
    ("settings.max_steps", 2),
    ("settings.eval_steps", 2),
    ("settings.batch_size", 4),
    ("settings.max_length", 60),
    ("train.limit", 24),
    ("test.limit", 20),
    *((f"{stage}.mlm", MLM) for stage in ("ticket", "language_sft", "adapters")),
]
LINES, THIN_LINES = 400, 100  # of text for masked language modelling


def models(folder: Path, tokenizer: Any, *, thin: bool) -> dict[str, Path]:
    """Model type -> folder of a random model with enough layers for every method."""
    torch.manual_seed(0)
    vocabulary, hidden = len(tokenizer), 32
    xlmr = XLMRobertaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=4 if thin else 12, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=258, type_vocab_size=1, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    xglm = XGLMConfig(
        vocab_size=vocabulary, d_model=hidden, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=130
    )
    bloom = BloomConfig(vocab_size=vocabulary, hidden_size=hidden, n_layer=2, n_head=4)
    made = {
        "xlmr": backbone_from_config(xlmr, decoupled=False),
        "xglm": XGLMForCausalLM(xglm),
        "bloom": BloomForCausalLM(bloom),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def small(name: str, folders: dict[str, Path], *, thin: bool) -> Recipe:
    """A recipe with the small models; thin: one cell of each label, two test languages."""
    lines = THIN_LINES if thin else LINES
    recipe = load_recipe(name, [*OVERRIDES, *((f"{s}.lines", lines) for s in ("ticket", "language_sft", "adapters"))])
    cells = []
    for cell in recipe.cells:
        kind = next((k for k in ("xglm", "bloom") if k in str(cell["model"])), "xlmr")
        facts = {**cell.facts, "model": str(folders[kind])}
        if kind == "xlmr":  # budgets of a model whose parameters are nearly all word embeddings
            budget = {"density": 0.02} if cell["method"] in ("lt-sft", "sc-sft", "rand-sft") else {}
            options = {key: value for key, value in (cell["options"] or {}).items() if key != "k"}
            if cell["method"] == "sc-sft":
                budget = {"density": 0.001}
            if cell["method"] == "rand-sft" and cell["options.scope"] not in (None, "all"):
                budget = {"density": 0.0005}
            facts["options"] = {**options, **budget}
            if cell["ticket.strategy"] == "frozen_embedding":
                facts["ticket"] = {**cell["ticket"], "density": 0.002}
            if cell["language_sft"]:
                facts["language_sft"] = {**cell["language_sft"], "density": 0.001}
        if thin:
            if any(str(cell["label"]) == str(other["label"]) and facts["model"] == other["model"] for other in cells):
                continue
            if cell["test.languages"] != "same":
                languages = tested(cell["test.task"], cell["test.languages"], cell["train.language"])
                facts["test"] = {**cell["test"], "languages": list(languages)[:2]}
        cells.append(type(cell)(facts))
    unique = {cell.id: cell for cell in cells}
    return replace(recipe, cells=tuple(unique.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=recipe_names())
    parser.add_argument("--thin", action="store_true", help="one cell of each label, two test languages")
    options = parser.parse_args()
    torch.set_num_threads(1)  # for so small a model, threads that wait for each other cost more than they give
    folders = models(
        options.output / "models", AutoTokenizer.from_pretrained(options.data / TOKENIZER), thin=options.thin
    )
    gc.freeze()  # accelerate collects garbage after each run: not among imported modules
    bench = Workbench(data=options.data, cache=Cache(options.output / "cache"))
    failed, start = 0, time.perf_counter()
    for name in options.recipes:
        began = time.perf_counter()
        recipe = small(name, folders, thin=options.thin)
        failed += run_recipe(recipe, options.output / name, bench)
        rows = results.read(options.output / name / results.RESULTS)
        write_report(recipe, rows, options.output / name)
        print(f"{name}: {len(rows)} of {len(recipe.cells)} cells, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{failed} cells failed, {time.perf_counter() - start:.0f} s in all; tables and plots in {options.output}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
