"""Finds a model in the package, in a folder, in the cache of the Hub or on the Hub, without importing torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from ltp_sparse.weights.hub import hub_answers
from ltp_sparse.weights.reading import closest

MINI_XLMR = "mini-xlmr"
"""Name of the small model that the package ships; its card is `ltp_sparse/mini_xlmr/README.md`."""

SIZES = {"xlm-roberta-base": (768, 12, 12, 3072), "xlm-roberta-large": (1024, 24, 16, 4096)}
"""Hidden size, layers, heads and inner size of XLM-R, for estimates without a download."""

_SHIPPED = {MINI_XLMR: Path(__file__).parents[1] / "mini_xlmr"}
_KNOWN = (MINI_XLMR, *SIZES, "FacebookAI/xlm-roberta-base")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(name_or_path: str | os.PathLike[str]) -> tuple[str, bool]:
    """(source for `from_pretrained`, whether it is local).

    A mistyped folder never causes a download, and a name that cannot be downloaded is an error at once.

    Args:
        name_or_path: a folder, the name of a model of this package, or a Hub name.

    Raises:
        ValueError: there is no such folder, or the name is neither a folder nor in the cache of the Hub, and the Hub
            cannot be reached.
    """
    text = os.path.expanduser(os.fspath(name_or_path))
    if text in _SHIPPED:
        return os.fspath(_SHIPPED[text]), True
    path = Path(text)
    if path.is_dir():
        return text, True
    if path.exists():
        raise ValueError(f"expected the folder of a model or a Hub name ('owner/name'), got the file {text!r}")
    if isinstance(name_or_path, os.PathLike) or text.startswith((".", os.sep)) or not _HUB_NAME.fullmatch(text):
        raise ValueError(
            f"expected the folder of a model or a Hub name ('owner/name'), got {text!r}, which does not exist; "
            f"{_closest(text)}"
        )
    if hub_answers():
        return text, False
    if _is_cached(text):
        return text, True
    raise ValueError(
        f"no model {text!r}: there is no such folder, it has not been downloaded before, and the Hub cannot be "
        f"reached; {_closest(text)}"
    )


def _closest(text: str) -> str:
    """The closest names: of known models, and of folders with models next to the given path."""
    if text in _KNOWN:
        return f"{MINI_XLMR}, a small model, comes with the package"
    names = list(_KNOWN)
    with suppress(OSError), os.scandir(Path(text).parent) as entries:
        names += [str(Path(text).parent / e.name) for e in entries if os.path.isfile(os.path.join(e, "config.json"))]
    return f"closest: {closest(text, names, 2)}"


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
