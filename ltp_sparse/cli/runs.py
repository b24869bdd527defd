"""The folder of a trained run, written by `train` and read by `evaluate`, `predict` and `export`.

run.json                  the description of the run: model, method, data, columns, words, languages
seed-1/trained.safetensors  a SparseDelta: ticket entries and the prompt encoder at the best epoch
seed-1/baked.safetensors    the same for inference, with the prompt in place of its encoder
manifest.json             names, sizes and checksums of the files above, for finished seeds
results.jsonl             rows of `evaluate`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.cli.checks import CommandError
from ltp_sparse.tasks import task
from ltp_sparse.tasks.own import Columns
from ltp_sparse.tasks.pairs import CLASSES
from ltp_sparse.weights import manifest
from ltp_sparse.weights.files import write_text
from ltp_sparse.weights.locating import locate
from ltp_sparse.weights.reading import FileFormatError, read_json

if TYPE_CHECKING:
    from ltp_sparse.deltas.delta import SparseDelta
    from ltp_sparse.methods.base import Method, Setup
    from ltp_sparse.tickets.ticket import Ticket

TRAINED = "trained.safetensors"
BAKED = "baked.safetensors"
_DESCRIPTION = "run.json"
_LOCK = "train.lock"  # of a seed


@dataclass(frozen=True)
class Run:
    """The description of a run, with paths and names as given on the command line.

    Attributes:
        model: folder or Hub name of the base model.
        tokenizer: folder or Hub name of the tokenizer, if it is not with the model.
        method: name of the method in tables.
        task: the name of a known task; None for your own data in `train`, `dev` and `test`, with `columns`.
        shots: training examples per class; None: all.
        language: language of the training examples.
        verbalizer: language of the label words.
        words: class -> label words; None: the words of the language `verbalizer`.
        labels: the classes, in the order of the logits.
        metric: "accuracy" or "macro_f1".
        train, dev, test: your own data: files, or data sets of the Hub.
        dev_share: share of `train` that is held out as dev, instead of `dev`.
        hub_config: configuration of a Hub data set.
        columns: names of the columns of your own data.
    """

    model: str
    tokenizer: str | None
    method: str
    task: str | None
    shots: int | None
    language: str
    verbalizer: str
    words: dict[str, list[str]] | None = None
    labels: tuple[str, ...] = CLASSES
    metric: str = "accuracy"
    train: str | None = None
    dev: str | None = None
    dev_share: float | None = None
    test: str | None = None
    hub_config: str | None = None
    columns: Columns | None = None

    @property
    def kind(self) -> str:
        """The kind of the examples: "pair" or "text"."""
        return task(self.task).kind if self.task is not None else self.columns.kind  # type: ignore[union-attr]

    def save(self, folder: Path) -> None:
        """Writes the description into the folder of the run."""
        write_text(folder / _DESCRIPTION, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")
        record(folder, [_DESCRIPTION])

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Reads the description of the run in a folder.

        Raises:
            CommandError: the folder has none.
            FileFormatError: it is damaged, or of another version.
        """
        path = folder / _DESCRIPTION
        if not path.is_file():
            raise CommandError(f"{folder}: not a run of ltp-sparse train (it has no {_DESCRIPTION})")
        facts = read_json(path, "the description of a run")
        try:
            facts["labels"] = tuple(_texts(facts.get("labels", list(CLASSES))))
            if facts.get("columns") is not None:
                facts["columns"] = Columns(**facts["columns"])
            run = cls(**facts)
            _texts([run.model, run.method, run.language, run.verbalizer])
            if run.columns is None:
                task(_texts([run.task])[0])
            return run
        except (AttributeError, TypeError, ValueError) as error:
            raise FileFormatError(path, f"damaged, or of another version of ltp_sparse ({error})") from error

    def check_model(self) -> None:
        """Raises CommandError if the model or the tokenizer is no longer available."""
        try:
            for name in filter(None, (self.model, self.tokenizer)):
                locate(name)
        except ValueError as error:
            raise CommandError(f"the model of the run was not found: {error}") from None

    def check_continues(self, folder: Path) -> None:
        """Raises CommandError if the folder has seeds of another run, which would count as seeds of this one."""
        if not (folder / _DESCRIPTION).is_file() or not any(map(_begun, folder.glob("seed-*"))):
            return
        before = Run.load(folder)
        for field in fields(self):
            old, new = getattr(before, field.name), getattr(self, field.name)
            if old != new and field.name != "test":
                raise CommandError(
                    f"{folder} holds seeds of a run with {field.name.replace('_', ' ')} {old!r}, but this one "
                    f"has {new!r}; choose another --output"
                )


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected texts, got {values!r}")
    return values


