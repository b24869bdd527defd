"""`sbatch`, `srun`, `sacct` and `scancel` for one machine: jobs start at once, as processes that outlive the driver."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(sys.argv[0]).parent
STATES = {"0": "COMPLETED", "cancelled": "CANCELLED"}


def install(folder: Path) -> None:
    """Puts the commands into a folder, for the PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (folder / name).write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        (folder / name).chmod(0o755)


def sbatch(script: str) -> None:
    number = len(list(ROOT.glob("*.pid"))) + 1
    code = f"bash {script}; echo $? > {ROOT}/{number}.end"
    environment = {**os.environ, "SLURM_JOB_ID": str(number), "SUBMITIT_EXECUTOR": "slurm"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["bash", "-c", code], env=environment, start_new_session=True, **quiet)
    (ROOT / f"{number}.pid").write_text(str(process.pid))
    print(f"Submitted batch job {number}")


def srun(*arguments: str) -> None:
    at = next(i for i, word in enumerate(arguments) if Path(word).name.startswith("python"))
    names = {"%j": os.environ["SLURM_JOB_ID"], "%t": "0"}
    files = []
    for option in ("--output", "--error"):
        path = arguments[arguments.index(option) + 1]
        for mark, value in names.items():
            path = path.replace(mark, value)
        files.append(open(path, "a"))  # noqa: SIM115
    sys.exit(subprocess.call(arguments[at:], stdout=files[0], stderr=files[1]))


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for flag, number in zip(arguments, arguments[1:], strict=False):
        if flag == "-j":
            end = ROOT / f"{number}.end"
            print(f"{number}|{STATES.get(end.read_text().strip(), 'FAILED') if end.exists() else 'RUNNING'}|here")


def scancel(number: str) -> None:
    os.killpg(int((ROOT / f"{number}.pid").read_text()), signal.SIGKILL)
    (ROOT / f"{number}.end").write_text("cancelled")


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](*sys.argv[1:])
