"""What tests of the GPU suite share."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """Imports a module of benchmarks/gpu by name; `report` and `run` are modules of benchmarks, too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")
    others = {name: sys.modules.pop(name) for name in ("report", "run") if name in sys.modules}
    yield importlib.import_module
    for name in ("report", "run"):
        sys.modules.pop(name, None)
    sys.modules.update(others)
