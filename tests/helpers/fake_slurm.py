"""`sbatch`, `srun`, `sacct` and `scancel` for one machine, whose jobs start at once and outlive their driver."""

import json
import os
import runpy
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(sys.argv[0]).parent
STATES = {"0": "COMPLETED", "cancelled": "CANCELLED"}
POLL = 0.02


def install(folder: Path) -> None:
    """Puts the commands into a folder, for the PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (folder / name).write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        (folder / name).chmod(0o755)


@contextmanager
def machine(folder: Path) -> Iterator[None]:
    """Starts what the commands in a folder submit, as forks of a process that has imported what is slow to import."""
    from helpers.ranks import forks

    install(folder)
    closed, running = threading.Event(), {}

    def serve() -> None:
        while not closed.wait(POLL):
            for asked in set(folder.glob("*.job")) - {*running}:
                running[asked] = forks().Process(target=_job, args=(asked,))
                running[asked].start()
            for asked, process in running.items():
                if process.exitcode is not None and not (end := asked.with_suffix(".end")).exists():
                    _write(end, process.exitcode)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        for process in running.values():
            process.kill()
            process.join()


def _job(asked: Path) -> None:
    os.setsid()
    _write(asked.with_suffix(".pid"), os.getpid())
    job = json.loads(asked.read_text())
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    (command,) = (line for line in job["script"].splitlines() if line.startswith("srun "))
    srun(*shlex.split(command)[1:])


def _write(path: Path, content: object) -> None:
    """At once, for readers that wait for the file."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(str(content))
    part.rename(path)


def sbatch(script: str) -> None:
    number = len(list(ROOT.glob("*.job"))) + 1
    environment = {**os.environ, "SLURM_JOB_ID": str(number), "SUBMITIT_EXECUTOR": "slurm"}
    job = {"script": Path(script).read_text(), "environment": environment, "folder": os.getcwd()}
    _write(ROOT / f"{number}.job", json.dumps(job))
    while not (ROOT / f"{number}.pid").exists():
        time.sleep(POLL)
    print(f"Submitted batch job {number}")


def srun(*arguments: str) -> None:
    """Runs `python -m module ...` in this process."""
    names = {"%j": os.environ["SLURM_JOB_ID"], "%t": "0"}
    for option, stream in (("--output", sys.stdout), ("--error", sys.stderr)):
        path = arguments[arguments.index(option) + 1]
        for mark, value in names.items():
            path = path.replace(mark, value)
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    _, module, *rest = arguments[arguments.index("-m") :]
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for flag, number in zip(arguments, arguments[1:], strict=False):
        if flag == "-j":
            end = ROOT / f"{number}.end"
            print(f"{number}|{STATES.get(end.read_text().strip(), 'FAILED') if end.exists() else 'RUNNING'}|here")


def scancel(number: str) -> None:
    _write(ROOT / f"{number}.end", "cancelled")
    os.killpg(int((ROOT / f"{number}.pid").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](*sys.argv[1:])