def finished_seeds(folder: Path, wanted: Sequence[int] | None = None) -> list[int]:
    """The finished seeds in ascending order, or the wanted ones. Raises CommandError if one is not finished."""
    if (folder / manifest.MANIFEST).exists():
        parts = tuple(f"seed-{seed}/" for seed in wanted) if wanted else ("seed-",)
        manifest.check(folder, (_DESCRIPTION, *parts))
        found = [Path(name) for name in manifest.names(folder)]
    else:
        print(f"{folder} has no {manifest.MANIFEST}, like runs of earlier versions: a lost seed would not be noticed")
        found = list(folder.glob(f"seed-*/{BAKED}"))
    names = [path.parent.name.removeprefix("seed-") for path in found if path.name == BAKED]
    seeds = sorted(int(name) for name in names if name.isdigit())
    if not seeds:
        raise CommandError(f"{folder}: no seed is finished; run ltp-sparse train --resume")
    if missing := [seed for seed in wanted or () if seed not in seeds]:
        raise CommandError(f"{folder}: expected one of its seeds {', '.join(map(str, seeds))}, got {missing[0]}")
    return seeds if wanted is None else list(wanted)


def first_seed(folder: Path, wanted: int | None = None) -> int:
    """The first finished seed, or the wanted one; see `finished_seeds`."""
    return finished_seeds(folder, None if wanted is None else [wanted])[0]


def check_same_training(finished: Path, method: Method, ticket: Ticket | None) -> None:
    """Raises CommandError if a finished seed was trained with other settings or, with LTP, on another ticket."""
    import ltp_sparse as ls

    delta, wanted = ls.SparseDelta.load(finished), method.describe()
    for part in ("settings", "options"):
        for key, new in wanted[part].items():
            old = delta.metadata[part].get(key)
            if key != "seeds" and old != new:
                raise CommandError(f"{finished} was trained with {key} {old}, not {new}; choose another --output")
    if method.key == "ltp" and delta.ticket != ticket:
        raise CommandError(f"{finished} was trained on another ticket than --ticket; choose another --output")


def _begun(seed: Path) -> bool:
    """Whether the folder of a seed has files of its training, or another process trains it now."""
    from ltp_sparse.training.run_folder import try_lock

    if any(path.name != _LOCK for path in seed.iterdir()):
        return True
    with try_lock(seed / _LOCK) as acquired:
        return not acquired


def seeds_to_train(folder: Path, seeds: Sequence[int]) -> Iterator[int]:
    """Yields the seeds that no other process trains or has trained. Each is locked until the next is requested."""
    from ltp_sparse.training.run_folder import try_lock

    for seed in seeds:
        with try_lock(folder / f"seed-{seed}" / _LOCK) as acquired:
            if not acquired:
                print(f"seed {seed}: skipped, another process is training it")
            elif (folder / f"seed-{seed}" / BAKED).is_file():
                print(f"seed {seed}: skipped, another process has trained it")
            else:
                yield seed


def record(folder: Path, names: Sequence[str]) -> None:
    """Adds files to the manifest of a run's folder."""
    from filelock import FileLock

    lock = folder / "manifest.lock"
    with FileLock(lock):
        if not (folder / manifest.MANIFEST).exists():  # new, or of an earlier version
            trained = (path for path in folder.glob("seed-*/*") if path.name in (TRAINED, BAKED))
            manifest.finish(folder, [str(path.relative_to(folder)) for path in trained])
        manifest.add(folder, names)
        lock.unlink(missing_ok=True)


def load_seed(run: Run, folder: Path, seed: int) -> tuple[Setup, SparseDelta]:
    """(setup with the trained model, delta) of a finished seed."""
    import ltp_sparse as ls
    from ltp_sparse.models.backbone import load_backbone
    from ltp_sparse.training.method import load_trained

    delta = ls.SparseDelta.load(folder / f"seed-{seed}" / BAKED)
    language_model, tokenizer = load_backbone(run.model, decoupled=False, tokenizer=run.tokenizer)
    return load_trained(language_model, tokenizer, delta), delta
