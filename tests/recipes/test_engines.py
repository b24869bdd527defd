"""Grids: the same rows on all engines, through workers that die, drivers that are killed and cells that raise."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import fake_slurm

from ltp_sparse.cli import main
from ltp_sparse.methods import METHODS as REGISTERED
from ltp_sparse.recipes import load_recipe, results
from ltp_sparse.recipes.cache import Cache
from ltp_sparse.recipes.engines import Here, Local, Slurm, engine_on
from ltp_sparse.recipes.jobs import Outcome, jobs_of
from ltp_sparse.recipes.run import run_jobs, run_recipe
from ltp_sparse.recipes.workbench import Workbench
from ltp_sparse.training.run_folder import alone

# Ray's workers have a niceness of 15 by default, and then get hardly any time beside other tests.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
pytestmark = pytest.mark.timeout(900)

RECIPE = """
title: A grid
plugins: [grid_methods.py]
defaults:
  model: {world}/model
  train: {{task: xnli-fewshot, language: en}}
  test: {{task: xnli, languages: [en], limit: 6}}
  settings: {{epochs: 1, max_length: 40}}
  shots: 1
cells:
  - {{label: dies, method: told, options: {{act: die, folder: {folder}}}}}
  - {{label: LTP, method: ltp, ticket: {{density: 0.2, lines: 60, mlm: {{max_steps: 2, length: 16}}}},
      grid: {{ticket.density: [0.2, 0.5]}}}}
  - {{label: raises, method: told, options: {{act: raise, folder: {folder}}}}}
  - {{label: kills, method: told, options: {{act: driver, folder: {folder}}}}}
"""


@pytest.fixture(autouse=True, scope="module")  # before the grid of the module, which runs in this process
def _no_method_stays():
    """Methods of plugins that ran in this process are not those of later tests."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


METHODS = """
import os, platform, time
from dataclasses import dataclass
from pathlib import Path

from ltp_sparse.methods import SoftPrompt, register


@register
@dataclass(frozen=True, kw_only=True)
class Told(SoftPrompt):
    key, name = "told", "does as a file tells it, once"
    act: str = ""
    folder: str = ""

    def prepare(self, language_model):
        folder = Path(self.folder)
        with open(folder / "started", "a") as file:
            print(self.act, platform.node(), file=file)
        if self.act == "raise":
            raise RuntimeError("no such luck")
        if (file := folder / self.act).exists():
            while self.act == "driver" and '"label": "dies"' not in (folder / "rows").read_text():
                time.sleep(0.05)
            process, end = map(int, (file.read_text() or f"{os.getpid()} 9").split())
            file.unlink()
            os.kill(process, end)
        super().prepare(language_model)
"""


