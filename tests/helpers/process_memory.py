"""Memory of a process as counted by Linux, and scripts that measure theirs in a separate process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parents[1]


def status() -> dict[str, int]:
    """Bytes by name: VmRSS, VmHWM, RssAnon, RssFile and others."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = (line.split() for line in lines if line.startswith(("Vm", "Rss")))
    return {key.rstrip(":"): 1024 * int(value) for key, value, *_ in values}


def forget_peak() -> None:
    """Resets VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """From now on this process gives it to the system at once: what malloc keeps of it depends on its mood."""
    assert ctypes.CDLL(None).mallopt(-3, 65536) == 1  # M_MMAP_THRESHOLD


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """Yields a list; at exit the peak growth of anonymous memory, in bytes, is appended."""
    before, peak, done = status()["RssAnon"], [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], status()["RssAnon"] - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def printed(script: str, *arguments: object) -> str:
    """The output of a script, which may import `helpers`."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
