"""Settings that hold for every test: no downloads, fixed seeds, one thread, poisoned memory, Triton without a GPU."""

import fcntl
import gc
import importlib.util
import os
import random
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch

# These are read once, when the libraries are imported, which the test modules do after this file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # more would only slow small models down; tests that need more: `helpers.backends.threads`

if importlib.util.find_spec("hypothesis"):  # the tests that `make gpu` runs do without
    from hypothesis import settings

    settings.register_profile("ltp_sparse", deadline=None, derandomize=True, database=None, print_blob=True)
    settings.load_profile("ltp_sparse")

SEED = 20_240_611


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports all test modules without garbage collections: none of their million objects is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the files with the slowest tests first, so that no process still has one when the others have finished."""
    longest: dict[Path, float] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        seconds = limit.args[0] if limit else 300 * (item.get_closest_marker("slow") is not None)
        longest[item.path] = max(seconds, longest.get(item.path, 0))
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(autouse=True, scope="module")
def _modules_are_no_garbage() -> None:
    """Excludes the million objects of imported modules from garbage collections; accelerate makes one in every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poisoned_scratch():
    """`torch.empty` and its relatives return NaN (floats) or the largest integer, so that unwritten output fails."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of its own for tests that make random inputs."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: LTP_SPARSE_DATA, or `shared/data` beside the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LTP_SPARSE_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"needs real data: {folder} is no folder; set LTP_SPARSE_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def source_tree() -> None:
    """For tests of the sources themselves: `tools/wheels.py` runs the others where there are none."""
    if not (Path(__file__).parents[1] / "ltp_sparse").is_dir():
        pytest.skip("is about the package's sources, and an installed wheel is tested")


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, make) -> a folder that `make` has filled, in the first process of a run that asked for this name."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def xlmr_tokenizer(shared_data):
    """The real one, of 250,002 pieces, which takes seconds to load."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "xlm_roberta_base")


@pytest.fixture(scope="module")
def tokenizer():
    from helpers.tiny_nli import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def compiled():
    """The compiled module, back on its own instruction set afterwards."""
    from ltp_sparse.backends.compiled import extension

    module = extension()
    if isinstance(module, str):
        pytest.skip(module)
    own = module.isa()
    yield module
    module.set_isa(own)


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a module of benchmarks/ by name; the compiled backend, which these time, serves all calls."""
    import ltp_sparse as ls

    if (reason := ls.available_backends()["compiled"]) != "ok":
        pytest.skip(reason)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    ls.use_backend("compiled")
    yield importlib.import_module
    ls.use_backend(None)
