"""Hook of mkdocs: the site has the repository's folders, so that links work in both places."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

FOLDERS = ("docs", "benchmarks", "examples", "kernels", "ltp_sparse/mini_xlmr")
SUFFIXES = {".md", ".png", ".svg", ".csv", ".py"}


def on_config(config: Any) -> Any:
    """Copies all documents and linked files into build/docs, and builds from there."""
    root = Path(config.config_file_path).parent
    target = root / "build" / "docs"
    shutil.rmtree(target, ignore_errors=True)
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in [*root.glob("*.md"), root / "LICENSE", *found]:
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    config.docs_dir = str(target)
    return config
