"""One cell of a recipe, from data and base model to a row of results."""

from __future__ import annotations

import hashlib
import platform
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ltp_sparse import __version__
from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.deltas.lt_sft import read_lt_sft
from ltp_sparse.methods import METHODS, Method, Settings
from ltp_sparse.models import Adapter
from ltp_sparse.models.backbone import load_backbone, load_causal
from ltp_sparse.prompting import CLASSES, WORDS, Verbalizer
from ltp_sparse.recipes.cache import Cache
from ltp_sparse.recipes.corpora import Corpus, StandIn, corpus, mixture
from ltp_sparse.recipes.recipe import Cell
from ltp_sparse.selection.ltp import STRATEGIES, find_ticket
from ltp_sparse.selection.scores import SCORES, magnitude
from ltp_sparse.tasks import TASKS, Task, tested
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.evaluation import evaluate, largest_class
from ltp_sparse.training.language import ADAPTER_SETTINGS, LANGUAGE_SETTINGS, train_language, train_language_adapter
from ltp_sparse.training.masked_texts import text_hash
from ltp_sparse.training.method import load_trained, train_method
from ltp_sparse.training.mlm import MLMSettings, mlm_losses, tune_mlm
from ltp_sparse.weights import files
from ltp_sparse.weights.digests import EARLIER, fingerprint
from ltp_sparse.weights.names import canonical_parameters, layer_of, module_of
from ltp_sparse.weights.reading import closest

STAGE_1_LINES = 300_000
LANGUAGE_LINES = 1_000_000
_TICKET_KEYS = (
    "strategy", "density", "of", "budget", "segment", "intersect", "order", "score", "seeds", "language", "lines",
    "text", "mlm",
)  # fmt: skip


