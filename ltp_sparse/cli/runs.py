"""The folder of a trained run: what `train` leaves and `evaluate`, `predict` and `export` read.

run.json                  model, method, task, shots, languages: how the run was made
seed-1/trained.safetensors  a SparseDelta: ticket entries and the prompt encoder at the best epoch
seed-1/baked.safetensors    the same with the prompt in place of its encoder: all that inference needs
results.jsonl             rows of `evaluate`
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltp_sparse.cli.options import CommandError
from ltp_sparse.files import atomic_path

if TYPE_CHECKING:
    from ltp_sparse.delta import SparseDelta
    from ltp_sparse.methods.base import Setup

TRAINED = "trained.safetensors"
BAKED = "baked.safetensors"
RESULTS = "results.jsonl"
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
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def finished_seeds(folder: Path) -> list[int]:
    """The seeds whose training is done, ascending."""
    seeds = sorted(int(path.parent.name.removeprefix("seed-")) for path in folder.glob(f"seed-*/{BAKED}"))
    if not seeds:
        raise CommandError(f"{folder}: no seed has been trained to the end; run ltp-sparse train --resume")
    return seeds


def load_seed(run: Run, folder: Path, seed: int | None) -> tuple[Setup, SparseDelta]:
    """The model of one seed (default: the first) with what encodes examples for it, and its delta."""
    import ltp_sparse as ls
    from ltp_sparse.training.backbone import load_backbone
    from ltp_sparse.training.method import load_trained

    seed = finished_seeds(folder)[0] if seed is None else seed
    delta = ls.SparseDelta.load(folder / f"seed-{seed}" / BAKED)
    language_model, tokenizer = load_backbone(run.model, decoupled=False, tokenizer=run.tokenizer)
    return load_trained(language_model, tokenizer, delta), delta
