"""The cache of what several cells share: tuned weights of stage 1, language SFTs and adapters, by content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltp_sparse.files import atomic_path
from ltp_sparse.reading import read_json


def default_cache() -> Path:
    """$LTP_SPARSE_CACHE, or ltp_sparse in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LTP_SPARSE_CACHE") or Path(base) / "ltp_sparse")


@dataclass(frozen=True)
class Entry:
    """One artefact: its kind, what it was made from, its file, bytes and time of making (seconds since 1970)."""

    kind: str
    facts: Mapping[str, Any]
    path: Path
    nbytes: int
    made: float


class Cache:
    """A folder of artefacts, each named by a digest of what it was made from: base model, data and settings."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        entries = self.entries()
        return f"Cache({str(self.folder)!r}, {len(entries)} artefacts, {sum(e.nbytes for e in entries):,} bytes)"

    def get(self, kind: str, facts: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The file of an artefact; `make` writes it (atomically) if it is not there. Other processes wait meanwhile."""
        text = json.dumps(facts, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.is_file():
                    make(path)
                    with atomic_path(path.with_suffix(".json")) as temporary:
                        temporary.write_text(json.dumps({"kind": kind, "facts": facts, "made": time.time()}, indent=2))
        return path

    def entries(self) -> list[Entry]:
        """All artefacts, the latest first."""
        found = []
        for described in self.folder.glob("*.json"):
            path = described.with_suffix(".safetensors")
            about = read_json(described, "a description of an artefact", ("kind", "facts", "made"))
            if path.is_file():
                found.append(Entry(about["kind"], about["facts"], path, path.stat().st_size, about["made"]))
        return sorted(found, key=lambda entry: -entry.made)

    def clear(self) -> int:
        """Removes all artefacts; returns how many bytes that frees."""
        entries = self.entries()
        for entry in entries:
            for suffix in (".safetensors", ".json", ".lock"):
                entry.path.with_suffix(suffix).unlink(missing_ok=True)
        return sum(entry.nbytes for entry in entries)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
