"""Modules are found by the names that they had before the rooms moved."""

import importlib
import subprocess
import sys

import pytest

import ltp_sparse as ls
from ltp_sparse._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_by_its_old_name(old):
    parts = [importlib.import_module(f"ltp_sparse.{part}") for part in MOVED[old]]
    found = importlib.import_module(f"ltp_sparse.{old}")
    for part in parts:
        assert part.__spec__.name == part.__name__
        for name, value in vars(part).items():
            if getattr(value, "__module__", None) == part.__name__:
                assert getattr(found, name) is value, name
    assert len(parts) > 1 or found is parts[0]


@pytest.mark.slow
def test_old_names_as_programs_write_them():
    """In a process that has imported none of them by the new name; torch comes with the first that needs it."""
    code = """
import sys
import ltp_sparse as ls
assert "torch" not in sys.modules
assert ls.names.fingerprint.__module__ == "ltp_sparse.weights.digests"
import ltp_sparse.delta as delta
from ltp_sparse import files, reference, topk
from ltp_sparse.encoding import *
from ltp_sparse.encoding import IndexSet, TileTable, pack_bits
from ltp_sparse.generated.languages import LANGUAGES
from ltp_sparse.modules.adapters import Adapter
from ltp_sparse.topk import Layout, TensorSource, select_topk
from ltp_sparse.training.backbone import load_backbone
import ltp_sparse.models.adapters, ltp_sparse.modules.adapters
assert ltp_sparse.models.adapters is ltp_sparse.modules.adapters and delta.SparseDelta is ls.SparseDelta
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_never_was_is_none():
    with pytest.raises(AttributeError, match="has no attribute 'wheights'"):
        ls.wheights  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ltp_sparse.modules.nothing")
