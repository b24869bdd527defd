"""The output folder of a run: its lock, its settings and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ltp_sparse.weights import manifest
from ltp_sparse.weights.files import sweep, write_text
from ltp_sparse.weights.reading import FileFormatError, read_json

DELTA_FILE = "delta.safetensors"
SETTINGS_FILE = "settings.json"


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The latest complete checkpoint of an output folder, or None. It is compared with its manifest.

    Warns:
        UserWarning: checkpoints are skipped.

    Raises:
        FileFormatError: there are damaged checkpoints, but no complete one.
    """
    skipped: list[FileFormatError] = []
    for path in sorted(checkpoints(Path(folder)), key=_steps, reverse=True):
        try:
            manifest.check(path)
        except FileFormatError as error:
            skipped.append(error)
            continue
        if skipped:
            _warn_skipped(skipped, f"continuing from {path}")
        return path
    for each in skipped:
        if not isinstance(each, manifest.Unfinished):
            problem = f"{each.problem}. No checkpoint is left to continue from; delete {folder} to start anew"
            raise FileFormatError(each.path, problem, each.place)
    if skipped:
        _warn_skipped(skipped, "no checkpoint is complete, the run starts from its beginning")
    return None


def _warn_skipped(skipped: Iterable[FileFormatError], consequence: str) -> None:
    warnings.warn(f"{'; '.join(map(str, skipped))}: skipped, {consequence}", UserWarning, stacklevel=4)


def checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints of this library, complete or not."""
    ours = (manifest.MANIFEST, DELTA_FILE)
    return [path for path in folder.glob("checkpoint-*") if any((path / name).is_file() for name in ours)]


def begin(folder: str | os.PathLike[str], facts: Mapping[str, Any], *, what: str, resume: bool) -> Path | None:
    """Prepares the folder of a run.

    A run that starts anew removes the checkpoints of an earlier one, so that no later run resumes from them.

    Args:
        folder: the folder of the run.
        facts: settings that must be equal in both runs for the result to have the same bits. They are written into the
            folder.
        what: the caller, for messages.
        resume: whether to look for a checkpoint.

    Returns:
        The checkpoint to resume from, or None to start anew.

    Raises:
        ValueError: the interrupted run had other facts, or its checkpoints are damaged. Nothing has changed then.
    """
    checkpoint, path = last_checkpoint(folder) if resume else None, Path(folder) / SETTINGS_FILE
    facts = json.loads(json.dumps(facts, default=float))  # as JSON returns them
    if checkpoint is not None:
        before = _settings(path)
        changed = [f"{key} {before.get(key)!r}, now {now!r}" for key, now in facts.items() if before.get(key) != now]
        if changed:
            raise ValueError(
                f"{what}: {folder} holds checkpoints of a run with {'; '.join(changed)}; resume it with these "
                "settings, or delete the folder to start anew"
            )
    elif int(os.environ.get("RANK", "0")) == 0:
        if not resume:
            for old in checkpoints(Path(folder)):
                shutil.rmtree(old)
        write_text(path, json.dumps(facts, indent=1))
        sweep(path.parent)
    return checkpoint


@contextmanager
def locked(folder: str | os.PathLike[str] | None) -> Iterator[str]:
    """The output folder of a run, made if it is missing and locked against other runs; None: a temporary one."""
    with ExitStack() as stack:
        place = os.fspath(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="ltp_sparse-")))
        stack.enter_context(alone(place))
        Path(place).mkdir(parents=True, exist_ok=True)
        yield place


@contextmanager
def alone(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Locks an output folder against other runs.

    Raises:
        ValueError: another run uses the folder.
    """
    if int(os.environ.get("RANK", "0")):
        yield  # ranks of one run work together
        return
    with try_lock(Path(folder) / "run.lock") as acquired:
        if not acquired:
            raise ValueError(f"another run is using {folder}; wait for its end, or choose another folder")
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Tries to lock a file for the body; yields whether that succeeded. A lock is freed when its process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with lock:
        yield True
        path.unlink(missing_ok=True)


def _settings(path: Path) -> dict[str, Any]:
    """The settings of the interrupted run."""
    expected = "the settings of the run whose checkpoints are in this folder; start anew"
    if not path.is_file():
        raise FileFormatError(path, f"is missing; expected {expected}")
    return read_json(path, expected)


def _steps(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1
