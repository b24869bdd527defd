"""Artefacts, which several cells share: tuned weights or scores of stage 1, language SFTs, language adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ltp_sparse.methods import METHODS
from ltp_sparse.recipes.checks import method_of, strategy_and_score
from ltp_sparse.recipes.corpora import Corpus
from ltp_sparse.recipes.recipe import Cell
from ltp_sparse.recipes.workbench import Workbench
from ltp_sparse.selection.ltp import STRATEGIES
from ltp_sparse.selection.scores import SCORES
from ltp_sparse.tasks import tested
from ltp_sparse.training.language import ADAPTER_SETTINGS, LANGUAGE_SETTINGS, train_language, train_language_adapter
from ltp_sparse.training.masked_texts import text_hash
from ltp_sparse.training.mlm import MLMSettings, mlm_losses, tune_mlm
from ltp_sparse.weights import files
from ltp_sparse.weights.names import canonical_parameters
from ltp_sparse.weights.reading import sha256_of

LINES = {"ticket": 300_000, "language_sft": 1_000_000, "adapters": 1_000_000}
"""Stage of a cell -> number of sentences, if the recipe gives none."""

_FACTS = {
    "ticket": ("strategy", "score", "language", "text", "lines", "mlm"),
    "language_sft": ("kind", "k", "density", "text", "lines", "mlm"),
    "adapters": ("text", "lines", "mlm"),
}
"""Stage -> the facts of a cell on which its artefact depends."""


@dataclass(frozen=True)
class Artefact:
    """One artefact.

    Attributes:
        stage: ticket, language_sft or adapters.
        of: the seed of stage 1, or the language.
        cell: one of the cells that need it.
    """

    stage: str
    of: int | str
    cell: Cell

    @property
    def id(self) -> str:
        """A digest of what it depends on, and so the same for all cells that share it."""
        facts = {path: self.cell[path] for path in ("model", "tokenizer")}
        facts |= {name: self.cell[f"{self.stage}.{name}"] for name in _FACTS[self.stage]}
        return sha256_of([self.stage, self.of, facts])[:16]

    def __str__(self) -> str:
        return f"{self.stage} of {'seed ' if self.stage == 'ticket' else ''}{self.of}"

    def file(self, bench: Workbench) -> Path:
        """Its file in the cache, which is made if it is missing."""
        return _MAKERS[self.stage](self.cell, bench, self.of)


def needed(cell: Cell) -> list[Artefact]:
    """The artefacts that a cell needs."""
    found = []
    if cell["ticket"] is not None and strategy_and_score(cell)[1] != "magnitude":
        found += [Artefact("ticket", seed, cell) for seed in stage_1_seeds(cell)]
    for stage in ("language_sft", "adapters"):
        source = cell[f"{stage}.source"]
        trained = cell[stage] is not None and cell[f"{stage}.files"] is None
        if trained and (source is not None or stage == "language_sft"):
            languages = tested(cell["test.task"], cell["test.languages"], cell["train.language"])
            found += [Artefact(stage, language, cell) for language in dict.fromkeys([source, *languages]) if language]
    return found


def stage_1_seeds(cell: Cell) -> list[int]:
    """The seed of a cell's ticket and, if the recipe has several, the next one, for comparison."""
    seeds = cell["ticket.seeds"] or [(cell["ticket.mlm"] or {}).get("seed", MLMSettings().seed)]
    turn = cell["seed"] - 1
    return [seeds[(turn + i) % len(seeds)] for i in range(min(len(seeds), 2))]


def text_of(cell: Cell, bench: Workbench, stage: str, language: str | None = None) -> Corpus:
    """The text of a stage.

    Args:
        cell: the cell.
        bench: where corpora are read.
        stage: the part of the cell that names the text, a key of `LINES`.
        language: its language; None: those that the stage names, else English.
    """
    return bench.corpus(language or cell[f"{stage}.language"] or "en", cell[stage], LINES[stage])


def stage_1(cell: Cell, bench: Workbench, seed: int) -> Path:
    """Tuned weights, or scores at the initial weights, from which a ticket is selected."""
    strategy, score = strategy_and_score(cell)
    model, tokenizer = bench.model(cell, METHODS["ltp"](), tied=strategy == "vanilla")
    text = text_of(cell, bench, "ticket")
    settings = MLMSettings(**{"strategy": strategy, "bf16": bench.bf16, **(cell["ticket.mlm"] or {}), "seed": seed})

    def tune(path: Path) -> None:
        result = tune_mlm(model, tokenizer, text.texts, settings, progress=bench.progress, source=text.source)
        tuned = {name: p.detach() for name, p in canonical_parameters(model).items() if name in result.originals}
        files.save(path, "tuned weights", tuned, {"metadata": result.metadata})
        result.reset()

    def score_entries(path: Path) -> None:
        batches = mlm_losses(model, tokenizer, text.texts, settings)
        files.save(path, "scores", SCORES[score](model, batches, STRATEGIES[strategy]), {"metadata": {}})

    if score == "change":
        return bench.cache.get("tuned", _facts(bench, text, settings), tune)
    return bench.cache.get("scores", {**_facts(bench, text, settings), "score": score}, score_entries)


def language_sft(cell: Cell, bench: Workbench, language: str) -> Path:
    """A sparse delta that has learned a language."""
    spec = cell["language_sft"]
    kind = spec.get("kind", "lt-sft")
    model, tokenizer = bench.model(cell, method_of(cell))
    text = text_of(cell, bench, "language_sft", language)
    settings = replace(LANGUAGE_SETTINGS, bf16=bench.bf16, **(spec.get("mlm") or {}))
    budget = {key: spec[key] for key in ("k", "density") if key in spec}

    def make(path: Path) -> None:
        delta = train_language(kind, model, tokenizer, text.texts, settings, progress=bench.progress, **budget)
        delta.save(path, max_shard_size=None)  # the cache keeps one file

    return bench.cache.get("language-sft", {**_facts(bench, text, settings), "kind": kind, **budget}, make)


def adapter(cell: Cell, bench: Workbench, language: str) -> Path:
    """An adapter that has learned a language."""
    model, tokenizer = bench.model(cell, METHODS["mad-x"]())
    text = text_of(cell, bench, "adapters", language)
    settings = replace(ADAPTER_SETTINGS, bf16=bench.bf16, **(cell["adapters.mlm"] or {}))

    def make(path: Path) -> None:
        train_language_adapter(model, tokenizer, text.texts, settings, progress=bench.progress).save(path)

    return bench.cache.get("adapter", _facts(bench, text, settings), make)


_MAKERS: dict[str, Callable[[Cell, Workbench, Any], Path]] = {
    "ticket": stage_1,
    "language_sft": language_sft,
    "adapters": adapter,
}


def _facts(bench: Workbench, text: Corpus, settings: Any) -> dict[str, Any]:
    """What an artefact is made from, which is its key in the cache."""
    data = text_hash(text.texts)
    return {"base": bench.digest, "data": data, "settings": asdict(settings), "source": text.source}
