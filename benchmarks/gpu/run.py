"""Builds, tests and measures on a GPU within minutes: `make gpu`, then `make gpu-full`.

Uses the current Python and no network, and does not import the package before it is built. Each phase runs in a process
group with a time limit; its results up to then are kept, and the next phase starts. If a provider crashes or hangs, its
row says so, and a new process continues with the next provider.

Results go to `benchmarks/results/<gpu>/`, or to the folder OUT of the environment, after copying the committed results
there: rows that exist are not measured again. The folder contains at most the files `KEPT`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
import cub_topk
import device as devices
import rows
from plan import INSTALLED, NCU, TRAIN_STEP, Phase, Plan
from sources import RESULTS, ROOT, code, commit

KEPT = (
    "environment.json", "report.md", "log.txt", rows.MEASURED_CSV, rows.FLOORS_CSV, rows.LAUNCHES_CSV, NCU, TRAIN_STEP,
)  # fmt: skip
PEERS = ("torchao", "bitsandbytes", "flashoptim")
LAST_WORDS = 2  # seconds between the interrupt and the kill of a process group
POLL = 0.05
TIME_IS_UP = "time is up"
TOOLS = ("ncu", "compute-sanitizer")


def version_of(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "skipped: not installed"
    try:  # without an import, which takes seconds for some
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it came under another name
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def environment(device: str) -> dict[str, object]:
    nvcc = shutil.which("nvcc")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    return {
        "device": devices.smi("name") or platform.processor() or platform.machine(),
        "device_type": device,
        "driver": devices.smi("driver_version"),
        "clocks_mhz": devices.smi("clocks.max.sm,clocks.max.mem"),
        "commit": commit(),
        "code": code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": told.rpartition("release ")[2].partition(",")[0],
        "triton": version_of("triton"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        **{package: version_of(package) for package in PEERS},
        "CUB": cub_topk.version(),
        **{tool: shutil.which(tool) or "skipped: not on the PATH" for tool in TOOLS},
    }


class Suite:
    """Runs phases one after the other; collects those that failed and those that ran out of time."""

    def __init__(self, folder: Path, scratch: Path, seconds: float, patience: float) -> None:
        self.folder, self.patience = folder, patience
        self.deadline = time.monotonic() + seconds
        self.log = folder / "log.txt"
        self.shown = self.log.stat().st_size if self.log.exists() else 0
        self.failed: list[str] = []
        self.cut: list[str] = []
        os.environ |= {"PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
        tempfile.tempdir = str(scratch)

    def say(self, text: str) -> None:
        """Writes a line to the log and to the screen."""
        with self.log.open("a") as log:
            log.write(f"== {text}\n")
        self.show()

    def show(self) -> None:
        """Prints the new part of the log."""
        with self.log.open("rb") as log:
            log.seek(self.shown)
            sys.stdout.write(log.read().decode(errors="replace"))
            self.shown = log.tell()
        sys.stdout.flush()

    def run(self, phase: Phase) -> None:
        """Runs a phase to its end. After a crash or a hang, a new process continues with the next provider."""
        start = time.monotonic()
        end = min(start + phase.seconds, self.deadline)
        while True:
            before = self.size()
            how = TIME_IS_UP if time.monotonic() >= end else self.watch(phase, end)
            crashed = phase.measures and how not in ("", TIME_IS_UP)
            if crashed:
                self.blame(how)
            if not crashed or self.size() == before:  # without a new row, another process would crash at the same place
                break
        self.say(f"{phase.name}: {how or 'ok'}, {time.monotonic() - start:.0f} s")
        if how:
            (self.cut if how == TIME_IS_UP else self.failed).append(phase.name)

    def size(self) -> int:
        """Bytes of the measured rows so far."""
        path = self.folder / rows.MEASURED_CSV
        return path.stat().st_size if path.exists() else 0

    def watch(self, phase: Phase, end: float) -> str:
        """Runs the command and ends all its processes; returns "" or the reason of a failure."""
        rows.current().unlink(missing_ok=True)
        self.say(f"{phase.name}: {' '.join(map(str, phase.command))}")
        with self.log.open("a") as log:
            # a process group, not a session: a machine that kills our session then kills these processes, too
            process = subprocess.Popen(
                [*map(str, phase.command)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        try:
            while (status := process.poll()) is None:
                time.sleep(POLL)
                self.show()
                if time.monotonic() > end:
                    return TIME_IS_UP
                if phase.measures and self.silent() > self.patience:
                    return f"no answer for {self.patience:g} s"
            return "" if status == 0 else f"exit status {status}"
        finally:
            if process.poll() is None:
                self.signal(process, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_WORDS)
            self.signal(process, signal.SIGKILL)
            process.wait()
            self.show()

    @staticmethod
    def signal(process: subprocess.Popen[bytes], number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    @staticmethod
    def silent() -> float:
        """Seconds since the start of the current measurement."""
        with suppress(FileNotFoundError):
            return time.time() - rows.current().stat().st_mtime
        return 0.0

    def blame(self, how: str) -> None:
        """Writes the row of the measurement that was running when the process ended."""
        with suppress(FileNotFoundError):
            key = json.loads(rows.current().read_text())
            rows.append(self.folder / rows.MEASURED_CSV, rows.MEASURED, rows.failure(key, how, key["code"]))
            self.say(f"{key['provider']}, {key['mode']}: {how}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the second command: the other cells, and a training step")
    parser.add_argument("--seconds", type=float, help="for all phases together (default: 420, with --full 300)")
    parser.add_argument("--patience", type=float, default=30, help="seconds for one provider in one cell")
    parser.add_argument("--device", default="cuda", help="cpu tries the suite without a GPU, on a tiny model")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no CUDA device; --device cpu tries the suite without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("make gpu: terminated"))
    facts = environment(args.device)
    committed = RESULTS / re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    folder = Path(args.folder or os.environ.get("OUT") or committed).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (committed / name).exists() and not (folder / name).exists():
            shutil.copy(committed / name, folder / name)
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    if args.device == "cuda":
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(INSTALLED), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="ltp-sparse-gpu-") as scratch:
        suite = Suite(folder, Path(scratch), args.seconds or (300 if args.full else 420), args.patience)
        suite.say(json.dumps(facts))
        plan = Plan(args.device, folder)
        phases = plan.trial if args.device != "cuda" else plan.second if args.full else plan.first
        for phase in phases():
            suite.run(phase)
    wrong = [
        f"{row['op']}, {row['precision']}, {row['density']}: {row['provider']}, {row['mode']}: {row['error']}"
        for row in rows.latest(rows.read(folder / rows.MEASURED_CSV))
        if row["error"] and row["code"] == facts["code"]
    ]
    for text in (*suite.failed, *wrong):
        suite.say(f"FAILED: {text}")
    for text in suite.cut:
        suite.say(f"cut off, the next command goes on: {text}")
    suite.say(f"results: {', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    sys.exit(1 if suite.failed or wrong else 0)


if __name__ == "__main__":
    main()
