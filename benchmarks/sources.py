"""The version of the sources, by commit and digest, without imports of the package; run as a script it prints both."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def code() -> str:
    """A digest of the sources that affect our measurements."""
    digest = hashlib.sha256()
    packages = ("backends", "ops", "optim", "selection", "tickets")
    folders = [ROOT / "csrc", ROOT / "kernels", *(ROOT / "ltp_sparse" / package for package in packages)]
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit from git; without a repository, the digest of the sources."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"unknown, sources {code()}"


if __name__ == "__main__":
    print(f"commit {commit()}, sources {code()}")
