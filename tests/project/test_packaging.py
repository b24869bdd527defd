"""The wheel holds everything and imports alone; imports point one way."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ltp_sparse"
KERNELS = ROOT / "kernels" / "ltp_kernels"

# In this order: a folder knows nothing of those behind it, not even in annotations.
ORDER = [
    *[
        "_moved",
        "_C",
        "kernels",
        "weights",
        "tickets",
        "backends",
        "ops",
        "deltas",
        "selection",
        "optim",
        "sync",
        "tasks",
        "prompting",
    ],
    *[
        "models",
        "methods",
        "training",
        "loading",
        "pretraining",
        "recipes",
        "report",
        "testing",
        "demo",
        "cli",
        "__main__",
    ],
]
PLACE = {part: place for place, part in enumerate(ORDER)}

HEAVY = ["transformers", "datasets", "accelerate", "matplotlib"]
LIGHT = [  # must import without any of HEAVY
    *["weights", "tickets", "backends", "ops", "deltas", "selection", "optim", "sync", "tasks", "prompting"],
    *["models", "loading", "report", "testing", "cli"],
]


def sources() -> dict[str, Path]:
    """Path inside the wheel -> file of the tree, code and data."""
    found = {}
    for folder, target in ((PACKAGE, "ltp_sparse"), (KERNELS, "ltp_sparse/kernels")):
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"):
                found[f"{target}/{path.relative_to(folder)}"] = path
    return found


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path, module: str) -> set[str]:
    """Absolute names of all that a file imports, at any depth, for type checkers too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        pending += ast.iter_child_nodes(node)
    return found


def parts(names: set[str]) -> set[str]:
    """The first names inside ltp_sparse among absolute names: "ltp_sparse.optim.x" -> "optim"."""
    return {name.split(".")[1] for name in names if name.startswith("ltp_sparse.")}


def build(call: str, tree: Path, **environment: str) -> None:
    code = f"from setuptools import build_meta; build_meta.{call}"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, source_tree) -> Path:
    """What an sdist of a copy of the tree, without the extension, unpacks to."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "kernels", "ltp_sparse"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    build(f"build_sdist({str(out)!r})", tree, LTP_SPARSE_EXT="off")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, built from the sdist without an extension: what an install without a compiler gives."""
    out = tmp_path_factory.mktemp("wheel")
    build(f"build_wheel({str(out)!r})", sdist, LTP_SPARSE_EXT="off")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(unpacked: Path, code: str) -> str:
    """Standard output of `code` where only the unpacked wheel and its dependencies can be imported.

    -S leaves out the .pth files, through which an editable install of the tree would fill gaps of the wheel.
    """
    setup = f"import sys; sys.path[:0] = [{str(unpacked)!r}]; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", setup + code], capture_output=True, text=True, cwd=unpacked
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_sdist_holds_all_that_the_extensions_are_built_from(sdist):
    def csrc(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in (root / "csrc").rglob("*") if path.is_file()}

    assert csrc(sdist) == csrc(ROOT), "list the kind of file in MANIFEST.in"


@pytest.mark.slow
@pytest.mark.parametrize(("module", "needs"), [("_C", "c++"), ("_C_cuda", "nvcc")])
def test_extensions_built_from_the_sdist_import(sdist, tmp_path, module, needs):
    """Unoptimised, and as PTX alone, for speed: what is compiled, linked and imported is the same."""
    if shutil.which(needs) is None:
        pytest.skip(f"{needs} is not on the PATH")
    tree = tmp_path / "tree"
    shutil.copytree(sdist, tree)
    setup = (tree / "setup.py").read_text()
    setup = setup.replace('"-O3"', '"-O0"')
    if (
        needs == "nvcc"
        and "--Ofast-compile" in subprocess.run([needs, "--help"], capture_output=True, text=True).stdout
    ):
        setup = setup.replace('"--fmad=false"', '"--fmad=false", "--Ofast-compile=max"')
        setup = setup.replace(",code=sm_", ",code=compute_")
    (tree / "setup.py").write_text(setup)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    wanted = {"LTP_SPARSE_EXT": "cpu" if module == "_C" else "cuda-only", "LTP_SPARSE_CUDA_ARCH": "90"}
    environment = {**os.environ, **wanted}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    code = f"import {module}; print({module}.__doc__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree / "ltp_sparse", capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "wanted"), [("*.cu", "cuda"), ("*.cpp", "cpu")])
