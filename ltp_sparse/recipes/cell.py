"""One cell of a recipe, from data and base model to a row of results."""

from __future__ import annotations

import platform
import random
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ltp_sparse import __version__
from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.deltas.lt_sft import read_lt_sft
from ltp_sparse.methods import METHODS, Method, Setup
from ltp_sparse.prompting import CLASSES, WORDS, Verbalizer
from ltp_sparse.recipes.artefacts import adapter, language_sft, stage_1, stage_1_seeds, text_of
from ltp_sparse.recipes.checks import method_of, strategy_and_score
from ltp_sparse.recipes.corpora import Corpus, StandIn
from ltp_sparse.recipes.recipe import Cell
from ltp_sparse.recipes.workbench import Workbench
from ltp_sparse.selection.ltp import find_ticket
from ltp_sparse.selection.scores import magnitude
from ltp_sparse.tasks import TASKS, Task, tested
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.evaluation import evaluate, largest_class
from ltp_sparse.training.masked_texts import text_hash
from ltp_sparse.training.method import Trained, load_trained, train_method
from ltp_sparse.training.mlm import MLMSettings
from ltp_sparse.weights import files
from ltp_sparse.weights.names import layer_of, module_of


def run_cell(
    cell: Cell, bench: Workbench, *, folder: Path | None = None, save_every: int | None = None
) -> dict[str, Any]:
    """Trains and evaluates a cell; the base model ends at its initial bits.

    Args:
        cell: the cell.
        bench: where data and artefacts are, and how to compute.
        folder: for checkpoints, from which an interrupted run resumes; None: there are none.
        save_every: epochs between checkpoints.

    Returns:
        The row: the cell's facts, scores by language and their mean, what was trained, and the provenance.
    """
    start = time.perf_counter()
    method = method_of(cell)
    notes: list[str] = []
    task, language = _training_task(cell, bench, notes), cell["train.language"]
    draw = {"shots": cell["shots"], "seed": cell["seed"]}
    drawn = (bench.examples(task.name, split, language, **draw) for split in ("train", "dev"))
    train, dev = (_sample(examples, cell["train.limit"]) for examples in drawn)
    tests = _Tests(cell, bench, task, test_examples(cell, bench), notes)
    ticket, of_stage_1 = ticket_of(cell, bench, notes)
    if tests.adapts:
        source = tests.adapter(cell["adapters.source"])
        method = replace(method, language_adapter=source)  # type: ignore[call-arg]
    model, tokenizer = bench.model(cell, method)
    with tests.applied(cell["language_sft.source"], model):
        trained = train_method(
            method,
            model,
            tokenizer,
            train,
            dev,
            ticket=ticket,
            labels=task.labels,
            language=language if language in WORDS else "en",
            verbalizer=_verbalizer(cell, method, task, tokenizer),
            seed=cell["seed"],
            metric=task.metric,
            output_dir=folder,
            save_every=save_every,
            resume=folder is not None,
            micro_batch_size=bench.micro_batch_size,
            bf16=bench.bf16,
            keep_last=bool(cell["last"]),
            progress=bench.progress,
            arguments={"report_to": bench.report_to},
        )
        # without language SFTs and adapters, the trained model itself is tested, which need not be built again
        scores = {} if tests.composes else tests.scores(trained, tests.examples)
        trained.release()
    if tests.composes:
        scores = tests.scores_of(trained.delta, model, tokenizer)
    last = {}
    if trained.last is not None:
        epoch = trained.last.metadata["epoch"]
        of_last = scores if epoch == trained.best_epoch else tests.scores_of(trained.last, model, tokenizer)
        last["last_update"] = {"epoch": epoch, "scores": of_last, "mean": statistics.fmean(of_last.values())}
    sizes = {language: len(examples) for language, examples in tests.examples.items()}
    return {
        "id": cell.id,
        **cell.facts,
        "name": method.name,
        "metric": task.metric,
        "scores": scores,
        "mean": sum(scores.values()) / len(scores),
        **last,
        "largest_class": largest_class(tests.examples, task.metric),
        "dev_score": max(trained.dev_scores) if method.picks != "loss" else min(trained.dev_scores),
        "dev_scores": list(trained.dev_scores),
        "epoch": trained.best_epoch,
        "k": trained.delta.ticket.k,
        "active": active_by_layer(trained.delta.ticket),
        **({} if of_stage_1 is None else {"stage_1": of_stage_1}),
        "language_active": tests.active,
        "dense_parameters": sum(tensor.numel() for tensor in trained.delta.dense.values()),
        "optimizer_bytes": trained.optimizer_bytes,
        "examples": {"train": len(train), "dev": len(dev), "test": sizes},
        "notes": [*notes, *(f"{cell['label']}: {note}" for note in tests.stuck)],
        "seconds": round(time.perf_counter() - start, 2),
        "provenance": _provenance(bench, method, (train, dev, *tests.examples.values())),
    }


