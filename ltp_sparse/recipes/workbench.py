"""`Workbench`: what the cells of a run share."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ltp_sparse.methods import Method
from ltp_sparse.models.backbone import load_backbone, load_causal
from ltp_sparse.recipes.cache import Cache
from ltp_sparse.recipes.corpora import Corpus, corpus, mixture
from ltp_sparse.recipes.recipe import Cell
from ltp_sparse.tasks import TASKS
from ltp_sparse.weights.digests import EARLIER, fingerprint
from ltp_sparse.weights.names import canonical_parameters


@dataclass
class Workbench:
    """Where data and artefacts are, how to compute, and the base model, data and text that were used last.

    A copy in another process has only the settings. Equal copies there are one object, so that a cell finds what the
    one before has loaded.

    Attributes:
        data: folder of the data sets' original files; None: the Hub.
        cache: the cache of artefacts.
        bf16: compute in bfloat16 under autocast.
        micro_batch_size: examples per forward pass; None: the whole batch.
        batch_size: examples per forward pass in evaluation.
        report_to: logging integration of transformers for the training of a cell.
        progress: show bars of training and evaluation.
        digest: the digest of the base model that was loaded last.
    """

    data: Path | None
    cache: Cache
    bf16: bool = False
    micro_batch_size: int | None = None
    batch_size: int = 64
    report_to: str = "none"
    progress: bool = False
    digest: str = field(default="", init=False)
    _key: tuple[Any, ...] = ()
    _model: Any = None
    _tokenizer: Any = None
    _corpora: dict[tuple[Any, ...], Corpus] = field(default_factory=dict)
    _examples: dict[tuple[Any, ...], Sequence[Any]] = field(default_factory=dict)

    def settings(self) -> tuple[Any, ...]:
        """All but what was loaded, in the order of the constructor, with the folder of the cache."""
        computing = self.bf16, self.micro_batch_size, self.batch_size, self.report_to, self.progress
        return self.data, self.cache.folder, *computing

    def __reduce__(self) -> tuple[Any, ...]:
        return _only_one, self.settings()

    def model(self, cell: Cell, method: Method, *, tied: bool | None = None) -> tuple[Any, Any]:
        """The base model of a cell at its initial weights, and its tokenizer: those of the last call, if they fit."""
        tied = method.tied if tied is None else tied
        key = (cell["model"], cell["tokenizer"], method.backbone, tied)
        if key != self._key:
            self.forget()
            masked: Any = functools.partial(load_backbone, decoupled=not tied)
            load = load_causal if method.backbone == "causal" else masked
            self._model, self._tokenizer = load(cell["model"], tokenizer=cell["tokenizer"])
            if torch.cuda.is_available():
                self._model.to("cuda")
            parameters = {name: p.detach() for name, p in canonical_parameters(self._model).items()}
            # a decoupled head repeats the embedding: the same base has one digest
            parameters.pop("lm_head.decoder.weight", None)
            # of the kind of earlier versions, whose artefacts are then found again
            found = fingerprint(parameters, like=dict.fromkeys(parameters, EARLIER))
            self.digest, self._key = hashlib.sha256(repr(found).encode()).hexdigest()[:32], key
        return self._model, self._tokenizer

    def forget(self) -> None:
        """Drops the base model, so that the next cell loads it again."""
        self._key, self._model = (), None

    def examples(
        self, task: str, split: str, language: str, *, shots: int | None = None, seed: int = 0
    ) -> Sequence[Any]:
        """Examples of a task, which are read once for all cells. The arguments are those of `Task.load`."""
        key = (task, split, language, shots, seed)
        if key not in self._examples:
            self._examples[key] = TASKS[task].load(split, language, shots=shots, data=self.data, seed=seed)
        return self._examples[key]

    def corpus(self, language: str | Sequence[str], spec: Mapping[str, Any], lines: int) -> Corpus:
        """The text of a stage (`spec`) in a language, or in equal shares of several; it is read once for all cells."""
        lines = spec.get("lines", lines)
        if not isinstance(language, str):
            return mixture([self.corpus(one, {**spec, "lines": lines // len(language)}, lines) for one in language])
        key = (language, lines, spec.get("text"))
        if key not in self._corpora:
            self._corpora[key] = corpus(*key[:2], self.data, text=key[2])
        return self._corpora[key]


@functools.lru_cache(maxsize=1)
def _only_one(data: Path | None, cache: Path, *computing: Any) -> Workbench:
    return Workbench(data, Cache(cache), *computing)