def test_a_build_without_its_sources_fails(sdist, tmp_path, pattern, wanted):
    if wanted == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("no CUDA toolkit: nvcc is not on the PATH")
    shutil.copytree(sdist, tmp_path / "tree", ignore=shutil.ignore_patterns(pattern))
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    environment = {**os.environ, "LTP_SPARSE_EXT": wanted}
    run = subprocess.run(command, cwd=tmp_path / "tree", env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "these sources are not complete" in run.stderr


@pytest.mark.slow
def test_a_module_with_an_undefined_symbol_fails_the_build(sdist, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    shutil.copytree(sdist, tmp_path / "tree")
    for path in (tmp_path / "tree" / "csrc" / "cpu").glob("*.cpp"):
        path.write_text("")
    (tmp_path / "tree" / "csrc" / "bindings.cpp").write_text(
        '#include <Python.h>\nextern "C" PyObject* missing();\nPyMODINIT_FUNC PyInit__C(void) { return missing(); }\n'
    )
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "LTP_SPARSE_EXT": "cpu"}
    run = subprocess.run(command, cwd=tmp_path / "tree", env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "was built and cannot be imported" in run.stdout + run.stderr
    assert "missing" in run.stdout + run.stderr
    assert not list((tmp_path / "tree").rglob("_C*.so"))


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_tree(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert sorted(set(sources()) - inside) == [], "list the package, or its data, in pyproject.toml"


@pytest.mark.slow
def test_wheel_has_one_top_level_package(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ltp_sparse"}


@pytest.mark.parametrize("path", ["kernels/__init__.py", "tests/__init__.py", "conftest.py"])
def test_no_file_puts_the_root_on_the_path(path):
    assert not (ROOT / path).exists()


def test_the_root_has_no_scripts():
    assert {path.name for path in ROOT.glob("*.py")} == {"setup.py"}


@pytest.mark.slow
def test_every_module_of_the_wheel_imports(wheel, unpacked):
    if any(importlib.util.find_spec(name) is None for name in ("triton", *HEAVY)):
        pytest.skip("needs the extras train and triton, to import what depends on them")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py") and not n.endswith("__main__.py")]
    modules = sorted(module_name(name) for name in names)
    code = f"""
import importlib, traceback
for module in {modules!r}:
    try:
        found = importlib.import_module(module)
        assert found.__file__.startswith({str(unpacked)!r}), found.__file__
    except BaseException:
        print(module, traceback.format_exc())
"""
    assert python(unpacked, code) == ""
    assert "ltp_sparse.kernels" in modules and "ltp_sparse.optim" in modules


@pytest.mark.slow
def test_core_modules_need_no_training_libraries(unpacked):
    code = f"""
import importlib, json
for module in {LIGHT!r}:
    importlib.import_module("ltp_sparse." + module)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}} & {set(HEAVY)!r})))
"""
    assert json.loads(python(unpacked, code)) == []


@pytest.mark.slow
def test_importing_does_no_work(unpacked):
    code = """
import random, numpy, torch, contextlib, io
def state():
    return [
        random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.get_num_threads(), torch.get_default_dtype(), torch.cuda.is_initialized(),
    ]
before = state()
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    import ltp_sparse, ltp_sparse.testing, ltp_sparse.cli
assert out.getvalue() == "", out.getvalue()
assert state() == before
"""
    python(unpacked, code)


@pytest.mark.slow
def test_without_an_extension_the_table_says_so(unpacked):
    printed = python(unpacked, "import runpy; runpy.run_module('ltp_sparse', run_name='__main__')")
    assert "ltp_sparse._C is not built" in printed
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert lines["reference"].endswith("<- used")


@pytest.mark.slow
def test_the_command_is_there(wheel, unpacked):
    entry_points = next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
    assert "ltp-sparse = ltp_sparse.cli:main" in entry_points
    code = """
from ltp_sparse.cli import main
sys.argv = ["ltp-sparse", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert "select" in python(unpacked, code)


@pytest.mark.slow
def test_wheel_has_the_version_of_the_package(wheel):
    import ltp_sparse

    assert wheel.name.split("-")[1] == ltp_sparse.__version__


def test_one_version():
    """The package's, that to cite, and the last of the changelog."""
    import ltp_sparse

    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    changed = re.search(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert cited and changed and cited[1] == changed[1] == ltp_sparse.__version__


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str, pattern: str) -> dict[str, str]:
    """Normal name of a package -> version."""
    return {normal(name): version for name, version in re.findall(pattern, (ROOT / file).read_text(), re.M)}


def test_every_pin_has_hashes():
    """`make hashes` was run after the last change of constraints.txt."""
    hashed = pins("constraints-hashes.txt", r"^([\w.-]+)==(\S+) \\\n +--hash=sha256:")
    assert hashed and hashed == pins("constraints.txt", r"^([\w.-]+)==(\S+)$")


def test_all_that_extras_bring_is_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {normal(re.match(r"[\w.-]+", need)[0]) for extra in extras.values() for need in extra}
    assert wanted <= {*pins("constraints.txt", r"^([\w.-]+)==(\S+)$")}


@pytest.mark.usefixtures("source_tree")
def test_one_door_to_compiled_code():
    users = {
        name
        for name, path in sources().items()
        if name.endswith(".py")
        and not name.startswith("ltp_sparse/kernels/")
        and parts(imports(path, module_name(name))) & {"_C", "_C_cuda", "kernels"}
    }
    assert users == {f"ltp_sparse/backends/{name}.py" for name in ("compiled", "cuda", "triton")}


@pytest.mark.usefixtures("source_tree")
def test_kernels_import_nothing_of_ours():
    for name, path in sources().items():
        if name.startswith("ltp_sparse/kernels/") and path.suffix == ".py":
            assert parts(imports(path, module_name(name))) <= {"kernels"}, name


@pytest.mark.usefixtures("source_tree")
def test_imports_point_one_way():
    wrong = []
    for name, path in sources().items():
        if path.suffix != ".py" or name in ("ltp_sparse/__init__.py",):
            continue
        part = module_name(name).split(".")[1]
        assert part in PLACE, f"{name} has no place: add it to ORDER"
        known = parts(imports(path, module_name(name))) & set(PLACE)
        wrong += [f"{name} imports {used}" for used in known if PLACE[used] > PLACE[part]]
    assert wrong == []
