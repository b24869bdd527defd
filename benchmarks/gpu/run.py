"""Everything that is to be known on a GPU, in one command: `make gpu`, `make gpu-full PART=i/n`.

Uses the Python it is started with, needs no network and no `datasets`. Steps: environment, build of the CUDA extension,
tests, compute-sanitizer, measurements; a step that fails does not hide the later ones, but the exit status tells.
Results go to `benchmarks/results/<gpu>/`, or to the folder OUT of the environment: at most 8 files, see `report.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cub_topk
import report
import torch

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "gpu"


def output_of(*command: str) -> str:
    """What a command prints; "" where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version_of(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def clocks() -> str:
    """The device's name, driver, clocks now and at most, temperature and power."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit"
    return output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv")


def environment(device: str) -> dict[str, object]:
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "device_type": device,
        "clocks_before": clocks(),
        "commit": output_of("git", "describe", "--always", "--dirty") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": output_of("nvcc", "--version").rpartition("release ")[2].partition(",")[0],
        "triton": version_of("triton"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    for peer in report.PEERS:
        found[peer] = version_of(peer) or "skipped: not installed"
    found["CUB"] = cub_topk.version()
    return found


class Steps:
    """Runs commands one after the other, and remembers which failed."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "log.txt").open("w")
        self.failed: list[str] = []

    def run(self, name: str, command: list[str], timeout: float) -> None:
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        python_path = os.pathsep.join(filter(None, [str(INSTALLED), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                self.log.write(line)
                if time.perf_counter() - start > timeout:
                    process.kill()
            status = process.wait()
        finally:
            process.kill()
            self.log.flush()
        took = time.perf_counter() - start
        print(f"== {name}: {'ok' if status == 0 else f'FAILED ({status})'}, {took:.0f} s", flush=True)
        if status != 0:
            self.failed.append(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the suite without a GPU, on a tiny model")
    parser.add_argument("--full", action="store_true", help="the rest of the grid instead of the core")
    parser.add_argument("--part", default="1/1", help="with --full: i/n")
    parser.add_argument("--seconds", type=float, default=240, help="for the measurements")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no CUDA device; --device cpu tries the suite without one")
    facts = environment(args.device)
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    folder = Path(args.folder or os.environ.get("OUT") or ROOT / "benchmarks" / "results" / name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))

    steps, python = Steps(folder), sys.executable
    grid = ["--grid", "tiny" if args.device == "cpu" else "rest" if args.full else "core", "--part", args.part]
    if args.device == "cuda":
        # Installed into a folder of its own: the environment stays as it is.
        os.environ["LTP_SPARSE_EXT"] = "cuda"
        target = ["--target", str(INSTALLED), "--upgrade"]
        build = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", *target, "."]
        steps.run("build", build, 300)
        if not args.full:
            # -P: not the sources in this folder, which lack the compiled modules
            # addopts: without pytest-timeout its setting is unknown, which the strict configuration refuses
            tests = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-ra", "-k", "gpu"]
            tests += ["tests/backends/test_gpu.py", "tests/optim/test_pull.py"]
            steps.run("tests", tests, 180)
            if shutil.which("compute-sanitizer"):
                small = [*tests, "-k", "bitmap and (plain or 8bit) and bf16 or passes and bf16-bf16"]
                for tool in ("memcheck", "racecheck"):
                    check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small]
                    steps.run(tool, check, 60)
            else:
                print("== skipped: compute-sanitizer is not on the PATH")
    for name, script, share in (("masked_adamw", "measure", 0.75), ("topk_delta", "measure_topk_delta", 0.25)):
        seconds = share * args.seconds
        measure = [python, f"benchmarks/gpu/{script}.py", "--device", args.device, *grid, "--seconds", str(seconds)]
        if args.device == "cpu":
            measure += ["--repeats", "4"]
        steps.run(f"measure {name}", [*measure, "--out", str(folder / f"{name}.csv")], seconds + 120)
    facts["clocks_after"] = clocks()
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n")
    table = ["--from", str(folder), "--out", str(folder / "backend_choice.json")]
    steps.run("choose backends", [python, "benchmarks/choose_backends.py", *table], 60)
    if args.full and args.device == "cuda" and args.part.startswith("1/"):
        step = [python, "benchmarks/bench_train_step.py", "--out", str(folder / "train_step.csv")]
        steps.run("measure a training step", step, 300)
    steps.log.close()
    report.write(folder)
    report.pack(folder)
    print("results:", *sorted(path.name for path in folder.iterdir()), "in", folder)
    if steps.failed:
        sys.exit(f"make gpu: failed: {', '.join(steps.failed)}")


if __name__ == "__main__":
    main()