def _provenance(bench: Workbench, method: Method, examples: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """What a row was made from, and where."""
    return {
        "base": bench.digest,
        "bf16": bench.bf16,
        "data": text_hash(repr(example) for part in examples for example in part),
        "settings": method.describe(),
        "ltp_sparse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class _Tests:
    """How a cell tests a result: examples by language, with the language SFT or adapter of each if it has them.

    Args:
        cell: the cell.
        bench: where artefacts are, and how to compute.
        task: the task of training, whose classes and metric are those of the tests.
        examples: language -> examples.
        notes: the row's notes; a note is added for each text that stands in for another.

    Attributes:
        active: language -> active entries of its SFT by layer, for the SFTs used so far.
        stuck: notes on tests in which all predictions are of one class.
    """

    def __init__(
        self, cell: Cell, bench: Workbench, task: Task, examples: Mapping[str, Sequence[Any]], notes: list[str]
    ) -> None:
        self.cell, self.bench, self.task, self.examples, self.notes = cell, bench, task, examples, notes
        self.active: dict[str, dict[str, list[int]]] = {}
        self.stuck: list[str] = []

    @property
    def adapts(self) -> bool:
        """Whether each language has its adapter."""
        return self.cell["adapters.source"] is not None

    @property
    def composes(self) -> bool:
        """Whether the model differs between test languages."""
        return self.adapts or self.cell["language_sft"] is not None

    def adapter(self, language: str) -> str:
        """The path of a language's adapter."""
        _note(text_of(self.cell, self.bench, "adapters", language), self.notes)
        return str(adapter(self.cell, self.bench, language))

    def scores(self, ready: Setup | Trained, examples: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """Scores of a model as it is."""
        return evaluate(
            ready,
            examples,
            metric=self.task.metric,
            labels=self.task.labels,
            batch_size=self.bench.batch_size,
            dtype=torch.bfloat16 if self.bench.bf16 else None,
            progress=self.bench.progress,
            notes=self.stuck,
        )

    def scores_of(
        self, delta: SparseDelta, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, float]:
        """Scores of a delta on a model at its initial bits, which are restored after each language."""
        scores: dict[str, float] = {}
        for language, examples in self.examples.items():
            if self.adapts:
                options = {**delta.metadata["options"], "language_adapter": self.adapter(language)}
                facts = {**delta.metadata, "options": options}
                delta = SparseDelta(delta.ticket, delta.values, delta.originals, delta.dense, facts)
            with self.applied(language if self.cell["language_sft"] else None, model):
                setup = load_trained(model, tokenizer, delta)
                try:
                    scores |= self.scores(setup, {language: examples})
                finally:
                    delta.revert(setup.model)
                    setup.undo()
        return scores

    @contextmanager
    def applied(self, language: str | None, model: Any) -> Iterator[None]:
        """Applies the SFT of a language to the model within this context; None: changes nothing."""
        if language is None:
            yield
            return
        delta = self._delta(language, model)
        self.active[language] = active_by_layer(delta.ticket)
        delta.apply(model)
        try:
            yield
        finally:
            delta.revert(model)

    def _delta(self, language: str, model: Any) -> SparseDelta:
        """The SFT in the file that the recipe names (`files`; LT-SFT's format can be read, too), else in the cache."""
        if (provided := self.cell["language_sft.files"]) is None:
            _note(text_of(self.cell, self.bench, "language_sft", language), self.notes)
            return SparseDelta.load(language_sft(self.cell, self.bench, language))
        path = Path(provided.format(language=language)).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"language_sft, files: no {path}; expected the language SFT of {language!r} there")
        if path.suffix == ".safetensors":
            return SparseDelta.load(path)
        delta = read_lt_sft(path, model)
        return SparseDelta(delta.ticket, delta.values, delta.originals, {}, delta.metadata)  # without a head


def test_examples(cell: Cell, bench: Workbench) -> dict[str, Sequence[Any]]:
    """Language -> test examples: all, or `test.limit` random ones, the same for every cell."""
    task, split, limit = cell["test.task"], cell["test.split"] or "test", cell["test.limit"]
    languages = tested(task, cell["test.languages"], cell["train.language"])
    return {language: _sample(bench.examples(task, split, language), limit) for language in languages}


def _sample(examples: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` random examples, the same ones for every cell and, where they are parallel, every language."""
    if limit is None or limit >= len(examples):
        return examples
    return random.Random(0).sample(list(examples), limit)


def ticket_of(cell: Cell, bench: Workbench, notes: list[str]) -> tuple[Ticket | None, dict[str, Any] | None]:
    """The ticket of stage 1 that a cell asks for, and facts about it for the row of results.

    The facts are its seed, the source of the text, updates and their tokens, the validation loss of the kept weights
    and, if the recipe has several seeds of stage 1, the `overlap` with the ticket of the next one.
    """
    spec = cell["ticket"]
    if spec is None:
        return None, None
    strategy, score = strategy_and_score(cell)
    options = {key: spec[key] for key in ("density", "of", "budget", "segment", "intersect", "order") if key in spec}
    model, _ = bench.model(cell, METHODS["ltp"](), tied=strategy == "vanilla")
    if score == "magnitude":
        return find_ticket(model, None, score=magnitude(model), strategy=strategy, **options), {"score": score}
    text = text_of(cell, bench, "ticket")
    _note(text, notes)

    def selected(path: Path) -> Ticket:
        if score == "change":
            return find_ticket(model, path, strategy=strategy, **options)
        return find_ticket(model, None, score=files.load(path, "scores")[0], strategy=strategy, **options)

    seed, *others = stage_1_seeds(cell)
    ticket = selected(path := stage_1(cell, bench, seed))
    if ticket.k < (requested := ticket.metadata.get("requested_k", ticket.k)):
        notes.append(f"ticket: {ticket.k:,} of the {requested:,} entries asked for have moved")
    settings = MLMSettings(**{**(cell["ticket.mlm"] or {}), "seed": seed})
    facts = {"score": score, "text": text.source, "seed": seed, "learning_rate": settings.learning_rate}
    if score == "change":
        tuned = files.load(path, "tuned weights")[1]["metadata"]
        tokens = tuned["steps"] * settings.batch_size * settings.length
        facts |= {"updates": tuned["steps"], "tokens": tokens, "kept_update": tuned["step"]}
        facts["validation_loss"] = round(tuned["validation_loss"], 4)
    for other in others:
        facts["overlap"] = {"seed": other, **overlap(ticket, selected(stage_1(cell, bench, other)))}
    return ticket, facts


def overlap(ticket: Ticket, other: Ticket) -> dict[str, float]:
    """The share of a ticket's entries that are in another one, and the share that chance gives for these counts."""
    expected = sum(ticket.sets[name].k * other.sets[name].k / ticket.sets[name].n for name in ticket.active_names)
    return {"share": round((ticket & other).k / ticket.k, 4), "chance": round(expected / ticket.k, 4)}


def active_by_layer(ticket: Ticket) -> dict[str, list[int]]:
    """Layer -> active entries of attention matrices, and of everything else."""
    counts: dict[str, list[int]] = {}
    for name, index_set in ticket.sets.items():
        in_attention = module_of(name) == "attention"
        counts.setdefault(layer_of(name), [0, 0])[not in_attention] += index_set.k
    return counts


def _training_task(cell: Cell, bench: Workbench, notes: list[str]) -> Task:
    """The training task, or the substitute that the recipe names if the files are not in the data folder."""
    name, stand_in = cell["train.task"], cell["train.stand_in"]
    if bench.data is None or stand_in is None:
        return TASKS[name]
    try:
        bench.examples(name, "train", cell["train.language"], shots=cell["shots"], seed=cell["seed"])
        return TASKS[name]
    except FileNotFoundError:
        notes.append(f"{stand_in} stands in for {name}")
        warnings.warn(f"{notes[-1]}, which is not in {bench.data}", StandIn, stacklevel=2)
        return TASKS[stand_in]


def _verbalizer(cell: Cell, method: Method, task: Task, tokenizer: Any) -> Verbalizer | None:
    words = cell["verbalizer"]
    if not method.scores_words:
        return None
    if isinstance(words, Mapping):
        return Verbalizer.from_words(tokenizer, words, task.labels)
    if task.labels != CLASSES:
        raise ValueError(f"a prompt for {task.name} needs the words of its classes: verbalizer: {{class: word, ...}}")
    language = words or cell["train.language"]
    return Verbalizer.for_language(tokenizer, language if language in WORDS else "en")


def _note(text: Corpus, notes: list[str]) -> None:
    note = f"text: {text.source} stands in, {len(text.texts):,} lines"
    if text.stand_in and note not in notes:
        notes.append(note)
