"""What tests compile lies in a folder, by a digest of all that it is made of, for all processes and later runs.

The folder is LTP_SPARSE_TEST_CACHE, which several clones may share, or build/tests.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("LTP_SPARSE_TEST_CACHE") or ROOT / "build" / "tests").absolute()
KEPT = 8  # folders of a name, the last that were used


def built(name: str, make: Callable[[Path], object], sources: Iterable[Path], *settings: object) -> Path:
    """A folder that `make` has filled.

    Args:
        sources: files that it is made of
        settings: whatever else it depends on, but for the compilers and Python
    """
    key = hashlib.sha256(repr((sys.version, _compilers(), settings)).encode())
    for path in sorted(sources):
        key.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    folder = CACHE / name / key.hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
        (folder / "made").touch()
        for old in sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
    return folder


@cache
def _compilers() -> list[str]:
    found = [[path, "--version"] for name in ("c++", "nvcc") if (path := shutil.which(name)) is not None]
    return [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in found]
