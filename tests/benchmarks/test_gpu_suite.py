"""`make gpu` without a GPU: on the CPU with a tiny model, and on a device that fails on purpose."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ltp_sparse.backends import compiled

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "gpu"
CRASH, HANG, DEAD = "exit status -6", "no answer for 60 s", "RuntimeError: an illegal memory access was encountered"


def make_gpu(folder, *options, faults=(), device="cpu"):
    if isinstance(reason := compiled.extension(), str):
        pytest.skip(reason)
    path = os.pathsep.join(map(str, (ROOT / "tests" / "helpers", SUITE, ROOT / "benchmarks")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FAULTS": json.dumps(faults)}
    command = [
        sys.executable,
        str(SUITE / "run.py"),
        "--device",
        device,
        "--folder",
        str(folder),
        "--seconds",
        "1200",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names_of(row):
    return row["op"], row["precision"], row["provider"], row["mode"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_measured(tmp_path):
    run = make_gpu(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "environment.json", "rows.csv", "floors.csv", "launches.csv", "report.md", "log.txt"
    }  # fmt: skip
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["torch"] and facts["bitsandbytes"] and facts["CUB"] and facts["commit"] and len(facts["code"]) == 12
    rows = rows_in(tmp_path / "rows.csv")
    assert len({names_of(row) for row in rows}) == len(rows)
    without = [row for row in rows if row["error"]]
    assert {names_of(row) for row in without} == {("step", "float16", "torch AdamW(foreach=True)", "eager")}
    assert without[0]["error"].startswith("WrongResult: ") and not without[0]["p50_ms"]
    rows = [row for row in rows if row not in without]
    steps = [row for row in rows if row["provider"] == "MaskedAdamW (compiled)"]
    assert {row["precision"] for row in steps} == {"float32", "bfloat16", "bfloat16-8bit", "float16"}
    assert {row["mode"] for row in steps} == {"graph", "eager", "fresh"}
    assert all(row["code"] == facts["code"] and 0 < int(row["sector_bytes"]) < int(row["bytes"]) for row in steps)
    assert all(float(row["memory_per_entry"]) > 0 for row in steps)
    ours = {row["provider"] for row in rows if row["op"] == "selection" and row["code"]}
    assert ours == {f"{call} (compiled)" for call in ("topk_delta", "select", "topk_delta, histogram")}
    copies = {row["provider"]: row for row in rows if row["op"] == "copy" and row["precision"] == "float32"}
    ours = {f"{call} (compiled)" for call in ("masked_gather", "masked_scatter_", "masked_swap_")}
    assert {*copies} == ours | {"copy_ of whole tensors", "index_select", "index_put_"}
    assert all(0 < int(copies[name]["sector_bytes"]) < int(copies[name]["bytes"]) for name in ours)
    assert {"grad.mul_(mask) + fused", "index_select + fused + index_copy_"} < {row["provider"] for row in rows}
    (last,) = [row for row in rows if not row["ratio"]]
    assert last is rows[-1] and "kthvalue" in last["provider"]
    assert all(float(row["p50_ms"]) > 0 and row["n"] and row["k"] for row in rows)
    floors = rows_in(tmp_path / "floors.csv")
    assert {row["name"] for row in floors} == {"copy", "read", "scattered"}
    assert {row["dtype"] for row in floors} == {"", "float32", "bfloat16"}
    scenes = {row["scene"] for row in rows_in(tmp_path / "launches.csv")}
    assert {"step, float32, 20 %, clipped", "step, float32, 20 %, packed gradients", "select, float32, 20 %"} < scenes
    report = (tmp_path / "report.md").read_text()
    assert "| MaskedAdamW (compiled) | graph |" in report and "| topk_delta, float32, 20 % | compiled |" in report
    assert "| no figures: WrongResult: " in report


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_failures_cost_their_own_rows_and_a_second_command_goes_on(tmp_path):
    """Every kind of failure, each in another cell; at the end the machine is lost during a measurement."""
    ours = "MaskedAdamW (compiled)"
    faults = [
        {"provider": ours, "mode": "graph", "precision": "float32", "fault": "crash"},
        {"provider": ours, "mode": "eager", "precision": "bfloat16", "fault": "hang"},
        {"provider": ours, "mode": "eager", "precision": "bfloat16-8bit", "fault": "exception"},
        {"provider": ours, "mode": "graph", "precision": "float16", "fault": "wrong"},
        {"provider": "topk_delta (compiled)", "mode": "eager", "precision": "float32", "fault": "dead_from_now_on"},
    ]
    cut = {"provider": "grad.mul_(mask) + fused", "mode": "graph", "precision": "float32", "fault": "cut"}
    expected = {
        ("step", "float32", ours, "graph"): CRASH,
        ("step", "bfloat16", ours, "eager"): HANG,
        ("step", "bfloat16-8bit", ours, "eager"): "RuntimeError: no kernel image is available",
        ("step", "float16", ours, "graph"): f"WrongResult: {ours}: the weights are off by",
        ("selection", "float32", "topk_delta (compiled)", "eager"): DEAD,
    }

    run = make_gpu(tmp_path, "--patience", "60", faults=[*faults, cut], device="faulty_device")
    assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr
    first = rows_in(tmp_path / "rows.csv")
    assert [names_of(row) for row in first].count(("step", "float32", ours, "fresh")) == 1
    errors = {names_of(row): row["error"] for row in first if row["error"]}
    assert {names: error[: len(expected.get(names, ""))] for names, error in errors.items()} == expected
    assert sum(row["provider"].endswith("(compiled)") for row in first) == 4 * 3 + 2 * 3 + 2 * 3
    assert first[-1]["provider"] == "torch AdamW(fused=True)"
    child = int((tmp_path / "log.txt").read_text().partition("sleeping beside ")[2].split()[0])
    assert not running(child)

    run = make_gpu(tmp_path, "--full", "--patience", "60", faults=faults, device="faulty_device")
    assert run.returncode == 1, run.stdout + run.stderr
    rows = rows_in(tmp_path / "rows.csv")
    assert rows[: len(first)] == first and len({names_of(row) for row in rows}) == len(rows)
    assert {names_of(row) for row in rows if row["error"]} == {
        *expected, ("step", "float16", "torch AdamW(foreach=True)", "eager")
    }  # fmt: skip
    again = rows[len(first)]
    assert (again["provider"], again["mode"]) == (cut["provider"], cut["mode"]) and float(again["p50_ms"]) > 0
    assert ours not in {row["provider"] for row in rows[len(first) :]}
    assert f"FAILED: step, float32, 0.2: {ours}, graph: {CRASH}" in run.stdout


def running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture
def suite(gpu, tmp_path, monkeypatch):
    """With one second for all phases, and its own environment."""
    import tempfile

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    folder = tmp_path / "results"
    folder.mkdir()
    run = gpu("run")
    monkeypatch.setattr(run, "LAST_WORDS", 0.2)
    return run.Suite(folder, tmp_path, seconds=1, patience=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["while :; do echo busy; sleep 0.05; done", "sleep 600", "trap '' INT TERM; sleep 600 & sleep 600; sleep 600"],
    ids=["prints", "is silent", "is deaf, with a child"],
)
def test_a_limit_holds_for_all_that_a_phase_started(gpu, suite, script):
    start = time.monotonic()
    suite.run(gpu("run").Phase("slow", 0.3, ("sh", "-c", f"echo group $$; {script}")))
    assert time.monotonic() - start < 60 and suite.cut == ["slow"] and not suite.failed
    group = int(suite.log.read_text().rpartition("group ")[2].split()[0])
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the kernel takes its time
            os.killpg(group, 0)
            time.sleep(0.02)


def test_a_phase_that_fails_is_told_and_the_time_of_all_ends(gpu, suite):
    run = gpu("run")
    suite.run(run.Phase("broken", 5, ("false",)))
    suite.run(run.Phase("broken measurement", 5, ("false",), measures=True))
    assert suite.failed == ["broken", "broken measurement"] and not suite.cut
    suite.deadline = time.monotonic()
    suite.run(run.Phase("too late", 5, ("true",)))
    assert suite.cut == ["too late"]


def test_a_line_that_was_cut_is_written_anew(gpu, tmp_path):
    rows, path = gpu("rows"), tmp_path / "rows.csv"
    key = dict.fromkeys(rows.KEY, "x")
    rows.append(path, rows.MEASURED, {**key, "p50_ms": 1.5})
    whole = path.read_text()
    for cut in range(len(whole)):
        path.write_text(whole[:cut])
        assert rows.read(path) == []
        rows.append(path, rows.MEASURED, {**key, "p50_ms": 1.5})
        assert path.read_text() == whole
    rows.append(path, rows.MEASURED, rows.failure(key, "two\nlines, and a comma"))
    assert [row["error"] for row in rows.read(path)] == ["", "two lines, and a comma"]
    (last,) = rows.latest(rows.read(path))
    assert last["error"] and not last["p50_ms"]


def test_rows_of_other_sources_are_measured_anew(gpu, tmp_path, monkeypatch):
    measure, rows = gpu("measure"), gpu("rows")
    key = {"op": "step", "model": "tiny", "density": 0.2, "precision": "float32", "kind": "uniform", "mode": "graph"}
    monkeypatch.setattr(measure, "code", lambda: "before")
    for who in ("compiled", "peers"):
        measure.Measurement(tmp_path, None, who).add({**key, "provider": who, "p50_ms": 1.0})
    monkeypatch.setattr(measure, "code", lambda: "now")
    for who, known in (("compiled", False), ("peers", True)):
        errors = measure.Measurement(tmp_path, None, who).errors
        assert (rows.key_of({**key, "provider": who}) in errors) is known


@pytest.mark.usefixtures("source_tree")
def test_without_git_the_sources_are_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sources

    for folder in ("csrc", "kernels", "ltp_sparse"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "mini*"))
    here = sources.code()
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert sources.commit() == f"unknown, sources {here}"
    (tmp_path / "csrc" / "record.h").write_text("changed")
    assert sources.code() != here


def test_what_was_committed_is_where_a_run_begins(gpu, tmp_path, monkeypatch):
    run = gpu("run")
    committed, folder = tmp_path / "results" / "nvidia-h200", tmp_path / "out"
    committed.mkdir(parents=True)
    (committed / "rows.csv").write_text("op\n")
    (committed / "step.png").write_text("drawn elsewhere")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "environment", lambda device: {"device": "NVIDIA H200", "code": ""})
    monkeypatch.setattr(run.Plan, "trial", lambda *_: [])
    monkeypatch.setattr(run.rows, "latest", lambda found: [])
    monkeypatch.setattr(os, "environ", {**os.environ, "OUT": str(folder)})
    monkeypatch.setattr(run.tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="0"):
        run.main()
    assert {path.name for path in folder.iterdir()} == {"rows.csv", "environment.json", "log.txt"} < {*run.KEPT}
    assert len(run.KEPT) <= 8


@pytest.mark.slow
def test_its_tests_are_found_without_what_a_gpu_machine_may_lack(gpu, tmp_path):
    """Without the packages for training and without plugins of pytest."""
    phases = gpu("plan").Plan("cuda", tmp_path).first()
    testing = [phase.command for phase in phases if "pytest" in phase.command]
    assert len(testing) == 2 + 2 * bool(shutil.which("compute-sanitizer"))
    calls = []
    for command in testing:
        chosen = [*command[command.index("pytest") + 1 :]]
        if "-n" in chosen:
            del chosen[chosen.index("-n") :]
        calls.append([*map(str, chosen), "--collect-only"])
    code = (
        "import sys, pytest\n"
        "for name in ('datasets', 'accelerate', 'matplotlib', 'yaml', 'scipy'): sys.modules[name] = None\n"
        f"for call in {calls!r}:\n    assert pytest.main(call) == 0, call"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_it_builds_what_it_measures(gpu, tmp_path, monkeypatch):
    """The suite starts without the package, and its later phases import the package that it builds."""
    code = "import runpy, sys; sys.modules['ltp_sparse'] = None; sys.argv = ['run.py', '--help']\n"
    code += f"sys.path.insert(0, {str(SUITE)!r}); runpy.run_path({str(SUITE / 'run.py')!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "--patience" in run.stdout, run.stderr
    plan = gpu("plan")
    monkeypatch.setattr(plan, "INSTALLED", tmp_path)
    build = [str(part) for part in plan.Plan("cuda", tmp_path).build().command]
    build[build.index("LTP_SPARSE_EXT=cuda-only")] = "LTP_SPARSE_EXT=off"
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    code = "import ltp_sparse.kernels, ltp_sparse.testing; print(ltp_sparse.kernels.__file__)"
    command, environment = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith(str(tmp_path)), run.stderr


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = make_gpu(tmp_path, device="cuda")
    assert run.returncode != 0 and "torch sees no CUDA device" in run.stderr and not [*tmp_path.iterdir()]


# --- report and targets ---

COMMON = {
    "op": "step", "model": "base", "density": "0.2", "precision": "float32", "kind": "uniform", "mode": "graph",
    "n": "200", "k": "40", "p50_ms": "", "ratio": "", "bytes": "", "sector_bytes": "", "memory_per_entry": "",
    "host_ms": "", "nodes": "", "clocks_mhz": "1980, 3201", "code": "", "error": "",
}  # fmt: skip
SELECTION = {"op": "selection", "kind": "normal", "mode": "eager"}


def made_up(provider, p50="", **columns):
    return {**COMMON, "provider": provider, "p50_ms": str(p50), **columns}


@pytest.fixture
def lines_of(gpu):
    """(rows, floors, launches) -> target -> (measured, met)"""
    targets = gpu("targets")

    def lines(rows=(), floors=(), launches=None):
        results = targets.Results(rows, targets.Floors(floors), launches or {})
        cells = (line.split("|")[1:-1] for line in targets.table(results).splitlines()[2:])
        return {what.strip(): (measured.strip(), met.strip()) for what, _, measured, met in cells}

    return lines


def test_targets_without_rows_are_not_measured(lines_of):
    found = lines_of()
    assert len(found) > 40 and set(found.values()) == {("not measured", "")}


def test_targets_are_met_or_not_by_the_fastest_backend(gpu, lines_of):
    targets = gpu("targets")
    ours = "MaskedAdamW (compiled)"
    rows = [
        made_up("MaskedAdamW (triton)", 1.25, ratio="1.6", memory_per_entry="1.757"),
        made_up(ours, 1.0, ratio="2.0", memory_per_entry="1.757"),
        made_up(ours, 0.5, ratio="4.0", mode="eager"),
        made_up(ours, 0.1, ratio="9.0", kind="clustered"),
        made_up(ours, 0.1, ratio="9.0", model="large"),
        made_up(targets.FUSED, 1.9, ratio="1.0"),
        made_up(targets.MULTIPLIED, 2.3, ratio="0.84"),
        made_up(targets.GATHERED, error="WrongResult: off"),
        made_up(ours, 0.5, density="0.05", ratio="4.0"),
        made_up(targets.FUSED, 2.0, density="0.05", ratio="1.0"),
    ]
    found = lines_of(rows)
    assert found[f"step, float32, 20 %: against {targets.FUSED}"] == ("2x", "yes")
    assert found[f"step, float32, 20 %: against {targets.MULTIPLIED}"] == ("2.381x", "**no**")
    assert found[f"step, float32, 20 %: against {targets.GATHERED}"] == ("not measured", "")
    assert found[f"step, float32, 5 %: against {targets.FUSED}"] == ("4x", "**no**")
    assert found["state, float32, 20 %"] == ("1.757 bytes/entry", "yes")


def test_shares_are_held_against_the_measured_floors(gpu, lines_of):
    """Sectors at the rate of scattered updates of the nearest density, the rest at that of a copy."""

    def floor(name, p50, moved, **more):
        blank = {"dtype": "", "density": "", "fetch_bytes": ""}
        return {**blank, "name": name, "p50_ms": str(p50), "bytes": str(moved), **more}

    floors = [
        floor("copy", 1.0, 1000),
        floor("read", 1.0, 9000),
        floor("scattered", 1.0, 500, dtype="float32", density="0.2", fetch_bytes="64"),
        floor("scattered", 1.0, 100, dtype="float32", density="0.01", fetch_bytes="64"),
        floor("scattered", 1.0, 900, dtype="float32", density="0.2", fetch_bytes="32"),
        floor("scattered", 1.0, 250, dtype="bfloat16", density="0.2", fetch_bytes="64"),
    ]
    row = made_up("MaskedAdamW (compiled)", 5.0, bytes="3000", sector_bytes="1000")
    held = gpu("targets").Floors(floors)
    assert held.ms(row) == 1000 / 500 + 2000 / 1000
    assert held.ms({**row, "density": "0.002"}) == 1000 / 100 + 2000 / 1000
    assert held.ms({**row, "precision": "bfloat16-8bit"}) == 1000 / 250 + 2000 / 1000
    assert held.ms({**row, "sector_bytes": ""}) == 3.0
    assert held.ms({**row, "bytes": ""}) is None
    assert lines_of([row], floors)["step, float32, 20 %: share of the measured floor"] == ("0.8", "**no**")


@pytest.mark.parametrize("installed", [True, False])
def test_the_target_of_8_bit_states_falls_back_to_a_floor(gpu, lines_of, installed):
    targets = gpu("targets")
    rows = [made_up("MaskedAdamW (compiled)", 0.5, precision="bfloat16-8bit", ratio="4", memory_per_entry="0.6")]
    if installed:
        rows.append(made_up(targets.FLASH, 1.0, precision="bfloat16-8bit", ratio="2", mode="eager"))
    found = lines_of(rows)
    against = f"step, bfloat16, 8-bit states, 20 %: against {targets.FLASH}, or 0.79 ms without it"
    assert found[against] == (("2x", "yes") if installed else ("1.58x", "yes"))
    assert found["state, bfloat16-8bit, 20 %"] == ("0.6 bytes/entry", "**no**")


def test_targets_of_the_selection(gpu, lines_of):
    targets = gpu("targets")
    rows = [
        made_up("topk_delta (triton)", 0.8, **SELECTION, ratio="9"),
        made_up("topk_delta (compiled)", 0.7, **SELECTION, ratio="10", memory_per_entry="0.3"),
        made_up("select (compiled)", 0.84, **SELECTION, ratio="8"),
        made_up("topk_delta, histogram (compiled)", 1.4, **SELECTION, ratio="5"),
        made_up("topk_delta (compiled)", 0.1, **{**SELECTION, "kind": "untouched"}),
        made_up(targets.TOPK, 7.0, **SELECTION, ratio="1"),
        made_up(targets.CUB, 1.0, **SELECTION, ratio="6.25"),
        made_up(targets.KTHVALUE, 1400.0, **SELECTION),
        made_up("topk_delta (compiled)", 19.0, **{**SELECTION, "model": "7b", "precision": "bfloat16"}),
    ]
    scene = "topk_delta, float32, 20 %"
    launches = {
        (scene, "compiled"): 8 * [{"wait": "False"}] + [{"wait": "True"}],
        (scene, "triton"): 9 * [{"wait": "False"}],
    }
    found = lines_of(rows, launches=launches)
    assert found["selection, float32, 20 %"] == ("0.7 ms", "yes")
    assert found["selection, float32, 20 %: by histogram"] == ("1.4 ms", "**no**")
    assert found[f"selection, float32, 20 %: against {targets.TOPK}"] == ("10x", "yes")
    assert found[f"selection, float32, 20 %: against {targets.CUB}"] == ("1.6x", "**no**")
    assert found[f"selection, float32, 20 %: against {targets.KTHVALUE}"] == ("2000x", "yes")
    assert found["selection, float32, 20 %: temporary memory"] == ("0.3 bytes/entry", "**no**")
    assert found["ls.select, float32, 20 %: against topk_delta alone"] == ("1.2x", "yes")
    assert found["selection, 7B, bfloat16, 20 %"] == ("19 ms", "yes")
    assert found[f"{scene}: launches"] == ("8", "yes")


def test_targets_name_what_is_measured(gpu):
    targets, step, selection = gpu("targets"), gpu("step"), gpu("selection")
    import updates

    peers = [contestant.name for contestant in step.contestants(step.CORE[0], "peers")]
    assert {targets.FUSED, targets.MULTIPLIED, targets.GATHERED} <= {*peers} and targets.FLASH in updates.PACKAGES
    assert [name.split()[0] for name in updates.PACKAGES] == [*gpu("run").PEERS]
    names = [(targets.TOPK, selection.TOPK), (targets.CUB, selection.CUB_FLAT), (targets.KTHVALUE, selection.KTHVALUE)]
    assert all(a == b for a, b in names)
    ours = [c.name for op in (step, selection) for c in op.contestants(op.FIRST[0], "compiled")]
    prefixes = (targets.OURS, targets.SELECTED, targets.SELECT, targets.HISTOGRAM)
    assert [sum(name.startswith(prefix) for name in ours) for prefix in prefixes] == [1, 1, 1, 1]
    assert {*targets.FASTER} <= {cell.density for cell in step.CORE}
    operations = gpu("measure").OPERATIONS
    assert {op.CORE[0].op: op.BASELINE for op in operations} == gpu("report").BASELINES
    assert [*gpu("report").BASELINES] == ["step", "selection", "copy"]


@pytest.mark.slow
def test_the_report_is_made_again_with_plots(gpu, tmp_path):
    pytest.importorskip("matplotlib")
    rows, report = gpu("rows"), gpu("report")
    facts = {"device": "NVIDIA H200", "torch": "2.11.0", "commit": "abc", "time": "2026-01-01"}
    (tmp_path / "environment.json").write_text(json.dumps({**facts, "torchao": "skipped: not installed"}))
    columns = {"ratio": "4.0", "bytes": "3000000", "nodes": "2"}
    for row in (
        made_up("MaskedAdamW (triton)", 0.5, **columns),
        made_up("MaskedAdamW (triton)", 0.25, density="0.01"),
        made_up("torch AdamW(fused=True)", error="OutOfMemoryError: 3 | 4"),
        made_up("topk_delta (triton)", 0.75, **SELECTION),
    ):
        rows.append(tmp_path / "rows.csv", rows.MEASURED, {name: row[name] for name in row})
    floor = {"name": "copy", "n": 10, "p50_ms": 1.0, "bytes": 12_000_000}
    rows.append(tmp_path / "floors.csv", rows.FLOORS, floor)
    for number, (name, start) in enumerate((("prepare", 0.0), ("update", 7.0), ("old", 0.0), ("new", 5.0))):
        row = {"scene": "step", "backend": "triton", "number": number % 2, "name": name, "wait": False}
        gap = 2.0 if number % 2 else None
        rows.append(tmp_path / "launches.csv", rows.LAUNCHES, {**row, "start_us": start, "us": 5.0, "gap_us": gap})
    report.write(tmp_path, plots=True)
    text = (tmp_path / "report.md").read_text()
    row = "| 200 | 0.2 | float32 | uniform | MaskedAdamW (triton) | graph | 1980, 3201 | 0.5000 |  | 2 | 6 | 50 % |"
    assert f"{row}  | 4.00x |" in text
    assert "| no figures: OutOfMemoryError: 3 / 4 |" in text and "torchao skipped: not installed" in text
    assert "| step | triton | 2 | 0 | 10.0 | 100% | 2.0 | `old` |" in text, "of the last run alone"
    assert "| copy |  |  |  | 1.0000 | 12 |" in text and "commit abc" in text
    assert text.strip().splitlines()[-1] == "| topk_delta, float32, 20 %: waits | at most 1 | not measured | |"
    assert {path.name for path in tmp_path.glob("*.png")} == {"step.png", "selection.png"}
