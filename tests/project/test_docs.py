"""The documents are true: links, names and paths exist, snippets run and print what the page says."""

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
CODE = ("ltp_sparse", "kernels", "benchmarks", "examples", "csrc")
ABSENT = {"kernels/__init__.py"}  # what is named because it must not exist


def files(folder: str, *suffixes: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


PAGES = [*ROOT.glob("*.md"), *(page for folder in ("docs", *CODE) for page in files(folder, ".md"))]
SOURCES = [path for folder in CODE for path in files(folder, ".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".yaml")]
SOURCES = [path for path in SOURCES if path.name != "_moved.py"]  # which is there to know old names
TESTS = files("tests", ".py", ".cpp")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def wrong(paths: list[Path], found) -> dict[str, list[str]]:
    """File -> what `found` finds in its text, for the files in which there is something."""
    each = {str(path.relative_to(ROOT)): sorted(set(found(read(path)))) for path in paths}
    return {name: faults for name, faults in each.items() if faults}


def prose(page: Path) -> str:
    """A page without what stands between fences."""
    return re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    bare = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in bare}


@pytest.mark.usefixtures("source_tree")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def module_of(parts: list[str]) -> ModuleType | None:
    """The module with this name, if a file of the tree has it."""
    folder = ROOT.joinpath("kernels", "ltp_kernels", *parts[2:]) if parts[1:2] == ["kernels"] else ROOT.joinpath(*parts)
    there = (
        folder.with_suffix(".py").exists() or folder.with_suffix(".pyi").exists() or (folder / "__init__.py").exists()
    )
    return importlib.import_module(".".join(parts)) if there else None


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    end = next(end for end in range(len(parts), 0, -1) if module_of(parts[:end]))
    found = module_of(parts[:end])
    for name in parts[end:]:
        found = getattr(found, name, None)
        if found is None or isinstance(found, ModuleType):  # modules are found as files, by the names they have now
            return False
    return True


@pytest.mark.usefixtures("source_tree")
def test_dotted_names_resolve():
    """`ltp_sparse.x.y` in documents, docstrings, comments and messages."""

    def unknown(text):
        names = set(re.findall(r"(?<![\w./{])ltp_sparse(?:\.[A-Za-z_]\w*)+", text))
        built = ("ltp_sparse._C", "ltp_sparse._C_cuda")  # not everywhere
        return [name for name in names if not name.startswith(built) and not resolves(name)]

    assert wrong([*PAGES, *SOURCES], unknown) == {}


@pytest.mark.usefixtures("source_tree")
def test_paths_exist():
    """Paths from the root, or from the package, in documents, docstrings and messages; `*` matches as in a shell."""
    rooms = [path.name for path in (ROOT / "ltp_sparse").iterdir() if (path / "__init__.py").exists()]
    folders, kinds = "|".join(["docs", "tests", *CODE, *rooms]), "py|md|csv|png|svg|yaml|json|cpp|h|cuh?"

    def missing(text):
        found = set(re.findall(rf"(?<![\w./<-])(?:{folders})/[\w.*/-]*\w\.(?:{kinds})\b", text))
        return [
            path for path in found - ABSENT if not any(list(root.glob(path)) for root in (ROOT, ROOT / "ltp_sparse"))
        ]

    assert wrong([*PAGES, *SOURCES], missing) == {}


def test_only_documents_of_the_repository_are_cited():
    contracts, traps = (
        set(re.findall(pattern, read(ROOT / "docs" / page), flags=re.M))
        for page, pattern in (("contracts.md", r"^## (\d+)\."), ("papers.md", r"^(\d+)\. \*\*"))
    )

    def unknown(text):
        elsewhere = re.findall(r"\b(?:DESIGN|METHODS|PERFORMANCE|PEERS|STYLE)\b(?: section)? \d[\d.]*", text)
        numbers = re.findall(r"\bcontracts? (\d+)", text, flags=re.I), re.findall(r"\btraps? (\d+)", text, flags=re.I)
        return [*elsewhere, *(set(numbers[0]) - contracts), *(set(numbers[1]) - traps)]

    assert wrong([*PAGES, *SOURCES, *TESTS], unknown) == {}


def test_the_tests_that_documents_name_exist():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", read(page))}
    there = {name for path in TESTS for name in re.findall(r"def (test_\w+)", read(path))}
    assert named - there == set() and len(named) > 40


# --- snippets ---

WITH_SNIPPETS = ["README.md", "docs/own-loop.md", "docs/decoder.md", "docs/serving.md"]


def shape(text: str) -> str:
    """What is printed, without the numbers: those of a training run differ in the last bits between processors."""
    return re.sub(r"\d[\d,.]*", "0", text)


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    if page == "docs/decoder.md":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names, printed, compared = {}, "", 0
    for kind, body in re.findall(r"^```(python|text)\n(.*?)^```", read(ROOT / page), flags=re.M | re.S):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, page, "exec"), names)
            printed = "".join(line for line in out.getvalue().splitlines(True) if not line.startswith("{"))  # logs
        else:
            same = str if page == "README.md" else shape
            assert same(printed) == same(body)
            compared += 1
    assert compared


@pytest.mark.slow
def test_the_sharded_tutorial_runs_on_two_ranks(tmp_path):
    pytest.importorskip("transformers")
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", read(ROOT / "docs/sharded.md"), flags=re.M | re.S)
    script, said = ("".join(body for kind, body in blocks if kind == wanted) for wanted in ("python", "text"))
    (tmp_path / "tune.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tune.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert shape(run.stdout) == shape(said)


# --- README and site ---


def test_the_readme_is_short():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 950


def test_the_picture_shows_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("picture", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    picture = importlib.import_module("picture")
    rows = picture.read(ROOT / "benchmarks" / "results" / "cpu")
    assert read(picture.PICTURE) == picture.draw(rows), "run `python benchmarks/picture.py`"


@pytest.mark.usefixtures("source_tree")
def test_every_page_is_in_the_site():
    listed = set(re.findall(r": (\S+\.md)$", read(ROOT / "mkdocs.yml"), flags=re.M))
    assert listed == {str(page.relative_to(ROOT)) for page in PAGES}


@pytest.mark.usefixtures("source_tree")
def test_the_stub_has_the_names_of_the_compiled_module():
    module = pytest.importorskip("ltp_sparse._C")
    stubs = set(re.findall(r"^def (\w+)", read(ROOT / "ltp_sparse" / "_C.pyi"), flags=re.M))
    assert stubs == {name for name in dir(module) if not name.startswith("_")}
