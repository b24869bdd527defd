"""The folder of a trained run: what `train` leaves and `evaluate`, `predict` and `export` read.

run.json                  model, method, task, shots, languages: how the run was made
seed-1/trained.safetensors  a SparseDelta: ticket entries and the prompt encoder at the best epoch
seed-1/baked.safetensors    the same with the prompt in place of its encoder: all that inference needs
results.jsonl             rows of `evaluate`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltp_sparse.cli.options import CommandError
from ltp_sparse.files import atomic_path
from ltp_sparse.reading import FileFormatError, read_json

if TYPE_CHECKING:
    from ltp_sparse.delta import SparseDelta
    from ltp_sparse.methods.base import Method, Setup
    from ltp_sparse.ticket import Ticket

TRAINED = "trained.safetensors"
BAKED = "baked.safetensors"
_DESCRIPTION = "run.json"


@dataclass(frozen=True)
class Run:
    """How a run was made; paths as given on the command line."""

    model: str
    tokenizer: str | None
    method: str
    task: str
    shots: int | None
    language: str
    verbalizer: str

    def save(self, folder: Path) -> None:
        with atomic_path(folder / _DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Run:
        path = folder / _DESCRIPTION
        if not path.is_file():
            raise CommandError(f"{folder}: not a run of ltp-sparse train (it has no {_DESCRIPTION})")
        facts = read_json(path, "the description of a run")
        try:
            return cls(**facts)
        except TypeError as error:
            raise FileFormatError(path, f"damaged, or of another version of ltp_sparse ({error})") from error

    def check_continues(self, folder: Path) -> None:
        """Raises if the folder has seeds of a run that was made in another way: they would pass for seeds of this."""
        if not (folder / _DESCRIPTION).is_file() or not any(folder.glob("seed-*")):
            return
        before = Run.load(folder)
        for field in fields(self):
            old, new = getattr(before, field.name), getattr(self, field.name)
            if old != new:
                raise CommandError(
                    f"train: {folder} holds seeds of a run with {field.name} {old!r}, this one has {new!r}; "
                    "give another --output"
                )


def finished_seeds(folder: Path, wanted: Sequence[int] | None = None) -> list[int]:
    """The seeds whose training is done, ascending; or those wanted, which must be among them."""
    names = [path.parent.name.removeprefix("seed-") for path in folder.glob(f"seed-*/{BAKED}")]
    seeds = sorted(int(name) for name in names if name.isdigit())
    if not seeds:
        raise CommandError(f"{folder}: no seed has been trained to the end; run ltp-sparse train --resume")
    if missing := [seed for seed in wanted or () if seed not in seeds]:
        raise CommandError(f"{folder}: expected one of its seeds {', '.join(map(str, seeds))}, got {missing[0]}")
    return seeds if wanted is None else list(wanted)


def load_pairs(command: str, name: str, split: str, language: str, **options: Any) -> list[Any]:
    """Labelled pairs of a task; a CommandError for a task of texts."""
    from ltp_sparse.tasks import TASKS, task

    if task(name).kind != "pair":
        known = ", ".join(name for name, known in TASKS.items() if known.kind == "pair")
        raise CommandError(
            f"{command}: --task must be one of pairs ({known}), {name} is one of texts; those are run by recipes, see "
            "ltp-sparse run --help"
        )
    return list(task(name).load(split, language, **options))


def check_same_training(finished: Path, method: Method, ticket: Ticket | None) -> None:
    """Raises if a finished seed was trained with other settings, or LTP with another ticket, than those to come."""
    import ltp_sparse as ls

    delta, wanted = ls.SparseDelta.load(finished), method.describe()
    for part in ("settings", "options"):
        for key, new in wanted[part].items():
            old = delta.metadata[part].get(key)
            if key != "seeds" and old != new:
                raise CommandError(f"train: {finished} was trained with {key} {old}, not {new}; give another --output")
    if method.key == "ltp" and delta.ticket != ticket:
        raise CommandError(f"train: {finished} was trained on another ticket than --ticket; give another --output")


def load_seed(run: Run, folder: Path, seed: int | None) -> tuple[Setup, SparseDelta]:
    """The model of one seed (default: the first) with what encodes examples for it, and its delta."""
    import ltp_sparse as ls
    from ltp_sparse.training.backbone import load_backbone
    from ltp_sparse.training.method import load_trained

    seed = finished_seeds(folder, None if seed is None else [seed])[0]
    delta = ls.SparseDelta.load(folder / f"seed-{seed}" / BAKED)
    language_model, tokenizer = load_backbone(run.model, decoupled=False, tokenizer=run.tokenizer)
    return load_trained(language_model, tokenizer, delta), delta