@dataclass
class Workbench:
    """What the cells of a run share: where data and artefacts are, how to compute, and the base model last used.

    Attributes:
        data: folder of the data sets' original files; None: the Hub
        cache: of what cells share
        bf16: compute in bfloat16 under autocast
        micro_batch_size: examples per forward pass; None: the whole batch
        batch_size: examples of a forward pass in evaluation
        report_to: logging integration of transformers, of the training of a cell
    """

    data: Path | None
    cache: Cache
    bf16: bool = False
    micro_batch_size: int | None = None
    batch_size: int = 64
    report_to: str = "none"
    progress: bool = False
    _key: tuple[Any, ...] = ()
    _model: Any = None
    _tokenizer: Any = None
    _digest: str = ""
    _corpora: dict[tuple[Any, ...], Corpus] = field(default_factory=dict)
    _examples: dict[tuple[Any, ...], Sequence[Any]] = field(default_factory=dict)

    def model(self, cell: Cell, method: Method, *, tied: bool | None = None) -> tuple[Any, Any]:
        """The base model of a cell at its initial weights, and its tokenizer; the same objects while they serve."""
        tied = method.tied if tied is None else tied
        key = (cell["model"], cell["tokenizer"], method.backbone, tied)
        if key != self._key:
            self.forget()
            if method.backbone == "causal":
                self._model, self._tokenizer = load_causal(cell["model"], tokenizer=cell["tokenizer"])
            else:
                self._model, self._tokenizer = load_backbone(
                    cell["model"], decoupled=not tied, tokenizer=cell["tokenizer"]
                )
            if torch.cuda.is_available():
                self._model.to("cuda")
            parameters = {name: p.detach() for name, p in canonical_parameters(self._model).items()}
            # a decoupled head repeats the embedding: the same base has one digest
            parameters.pop("lm_head.decoder.weight", None)
            # of the kind of earlier versions, whose artefacts are then found again
            found = fingerprint(parameters, like=dict.fromkeys(parameters, EARLIER))
            self._digest, self._key = hashlib.sha256(repr(found).encode()).hexdigest()[:32], key
        return self._model, self._tokenizer

    def forget(self) -> None:
        """Drops the base model: the next cell loads it anew."""
        self._key, self._model = (), None

    def examples(
        self, task: str, split: str, language: str, *, shots: int | None = None, seed: int = 0
    ) -> Sequence[Any]:
        """Examples of a task; read once for all cells."""
        key = (task, split, language, shots, seed)
        if key not in self._examples:
            self._examples[key] = TASKS[task].load(split, language, shots=shots, data=self.data, seed=seed)
        return self._examples[key]

    def corpus(self, language: str | Sequence[str], spec: Mapping[str, Any], lines: int) -> Corpus:
        """The text that a stage (`spec`) asks for, in a language, or equal shares of several; read once for all."""
        lines = spec.get("lines", lines)
        if not isinstance(language, str):
            return mixture([self.corpus(one, {**spec, "lines": lines // len(language)}, lines) for one in language])
        key = (language, lines, spec.get("text"))
        if key not in self._corpora:
            self._corpora[key] = corpus(*key[:2], self.data, text=key[2])
        return self._corpora[key]

    def digest(self) -> str:
        """Of the base model loaded last."""
        return self._digest


def method_of(cell: Cell) -> Method:
    """The method of a cell, with its options and settings; a ValueError names what it does not know."""
    if cell["method"] not in METHODS:
        raise ValueError(f"unknown method {cell['method']!r}; known: {', '.join(METHODS)}")
    kind = METHODS[cell["method"]]
    default = kind()
    known = [f.name for f in fields(default) if f.name != "settings"]
    _refuse_unknown(cell["options"], known, f"options of {cell['method']}")
    _refuse_unknown(cell["settings"], [f.name for f in fields(default.settings)], f"settings of {cell['method']}")
    _refuse_texts(cell["settings"], default.settings, f"settings of {cell['method']}")
    settings: Settings = replace(default.settings, **(cell["settings"] or {}))
    try:
        return kind(settings=settings, **(cell["options"] or {}))
    except TypeError as error:
        raise ValueError(f"options of {cell['method']}: {error}") from error


def check_cell(cell: Cell) -> None:
    """Raises ValueError for options, settings, or settings of a stage that are unknown or of another kind."""
    method_of(cell)
    for stage in ("ticket", "language_sft", "adapters"):
        if cell[f"{stage}.mlm"]:
            _refuse_unknown(cell[f"{stage}.mlm"], [f.name for f in fields(MLMSettings)], f"{stage}, mlm")
            _refuse_texts(cell[f"{stage}.mlm"], MLMSettings(), f"{stage}, mlm")


def run_cell(
    cell: Cell, bench: Workbench, *, folder: Path | None = None, save_every: int | None = None
) -> dict[str, Any]:
    """Trains and evaluates a cell; the base model ends at its initial bits.

    Args:
        folder: for the checkpoints of an interrupted run, with save_every epochs between them; None keeps none

    Returns the row: the cell's facts, scores by language and their mean, what was trained, and where all came from.
    """
    start = time.perf_counter()
    method = method_of(cell)
    notes: list[str] = []
    stuck: list[str] = []  # of a test whose predictions are all one class
    train_task, language = _training_task(cell, bench, notes), cell["train.language"]
    draw = {"shots": cell["shots"], "seed": cell["seed"]}
    train, dev = (bench.examples(train_task.name, split, language, **draw) for split in ("train", "dev"))
    if (limit := cell["train.limit"]) is not None:
        train, dev = _sample(train, limit), _sample(dev, limit)
    tests = test_examples(cell, bench)
    ticket, stage_1 = ticket_of(cell, bench, notes)
    sft = LanguageDeltas(cell, bench, notes)
    source = cell["adapters.source"]
    if source is not None:
        method = replace(method, language_adapter=str(adapter_of(source, cell, bench, notes)))  # type: ignore[call-arg]
    model, tokenizer = bench.model(cell, method)
    with sft.applied(cell["language_sft.source"], model):
        trained = train_method(
            method,
            model,
            tokenizer,
            train,
            dev,
            ticket=ticket,
            labels=train_task.labels,
            language=language if language in WORDS else "en",
            verbalizer=_verbalizer(cell, method, train_task, tokenizer),
            seed=cell["seed"],
            metric=train_task.metric,
            output_dir=folder,
            save_every=save_every,
            resume=folder is not None,
            micro_batch_size=bench.micro_batch_size,
            bf16=bench.bf16,
            keep_last=bool(cell["last"]),
            progress=bench.progress,
            arguments={"report_to": bench.report_to},
        )
        composed = cell["language_sft"] is not None or source is not None
        scores = {} if composed else _scores(trained, tests, train_task, bench, stuck)
        trained.release()

    def scores_of(delta: SparseDelta) -> dict[str, float]:
        """With the language SFT or adapter of each test language, where the cell has some."""
        scores: dict[str, float] = {}
        for test_language in tests:
            if source is not None:
                path = adapter_of(test_language, cell, bench, notes)
                options = {**delta.metadata["options"], "language_adapter": str(path)}
                facts = {**delta.metadata, "options": options}
                delta = SparseDelta(delta.ticket, delta.values, delta.originals, delta.dense, facts)
            with sft.applied(test_language if cell["language_sft"] else None, model):
                setup = load_trained(model, tokenizer, delta)
                try:
                    scores |= _scores(setup, {test_language: tests[test_language]}, train_task, bench, stuck)
                finally:
                    delta.revert(setup.model)
                    setup.undo()
        return scores

    if composed:
        scores = scores_of(trained.delta)
    last = {}
    if trained.last is not None:
        epoch = trained.last.metadata["epoch"]
        of_last = scores if epoch == trained.best_epoch else scores_of(trained.last)
        last["last_update"] = {"epoch": epoch, "scores": of_last, "mean": statistics.fmean(of_last.values())}
    return {
        "id": cell.id,
        **cell.facts,
        "name": method.name,
        "metric": train_task.metric,
        "scores": scores,
        "mean": sum(scores.values()) / len(scores),
        **last,
        "largest_class": largest_class(tests, train_task.metric),
        "dev_score": max(trained.dev_scores) if method.picks != "loss" else min(trained.dev_scores),
        "dev_scores": list(trained.dev_scores),
        "epoch": trained.best_epoch,
        "k": trained.delta.ticket.k,
        "active": active_by_layer(trained.delta.ticket),
        **({} if stage_1 is None else {"stage_1": stage_1}),
        "language_active": sft.active,
        "dense_parameters": sum(tensor.numel() for tensor in trained.delta.dense.values()),
        "optimizer_bytes": trained.optimizer_bytes,
        "examples": {"train": len(train), "dev": len(dev), "test": {name: len(of) for name, of in tests.items()}},
        "notes": [*notes, *(f"{cell['label']}: {note}" for note in stuck)],
        "seconds": round(time.perf_counter() - start, 2),
        "provenance": {
            "base": bench.digest(),
            "data": _data_hash([train, dev, *tests.values()]),
            "settings": method.describe(),
            "ltp_sparse": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }


def test_examples(cell: Cell, bench: Workbench) -> dict[str, Sequence[Any]]:
    """Language -> test examples: all, or `test.limit` random ones, the same for every cell."""
    task = TASKS[cell["test.task"]]
    tests = {}
    for language in tested(task.name, cell["test.languages"], cell["train.language"]):
        examples = bench.examples(task.name, cell["test.split"] or "test", language)
        limit = cell["test.limit"]
        tests[language] = examples if limit is None else _sample(examples, limit)
    return tests


def _sample(examples: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most `limit` random examples, the same ones for every cell and, where they are parallel, every language."""
    return examples if limit >= len(examples) else random.Random(0).sample(list(examples), limit)


def ticket_of(cell: Cell, bench: Workbench, notes: list[str]) -> tuple[Ticket | None, dict[str, Any] | None]:
    """The ticket of stage 1 that a cell asks for, and what rows tell of it; tuned weights come from the cache.

    What is told: where the text is from, updates and their tokens, the validation loss of the weights that were kept;
    and, where there are several seeds of stage 1, which one it is, and the share of entries that it has in common with
    the ticket of the next one, beside what chance would give tickets with as many entries in each parameter.
    """
    spec = cell["ticket"]
    if spec is None:
        return None, None
    _refuse_unknown(spec, _TICKET_KEYS, "ticket")
    strategy, score = spec.get("strategy", "decoupled"), spec.get("score", "change")
    if strategy not in STRATEGIES:
        raise ValueError(f"ticket: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if score not in ("change", "magnitude", *SCORES):
        raise ValueError(f"ticket: score must be one of change, magnitude, {', '.join(SCORES)}, got {score!r}")
    model, tokenizer = bench.model(cell, METHODS["ltp"](), tied=strategy == "vanilla")
    options = {key: spec[key] for key in ("density", "of", "budget", "segment", "intersect", "order") if key in spec}
    if score == "magnitude":
        ticket = find_ticket(model, None, score=magnitude(model), strategy=strategy, **options)
        return ticket, {"score": score}
    text = bench.corpus(spec.get("language", "en"), spec, STAGE_1_LINES)
    _note(text, notes)
    settings = MLMSettings(**{"strategy": strategy, "bf16": bench.bf16, **(spec.get("mlm") or {})})

    def found(settings: MLMSettings) -> tuple[Ticket, dict[str, Any]]:
        def make(path: Path) -> None:
            result = tune_mlm(model, tokenizer, text.texts, settings, progress=bench.progress, source=text.source)
            tuned = {name: p.detach() for name, p in canonical_parameters(model).items() if name in result.originals}
            files.save(path, "tuned weights", tuned, {"metadata": result.metadata})
            result.reset()

        def make_scores(path: Path) -> None:
            batches = mlm_losses(model, tokenizer, text.texts, settings)
            files.save(path, "scores", SCORES[score](model, batches, STRATEGIES[strategy]), {"metadata": {}})

        facts = {
            "base": bench.digest(), "data": text_hash(text.texts), "settings": _plain(settings), "source": text.source,
        }  # fmt: skip
        if score == "change":
            path = bench.cache.get("tuned", facts, make)
            return find_ticket(model, path, strategy=strategy, **options), files.load(path, "tuned weights")[1][
                "metadata"
            ]
        path = bench.cache.get("scores", {**facts, "score": score}, make_scores)
        return find_ticket(model, None, score=files.load(path, "scores")[0], strategy=strategy, **options), {}

    seeds = spec.get("seeds") or [settings.seed]
    turn = (cell["seed"] - 1) % len(seeds)
    ticket, tuned = found(replace(settings, seed=seeds[turn]))
    if ticket.k < (requested := ticket.metadata.get("requested_k", ticket.k)):
        notes.append(f"ticket: {ticket.k:,} of the {requested:,} entries asked for have moved")
    told = {"score": score, "text": text.source, "seed": seeds[turn], "learning_rate": settings.learning_rate}
    if tuned:
        sequences = tuned["steps"] * settings.batch_size
        told |= {"updates": tuned["steps"], "tokens": sequences * settings.length, "kept_update": tuned["step"]}
        told["validation_loss"] = round(tuned["validation_loss"], 4)
    if len(seeds) > 1:
        other, _ = found(replace(settings, seed=seeds[(turn + 1) % len(seeds)]))
        told["overlap"] = {"seed": seeds[(turn + 1) % len(seeds)], **overlap(ticket, other)}
    return ticket, told


def overlap(ticket: Ticket, other: Ticket) -> dict[str, float]:
    """The share of a ticket's entries that are in another, and what is expected of two random ones with as many
    entries in each parameter.
    """
    expected = sum(ticket.sets[name].k * other.sets[name].k / ticket.sets[name].n for name in ticket.active_names)
    return {"share": round((ticket & other).k / ticket.k, 4), "chance": round(expected / ticket.k, 4)}


class LanguageDeltas:
    """The language SFTs that a cell composes with, made on demand and kept in the cache.

    active: language -> where the entries of its SFT lie, of those used so far
    """

    def __init__(self, cell: Cell, bench: Workbench, notes: list[str]) -> None:
        self.cell, self.bench, self.notes = cell, bench, notes
        self.active: dict[str, dict[str, list[int]]] = {}

    @contextmanager
    def applied(self, language: str | None, model: Any) -> Iterator[None]:
        """The model with a language's SFT below everything else; None: as it is."""
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
        """The file that the recipe provides (`files`), of ours or of LT-SFT's authors; or one that is trained."""
        if (provided := self.cell["language_sft.files"]) is None:
            return SparseDelta.load(self._path(language, model))
        path = Path(provided.format(language=language)).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"language_sft, files: no {path}; expected the language SFT of {language!r} there")
        if path.suffix == ".safetensors":
            return SparseDelta.load(path)
        delta = read_lt_sft(path, model)
        return SparseDelta(delta.ticket, delta.values, delta.originals, {}, delta.metadata)  # without a head

    def _path(self, language: str, model: Any) -> Path:
        spec = dict(self.cell["language_sft"])
        kind = spec.get("kind", "lt-sft")
        text = self.bench.corpus(language, spec, LANGUAGE_LINES)
        _note(text, self.notes)
        settings = replace(LANGUAGE_SETTINGS, bf16=self.bench.bf16, **(spec.get("mlm") or {}))
        budget = {key: spec[key] for key in ("k", "density") if key in spec}

        def make(path: Path) -> None:
            _, tokenizer = self.bench._model, self.bench._tokenizer
            options = {"progress": self.bench.progress, **budget}
            train_language(kind, model, tokenizer, text.texts, settings, **options).save(path, max_shard_size=None)

        facts = {
            "base": self.bench.digest(), "data": text_hash(text.texts), "settings": _plain(settings), "kind": kind,
            "source": text.source, **budget,
        }  # fmt: skip
        return self.bench.cache.get("language-sft", facts, make)


def adapter_of(language: str, cell: Cell, bench: Workbench, notes: list[str]) -> Path:
    """The file of a language adapter, from the cache."""
    spec = cell["adapters"]
    text = bench.corpus(language, spec, LANGUAGE_LINES)
    _note(text, notes)
    settings = replace(ADAPTER_SETTINGS, bf16=bench.bf16, **(spec.get("mlm") or {}))
    model, tokenizer = bench.model(cell, METHODS["mad-x"]())

    def make(path: Path) -> None:
        adapter: Adapter = train_language_adapter(model, tokenizer, text.texts, settings, progress=bench.progress)
        adapter.save(path)

    facts = {"base": bench.digest(), "data": text_hash(text.texts), "settings": _plain(settings), "source": text.source}
    return bench.cache.get("adapter", facts, make)


def active_by_layer(ticket: Ticket) -> dict[str, list[int]]:
    """Layer -> active entries of attention matrices, and of everything else."""
    counts: dict[str, list[int]] = {}
    for name, index_set in ticket.sets.items():
        in_attention = module_of(name) == "attention"
        counts.setdefault(layer_of(name), [0, 0])[not in_attention] += index_set.k
    return counts


def _training_task(cell: Cell, bench: Workbench, notes: list[str]) -> Task:
    """The training task; if its files are not in the data folder, the substitute that the recipe names."""
    for name in (cell["train.task"], cell["test.task"]):
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
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


def _scores(
    ready: Any, tests: Mapping[str, Sequence[Any]], task: Task, bench: Workbench, notes: list[str]
) -> dict[str, float]:
    return evaluate(
        ready,
        tests,
        metric=task.metric,
        labels=task.labels,
        batch_size=bench.batch_size,
        dtype=torch.bfloat16 if bench.bf16 else None,
        progress=bench.progress,
        notes=notes,
    )


def _note(text: Corpus, notes: list[str]) -> None:
    note = f"text: {text.source} stands in, {len(text.texts):,} lines"
    if text.stand_in and note not in notes:
        notes.append(note)


def _plain(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


def _data_hash(parts: Sequence[Sequence[Any]]) -> str:
    sha = hashlib.sha256()
    for examples in parts:
        for example in examples:
            sha.update(repr(example).encode() + b"\n")
    return sha.hexdigest()[:32]


def _refuse_texts(given: Mapping[str, Any] | None, defaults: Any, what: str) -> None:
    for key, value in (given or {}).items():
        if type(getattr(defaults, key)) in (int, float) and type(value) not in (int, float):
            raise ValueError(
                f"{what}: {key} must be a number, got {value!r} (YAML takes 1e-3 for a text: write 1.0e-3)"
            )


def _refuse_unknown(given: Mapping[str, Any] | None, known: Sequence[str], what: str) -> None:
    if unknown := [key for key in given or {} if key not in known]:
        raise ValueError(f"{what}: unknown {unknown[0]!r}, closest: {closest(unknown[0], known)}")
