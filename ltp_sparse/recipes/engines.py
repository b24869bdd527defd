"""Engines run jobs: in this process, in workers on this machine, on a Ray cluster, or by SLURM."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from ltp_sparse.recipes.jobs import Job, Outcome
from ltp_sparse.weights.files import write_text

_FORMS = "local:0,1 (GPUs), ray://HOST:PORT, ray:auto or slurm:partition=NAME,time=MINUTES"

_GPU = re.compile(r"\d+|(GPU|MIG)-[\w./-]+")  # CUDA hides all GPUs from a name that it does not know


class Engine(Protocol):
    """Runs jobs elsewhere, several at once.

    Attributes:
        room: how many jobs it takes at once.
    """

    room: int

    def submit(self, job: Job) -> None:
        """Starts a job, or queues it."""

    def wait(self) -> Sequence[tuple[Job, Outcome]]:
        """Waits until a submitted job ends, and returns those that have ended."""

    def close(self) -> None:
        """Ends the workers, and jobs that still run."""


def engine_on(where: str, folder: Path, gpus: float | None = None) -> Engine:
    """An engine by its name on the command line.

    Args:
        where: `local:0,1`, `ray://host:10001`, `ray:auto`, `ray:host:6379` or `slurm:partition=gpu,time=60`.
        folder: folder for files of the engine; all machines must see it.
        gpus: GPUs per cell, such as 0.5; None: 1 if there are any.

    Raises:
        ValueError: the name has another form, or a package is not installed.
    """
    name, _, rest = where.partition(":")
    if gpus is not None and gpus != 0 and not 0.01 <= gpus <= 1:
        raise ValueError(f"--gpus-per-cell must be 0 or in [0.01, 1], as a cell uses one GPU at most; got {gpus:g}")
    if name == "local" and all(map(_GPU.fullmatch, devices := rest.split(","))):
        if len(set(devices)) < len(devices):
            raise ValueError(f"--on {where}: a GPU is named twice; --gpus-per-cell 0.5 runs two cells on each")
        here = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else torch.cuda.device_count()  # else it numbers them anew
        if here and (beyond := [device for device in devices if device.isdigit() and int(device) >= here]):
            raise ValueError(
                f"--on {where}: there is no GPU {beyond[0]}, its cells would run on the CPU; got {here} GPUs"
            )
        return Local(devices, 1 if not gpus else int(1 / gpus))
    if name == "ray" and rest:
        return Ray(where if rest.startswith("//") else rest, gpus)
    pairs = [part.partition("=")[::2] for part in rest.split(",")] if rest else []
    options = dict(pairs)
    if name == "slurm" and all(options.values()):
        if len(options) < len(pairs):
            raise ValueError(f"--on {where}: an option is given twice")
        return Slurm(folder, options, gpus)
    raise ValueError(f"--on must be {_FORMS}; got {where!r}")


class Here:
    """This process, which runs one job at a time."""

    room = 1

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> Sequence[tuple[Job, Outcome]]:
        job = self._jobs.pop()
        return [(job, job())]

    def close(self) -> None:
        pass


class Local:
    """Worker processes on this machine, each of which sees one GPU only.

    Args:
        devices: GPUs, as in CUDA_VISIBLE_DEVICES.
        each: workers per GPU.
    """

    def __init__(self, devices: Sequence[str], each: int = 1) -> None:
        self.room = len(devices) * each
        self._workers = [_Worker(device) for device in devices for _ in range(each)]

    def __str__(self) -> str:
        return f"{self.room} workers on this machine"

    def submit(self, job: Job) -> None:
        next(worker for worker in self._workers if worker.job is None).start(job)

    def wait(self) -> Sequence[tuple[Job, Outcome]]:
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        return [busy[pipe].finish() for pipe in wait(list(busy)) if isinstance(pipe, Connection)]

    def close(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """A process that is started for its first job, and again for the next job after it has died."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.job: Job | None = None
        self._process: Any = None

    def start(self, job: Job) -> None:
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_work, args=(self.device, theirs))
            self._process.start()
            theirs.close()  # so that the pipe ends with the process
        self.job = job
        with suppress(BrokenPipeError):  # it has died; `finish` finds out
            self.pipe.send(job)

    def finish(self) -> tuple[Job, Outcome]:
        assert self.job is not None
        job, self.job = self.job, None
        try:
            return job, self.pipe.recv()
        except (EOFError, ConnectionResetError):
            process, self._process = self._process, None
            process.join()
            return job, Outcome(error=_ended(process.exitcode), died=True)

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _work(device: str, pipe: Connection) -> None:
    """Runs the jobs that arrive through a pipe until it is closed."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the driver ends its workers
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with suppress(EOFError):
        while True:
            pipe.send(pipe.recv()())


def _end_with_driver() -> None:
    """Ends this worker when the driver has ended, even if a job is running."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _ended(status: int) -> str:
    """How a process ended, from its exit code; a negative one is a signal."""
    try:
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    except ValueError:
        return f"ended by signal {-status}"


