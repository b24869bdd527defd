"""Where tests lie, and what they may share: helpers lie in tests/helpers, and no test file imports another."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
OTHER_FOLDERS = {"benchmarks", "helpers", "project", "ptx"}


@pytest.mark.usefixtures("source_tree")
def test_folders_are_named_as_the_package_s():
    folders = {path.parent.name for path in FILES} - {TESTS.name} - OTHER_FOLDERS
    package = {path.name for path in (TESTS.parent / "ltp_sparse").iterdir() if path.is_dir()}
    assert folders <= package
    assert not list(TESTS.glob("test_*.py"))
    assert not any(path.name.startswith("test_") for path in (TESTS / "helpers").iterdir())


def test_no_two_test_files_have_one_name():
    """They are imported by it, whatever their folder."""
    counts = Counter(path.stem for path in FILES if path.stem.startswith("test_"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_test_file_imports_another():
    """Not in the scripts that tests run, either."""
    wrong = []
    for path in FILES:
        text = path.read_text()
        found = re.findall(r"^[ \t]*(?:import|from) ((?:test_|conftest)\w*)", text, flags=re.M)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append(node.module or "")
        wrong += [f"{path.relative_to(TESTS)}: {name}" for name in found if re.match(r"test_|conftest", name)]
    assert wrong == []
