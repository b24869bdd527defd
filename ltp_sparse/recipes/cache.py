"""The cache of what several cells share: tuned weights of stage 1, language SFTs and adapters, by content."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ltp_sparse.training.run_folder import try_lock
from ltp_sparse.weights import files
from ltp_sparse.weights.reading import FileFormatError, read_json, sha256_of


def default_cache() -> Path:
    """$LTP_SPARSE_CACHE, or ltp_sparse in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LTP_SPARSE_CACHE") or Path(base) / "ltp_sparse")


@dataclass(frozen=True)
class Entry:
    """One artefact.

    Attributes:
        kind: the kind of artefact, such as "tuned".
        facts: base model, data and settings that it was made from.
        path: its file.
        nbytes: its size.
        made: when it was made, in seconds since 1970.
    """

    kind: str
    facts: Mapping[str, Any]
    path: Path
    nbytes: int
    made: float


class Cache:
    """A folder of artefacts, each named by a digest of what it was made from: base model, data and settings.

    A description next to each artefact says what it is, with its checksum. It is written last: an artefact without a
    description is incomplete.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        entries = self.entries()
        return f"Cache({str(self.folder)!r}, {len(entries)} artefacts, {sum(e.nbytes for e in entries):,} bytes)"

    def get(self, kind: str, facts: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The file of an artefact, which is made if it is not there. Other processes wait meanwhile.

        Args:
            kind: the kind of artefact, e.g. "tuned"; a part of the file's name.
            facts: everything that the artefact depends on, JSON values. Equal facts give the same file.
            make: writes the artefact to a path, by `files.save`.

        Returns:
            The file.

        Raises:
            FileFormatError: the artefact, or its description, is damaged.
        """
        path = self.folder / f"{kind}-{sha256_of(facts)[:24]}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            described = path.with_suffix(".json")
            if path.is_file() and described.is_file():
                self._check(path, kind, json.loads(json.dumps(facts)))
                return path
            if path.is_file():
                warnings.warn(f"{path} has no description next to it; it is made again", stacklevel=2)
            files.sweep(self.folder)
            make(path)
            about = {"kind": kind, "facts": facts, "made": time.time(), "checksum": files.verify(path)}
            files.write_text(described, json.dumps(about, indent=2))
        return path

    @staticmethod
    def _check(path: Path, kind: str, facts: Any) -> None:
        described = path.with_suffix(".json")
        cure = "; delete both files to have it made anew"
        about = _description(described)
        if (about["kind"], about["facts"]) != (kind, facts):
            raise FileFormatError(described, f"expected the description of {path.name}, got that of another{cure}")
        try:
            checksum = files.verify(path)
        except FileFormatError as error:
            raise FileFormatError(path, f"{error.problem}{cure}") from error
        if checksum != about.get("checksum", checksum):  # earlier versions wrote none
            raise FileFormatError(path, f"it is not the artefact that {described.name} describes{cure}")

    def entries(self) -> list[Entry]:
        """All artefacts, the latest first."""
        found = []
        for described in self.folder.glob("*.json"):
            path = described.with_suffix(".safetensors")
            if path.is_file():
                about = _description(described)
                found.append(Entry(about["kind"], about["facts"], path, path.stat().st_size, about["made"]))
        return sorted(found, key=lambda entry: -entry.made)

    def clear(self) -> int:
        """Removes all artefacts except those in use at the moment; returns how many bytes that frees."""
        freed = 0
        for path in self.folder.glob("*.safetensors"):
            with try_lock(path.with_suffix(".lock")) as acquired:
                if not acquired:
                    warnings.warn(f"{path} is in use and stays", stacklevel=2)
                    continue
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
        files.sweep(self.folder)
        return freed


def _description(path: Path) -> dict[str, Any]:
    about = read_json(path, "the description of an artefact", ("kind", "facts", "made"))
    if isinstance(about["kind"], str) and isinstance(about["facts"], dict) and isinstance(about["made"], float):
        return about
    raise FileFormatError(path, "not the description of an artefact: damaged; delete it to have the artefact made anew")