class Ray:
    """A Ray cluster.

    Args:
        address: `ray://host:10001` from outside, `auto` or `host:6379` on a machine of the cluster.
        gpus: share of a GPU for each job; None: one, or none if the cluster has no GPU now.
    """

    room = 10_000  # Ray queues them

    def __init__(self, address: str, gpus: float | None = None) -> None:
        self._ray = _package("ray")
        self._connect(address)
        there = self._ray.cluster_resources()
        each = min(there.get("GPU", 0), 1) if gpus is None else gpus
        self._text = f"Ray: now {there.get('GPU', 0):g} GPUs and {there.get('CPU', 0):g} CPUs, {each:g} GPUs a cell"
        self._run = self._ray.remote(max_retries=0, num_cpus=1, num_gpus=each)(_run)
        self._jobs: dict[Any, Job] = {}

    def _connect(self, address: str, tries: int = 5) -> None:
        """Connects, with some tries: Ray forks a server for each client, which can die at its start.

        It was seen with Ray 2.60 on a busy machine.
        """
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="warning")
        except ConnectionAbortedError:
            if tries == 1:
                raise
            self._connect(address, tries - 1)

    def __str__(self) -> str:
        return self._text

    def submit(self, job: Job) -> None:
        self._jobs[self._run.remote(job)] = job

    def wait(self) -> Sequence[tuple[Job, Outcome]]:
        (ready, *_), _ = self._ray.wait(list(self._jobs), num_returns=1)
        job = self._jobs.pop(ready)
        try:
            return [(job, self._ray.get(ready))]
        except self._ray.exceptions.RayError as error:
            return [(job, Outcome(error=(str(error) or repr(error)).splitlines()[0], died=True))]

    def close(self) -> None:
        for running in self._jobs:
            self._ray.cancel(running, force=True)
        self._ray.shutdown()


def _run(job: Job) -> Outcome:
    """Runs a job. Ray makes remote functions of functions only, and a job is an object."""
    return job()


class Slurm:
    """Jobs of SLURM, by submitit. They go on if the driver is killed, and the next driver takes their outcomes.

    Args:
        folder: folder for submitted jobs, their outcomes and logs; all machines must see it.
        options: options of `sbatch`, such as partition, time (minutes), mem, account, and `jobs`, the largest number of
            jobs at a time (default: 100).
        gpus: GPUs per job, 0 or 1; None: 1.
        executor: name of submitit's executor class.

    Raises:
        ValueError: there is no submitit or no SLURM here, or submitit refuses the options.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, str], gpus: float | None = None, executor: str = "SlurmExecutor"
    ) -> None:
        if gpus is not None and gpus not in (0, 1):
            raise ValueError(f"--gpus-per-cell: SLURM hands out whole GPUs, expected 0 or 1, got {gpus:g}")
        submitit = _package("submitit", "slurm")
        given: dict[str, Any] = {name: int(value) if value.isdigit() else value for name, value in options.items()}
        self.room: int = given.pop("jobs", 100)
        if not isinstance(self.room, int) or self.room < 1:
            raise ValueError(f"--on slurm: jobs must be a number of at least 1, got {self.room!r}")
        given = {"job_name": "ltp-sparse", "time": 60, "gpus_per_node": 1 if gpus is None else int(gpus), **given}
        self._folder = folder.absolute()
        try:
            self._executor = getattr(submitit, executor)(self._folder)
            self._executor.update_parameters(**given)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--on slurm: {str(error).splitlines()[0]}") from error
        self._jobs: dict[str, tuple[Job, Any]] = {}

    def __str__(self) -> str:
        return f"SLURM, {self.room} jobs at once"

    def submit(self, job: Job) -> None:
        record = self._record(job)
        if record.is_file():  # of a driver that was killed
            theirs = self._executor.job_class(self._folder, record.read_text())
        else:
            theirs = self._executor.submit(job)
            write_text(record, theirs.job_id)
        self._jobs[job.id] = job, theirs

    def wait(self) -> Sequence[tuple[Job, Outcome]]:
        while not (ended := [id for id, (_, theirs) in self._jobs.items() if theirs.done()]):
            time.sleep(1)
        return [self._finish(*self._jobs.pop(ended[0]))]  # one by one: its row is on disk before the next is taken

    def _finish(self, job: Job, theirs: Any) -> tuple[Job, Outcome]:
        self._record(job).unlink(missing_ok=True)
        try:
            outcome: Outcome = theirs.result()
        except Exception:  # of submitit: a job that raises returns an outcome as well
            return job, Outcome(error=f"state {theirs.state}, log {theirs.paths.stderr}", died=True)
        for path in self._folder.glob(f"{theirs.job_id}_*"):
            path.unlink()
        return job, outcome

    def _record(self, job: Job) -> Path:
        """The file with the number that SLURM gave to a job."""
        return self._folder / f"{job.digest}.id"

    def close(self) -> None:
        for job, theirs in self._jobs.values():
            theirs.cancel(check=False)
            self._record(job).unlink(missing_ok=True)


def _package(name: str, extra: str | None = None) -> Any:
    """The module of an optional package. Raises ValueError, with the extra to install, if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(f'--on: {name} is not installed; pip install "ltp-sparse[{extra or name}]"') from None