@dataclass
class Grid:
    """One recipe in one folder, run again and again into another output."""

    world: Path
    folder: Path
    before: tuple[str, ...] = ()

    def command(self, output: str, *on: str) -> list[str]:
        places = ["--output", self.folder / output, "--cache", self.folder / f"{output}-cache"]
        words = ["run", self.folder / "grid.yaml", "--allow-plugins", "--data", self.world / "data", *places, *on]
        return [*self.before, sys.executable, "-m", "ltp_sparse.cli", *map(str, words)]

    def run(self, output: str, *on: str) -> None:
        """To the end, where one cell has raised."""
        if self.before:
            done = subprocess.run(self.command(output, *on), env=ENVIRONMENT, capture_output=True, text=True)
            assert done.returncode == 1, done.stdout + done.stderr
        else:
            words = self.command(output, *on)
            assert main(words[words.index("run") :]) == 1

    def run_until_killed(self, output: str, *on: str, end: int = signal.SIGKILL, dies: bool = True) -> None:
        """One worker dies, if it shall, then a signal ends the driver, and with it all that holds its pipe."""
        rows = self.folder / "rows"
        rows.unlink(missing_ok=True)
        (self.folder / output).mkdir()
        (self.folder / output / results.RESULTS).touch()
        rows.symlink_to(self.folder / output / results.RESULTS)
        (self.folder / "started").unlink()
        if dies:
            (self.folder / "die").touch()
        command = ["env", "--default-signal=INT", *self.command(output, *on)]  # background jobs of a shell ignore it
        driver = subprocess.Popen(
            command, env={**ENVIRONMENT, "PATH": os.environ["PATH"]}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        (self.folder / "driver").write_text(f"{driver.pid} {end}")
        told, _ = driver.communicate()
        assert driver.returncode == (130 if end == signal.SIGINT else -end), told
        assert ("dies xnli-fewshot en 1-shot seed 1: its worker died" in told) == dies, told

    def rows(self, output: str) -> dict[str, dict]:
        """Label and density -> row, without what differs between two runs anyway."""
        found = results.read(self.folder / output / results.RESULTS)
        for row in found:
            del row["seconds"], row["provenance"]["time"], row["provenance"]["host"]
        assert len({row["id"] for row in found}) == len(found)
        return {f"{row['label']} {(row.get('ticket') or {}).get('density', '')}".strip(): row for row in found}

    def started(self, which: int = 0) -> list[str]:
        """What the cells that were started do; 1: their hosts."""
        return [line.split()[which] for line in (self.folder / "started").read_text().splitlines()]


@pytest.fixture(scope="module")
def grid(world, once):
    """With the rows of a plain run, in which nothing dies, in `plain`."""

    def make(folder: Path) -> None:
        (folder / "grid.yaml").write_text(RECIPE.format(world=world, folder=folder))
        (folder / "grid_methods.py").write_text(METHODS)
        Grid(world, folder).run("plain")

    return Grid(world, once("grid", make))


def check_same(grid: Grid, output: str, dies: bool = True) -> None:
    """Rows equal those of the plain run but for attempts; artefacts were made once; what raised was not tried again."""
    plain, rows = grid.rows("plain"), grid.rows(output)
    assert sorted(rows) == ["LTP 0.2", "LTP 0.5", "dies", "kills"]
    attempts = {name: row.pop("attempts") for name, row in rows.items()}
    assert attempts == {**dict.fromkeys(rows, 1), "dies": 1 + dies}
    assert {row.pop("attempts") for row in plain.values()} == {1}
    assert rows == plain
    assert len(Cache(grid.folder / f"{output}-cache").entries()) == 1
    assert not list((grid.folder / output).glob("cells/*"))


def failures(grid: Grid, output: str) -> list[tuple[str, int]]:
    return [(row["error"], row["attempts"]) for row in results.read(grid.folder / output / results.FAILURES)]


def killed_and_continued(grid: Grid, output: str, *on: str) -> list[str]:
    """Kills a worker and the driver, goes on by the same command; returns which cells were started."""
    grid.run_until_killed(output, *on)
    artefact = Cache(grid.folder / f"{output}-cache").entries()[0]
    grid.run(output, *on)
    check_same(grid, output)
    assert Cache(grid.folder / f"{output}-cache").entries() == [artefact]
    assert set(failures(grid, output)) == {("RuntimeError('no such luck')", 1)}
    return grid.started()


def run_with_a_death(grid: Grid, output: str, *on: str) -> None:
    """Kills a worker; the driver, which is this process, starts its cell again."""
    (grid.folder / "started").unlink()
    (grid.folder / "die").touch()
    grid.run(output, *on)
    check_same(grid, output)
    assert sorted(grid.started()) == ["die", "die", "driver", "raise"]


@pytest.mark.slow
def test_workers_of_this_machine(grid, capsys):
    run_with_a_death(grid, "local", "--on", "local:0,1")
    told = capsys.readouterr().out
    assert "on 2 workers on this machine" in told and "its worker died (ended by SIGKILL), attempt 2 follows" in told


@pytest.mark.faults
def test_workers_end_with_their_driver(grid):
    started = killed_and_continued(grid, "killed", "--on", "local:0,1")
    assert started.count("die") == 2 and started.count("driver") == 2


@pytest.mark.faults
def test_an_interrupt_ends_all_and_another_engine_goes_on(grid):
    grid.run_until_killed("interrupted", "--on", "local:0", end=signal.SIGINT, dies=False)
    grid.run("interrupted")  # in this process: every worker starts for some seconds
    check_same(grid, "interrupted", dies=False)
    assert sorted(grid.started()) == ["die", "driver", "driver", "raise", "raise"]


@pytest.mark.slow
def test_jobs_of_slurm_outlive_their_driver(grid, tmp_path, monkeypatch):
    """The next driver takes the outcome of what goes on meanwhile: no cell is done twice."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    options = ("--on", "slurm:partition=gpu,time=30,jobs=2", "--gpus-per-cell", "0")
    with fake_slurm.machine(tmp_path / "bin"):
        started = killed_and_continued(grid, "slurm", *options)
    assert started.count("die") == 2 and started.count("driver") == 1
    left = {file.suffix for file in (grid.folder / "slurm" / "jobs").iterdir()}
    assert ".id" not in left and ".pkl" in left  # of the job whose process died


@contextlib.contextmanager
def cluster(*hosts: tuple[str, ...]):
    """Ray with one node a host, (address, what its commands begin with); yields its port, and that for clients."""
    pytest.importorskip("ray", reason="needs the extra ray")
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0)), other.bind(("127.0.0.1", 0))
        port, client = one.getsockname()[1], other.getsockname()[1]
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    small = ["--object-store-memory", "80000000", "--num-gpus", "0"]
    nodes = []
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        try:
            for i, (address, begin) in enumerate(hosts):
                mine = ["--node-ip-address", address, "--num-cpus", str(2 if len(hosts) == 1 else 1)]
                role = ["--head", "--port", port, "--ray-client-server-port", client, "--include-dashboard", "false"]
                role += ["--temp-dir", folder]
                role = role if i == 0 else ["--address", f"{hosts[0][0]}:{port}"]
                command = [*begin, *ray, *mine, *small, *map(str, role)]
                nodes.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
                for line in nodes[-1].stdout:
                    if "Ray runtime started" in line:
                        break
                else:
                    raise AssertionError(f"no Ray on {address}")
            yield port, client
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in nodes:
                node.communicate(timeout=60)


@pytest.mark.slow
def test_a_ray_cluster(grid):
    with cluster(("127.0.0.1", ())) as (port, _):
        run_with_a_death(grid, "ray", "--on", f"ray:127.0.0.1:{port}")


@pytest.mark.faults
def test_a_ray_cluster_loses_its_driver(grid):
    with cluster(("127.0.0.1", ())) as (port, _):
        started = killed_and_continued(grid, "ray-killed", "--on", f"ray:127.0.0.1:{port}")
    assert started.count("die") == 2 and started.count("driver") == 2


@pytest.mark.faults
def test_ray_on_two_hosts(world, grid, tmp_path):
    """Network namespaces with names of their own: all that they share is the disk."""
    if os.geteuid() != 0 or shutil.which("ip") is None or subprocess.call(["unshare", "-n", "-u", "true"]):
        pytest.skip("network namespaces need root, ip and unshare")
    pair = [f"ltp{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    named = ["unshare", "-u", "sh", "-c", 'hostname "$0"; exec "$@"']
    inside = [("ip", "netns", "exec", name, *named, name) for name in pair]
    try:
        for name in pair:
            subprocess.run(["ip", "netns", "add", name], check=True)
        ends = [("name", name, "netns", name) for name in pair]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for name, address in zip(pair, addresses, strict=True):
            for words in (f"addr add {address}/24 dev {name}", f"link set {name} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        with cluster(*zip(addresses, inside, strict=True)) as (_, client):
            outside = replace(grid, before=inside[0])
            killed_and_continued(outside, "hosts", "--on", f"ray://{addresses[0]}:{client}")
        assert set(grid.started(1)) == set(pair)
    finally:
        for name in pair:
            subprocess.call(["ip", "netns", "delete", name])


@pytest.mark.faults
def test_the_local_executor_of_submitit(grid):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    (grid.folder / "die").touch()
    recipe = load_recipe(str(grid.folder / "grid.yaml"), allow_plugins=True)
    bench = Workbench(data=grid.world / "data", cache=Cache(grid.folder / "submitit-cache"))
    engine = Slurm(grid.folder / "submitit" / "jobs", {"jobs": "2"}, 0, executor="LocalExecutor")
    with contextlib.closing(engine):
        assert run_recipe(recipe, grid.folder / "submitit", bench, engine=engine) == 1
    check_same(grid, "submitit")


# --- the driver, with an engine that is a list ---


@dataclass
class Toy:
    """A job that does nothing: an outcome for each attempt."""

    id: str
    outcomes: list[Outcome] = field(default_factory=lambda: [Outcome()])
    needs: tuple[str, ...] = ()

    def __call__(self) -> Outcome:
        return self.outcomes.pop(0)


class Toys(Here):
    """Ends the jobs that it has all at once, the last one first."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.most, self.order = room, 0, []

    def wait(self):
        self.most = max(self.most, len(self._jobs))
        self.order += [job.id for job in self._jobs]
        return [super(Toys, self).wait()[0] for _ in range(len(self._jobs))]


DIED, RAISED = Outcome(error="lost", died=True), Outcome(error="ValueError('no')", trace="there")


def test_jobs_wait_for_what_they_need():
    jobs = [Toy("a"), Toy("1", needs=("a",)), Toy("2"), Toy("b"), Toy("3", needs=("a", "b")), Toy("4")]
    engine = Toys(2)
    ended = [(job.id, outcome.error, outcome.attempts) for job, outcome in run_jobs(jobs, engine, 0)]
    assert engine.order == ["a", "2", "1", "b", "3", "4"] and engine.most == 2
    assert sorted(ended) == [(name, None, 1) for name in "1234ab"]


def test_a_job_is_tried_again_only_if_its_worker_died(capsys):
    jobs = [Toy("a", [DIED, DIED, Outcome()]), Toy("b", [RAISED]), Toy("c", [DIED] * 3), Toy("d", [DIED, RAISED])]
    ended = {job.id: (outcome.error, outcome.attempts) for job, outcome in run_jobs(jobs, Toys(9), 2)}
    assert ended == {"a": (None, 3), "b": ("ValueError('no')", 1), "c": ("lost", 3), "d": ("ValueError('no')", 2)}
    assert capsys.readouterr().out.count("its worker died (lost)") == 2 + 2 + 1


def test_cells_fail_with_the_artefact_that_they_need():
    jobs = [Toy("a", [RAISED]), Toy("1", [], needs=("a",)), Toy("2", [], needs=("a",)), Toy("3")]
    ended = {job.id: (outcome.error, outcome.trace, outcome.attempts) for job, outcome in run_jobs(jobs, Toys(1), 3)}
    failed = ("ValueError('no')", "there")
    assert ended == {"a": (*failed, 1), "1": (*failed, 0), "2": (*failed, 0), "3": (None, "", 1)}


def test_artefacts_of_a_paper_are_jobs_of_their_own(world, tmp_path):
    """180 cells need one run of stage 1; ten languages one SFT each, and that of English."""
    bench = Workbench(data=None, cache=Cache(tmp_path))
    counts = {}
    for name in ("ltp-table-1", "sc-sft-table-1"):
        recipe = load_recipe(name)
        jobs = jobs_of(recipe, recipe.cells, bench, tmp_path, None)
        ids = [job.id for job in jobs]
        assert len(ids) == len(set(ids))
        assert all(ids.index(before) < ids.index(job.id) for job in jobs for before in job.needs)
        counts[name] = len(jobs) - len(recipe.cells)
    assert counts["ltp-table-1"] == 1
    job = pickle.loads(pickle.dumps(jobs[-1]))
    assert job.id == jobs[-1].id and job.digest == jobs[-1].digest
    assert job.bench is pickle.loads(pickle.dumps(jobs[0])).bench  # what one job has loaded serves the next


# --- names of engines ---


def test_engines_by_name(tmp_path):
    with contextlib.closing(engine_on("local:0,1", tmp_path, 0.5)) as engine:
        assert isinstance(engine, Local) and str(engine) == "4 workers on this machine"


@pytest.mark.parametrize(("failures", "gpus", "text"), [(0, {}, "0 GPUs a cell"), (4, {"GPU": 8.0}, "1 GPUs a cell")])
def test_ray_is_asked_again_if_its_server_dies_at_its_start(tmp_path, monkeypatch, failures, gpus, text):
    calls = []

    def init(**options):
        calls.append(options["address"])
        if len(calls) <= failures:
            raise ConnectionAbortedError("Initialization failure from server")

    remote = lambda **_: lambda function: function  # noqa: E731
    ray = SimpleNamespace(init=init, cluster_resources=lambda: {"CPU": 4.0, **gpus}, remote=remote)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert str(engine_on("ray://host:1", tmp_path)).endswith(text) and calls == ["ray://host:1"] * (failures + 1)
    calls[:] = []
    failures = 5
    with pytest.raises(ConnectionAbortedError):
        engine_on("ray:auto", tmp_path)
    assert calls == ["auto"] * 5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--on", "local"], "--on must be local:0,1 (GPUs), ray://HOST:PORT, ray:auto or slurm:partition=NAME"),
        (["--on", "local:0,,1"], "got 'local:0,,1'"),
        (["--on", "local:-1"], "got 'local:-1'"),
        (["--on", "local:cuda:0"], "got 'local:cuda:0'"),
        (["--on", "local:0,0"], "a GPU is named twice; --gpus-per-cell 0.5 runs two cells on each"),
        (["--on", "local:0", "--gpus-per-cell", "1e-9"], "must be 0 or in [0.01, 1]"),
        (["--on", "dask:9"], "got 'dask:9'"),
        (["--on", "slurm:gpu"], "got 'slurm:gpu'"),
        (["--on", "slurm:time=5,mem=9G,time=50"], "an option is given twice"),
        (["--on", "slurm:jobs=0"], "jobs must be a number of at least 1, got 0"),
        (["--on", "local:0", "--gpus-per-cell", "2"], "0 or in [0.01, 1], as a cell uses one GPU at most; got 2"),
        (["--on", "slurm:", "--gpus-per-cell", "0.5"], "SLURM hands out whole GPUs, expected 0 or 1, got 0.5"),
        (["--gpus-per-cell", "0.5"], "--gpus-per-cell needs --on"),
        (["--on", "local:0", "--retries", "-1"], "--retries: must be at least 0, got -1"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, words, told):
    if words[1].startswith("slurm:jobs"):
        pytest.importorskip("submitit", reason="needs the extra slurm")
    assert main(["run", "evidence-generated", "--output", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(("on", "name", "extra"), [("ray:auto", "ray", "ray"), ("slurm:", "submitit", "slurm")])
def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch, on, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["run", "evidence-generated", "--output", str(tmp_path), "--on", on]) == 2
    assert f'{name} is not installed; pip install "ltp-sparse[{extra}]"' in capsys.readouterr().err


def test_slurm_is_refused_where_it_is_not(tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit", reason="needs the extra slurm")
    run = ["run", "evidence-generated", "--output", str(tmp_path / "out"), "--on"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*run, "slurm:partition=gpu"]) == 2
    assert '--on slurm: Could not detect "srun"' in capsys.readouterr().err
    fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert main([*run, "slurm:partion=gpu"]) == 2
    assert "--on slurm: Unavailable parameter(s): ['partion']" in capsys.readouterr().err


def test_one_driver_writes_into_a_folder(world, tmp_path, capsys):
    with alone(tmp_path / "out"):
        assert main(["run", "evidence-generated", "--output", str(tmp_path / "out"), "--only", "seed=1"]) == 2
    assert f"another run is using {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="there is no GPU 7, its cells would run on the CPU; got 2 GPUs"):
        engine_on("local:0,7", tmp_path)
    assert engine_on("local:0,1", tmp_path).room == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # the names only count workers
    assert engine_on("local:0,7", tmp_path).room == 2
