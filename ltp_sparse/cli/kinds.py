"""The kind of a file or folder, to report a wrong one before torch is imported."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ltp_sparse.cli.checks import CommandError, shown
from ltp_sparse.tasks.files import suffix_of
from ltp_sparse.weights.locating import locate

_BELONGS = {
    "ticket": "pass it to --ticket of ltp-sparse train, or to ltp-sparse inspect or push",
    "delta": "pass it to ltp-sparse inspect or push",
    "file of weights": "pass it to --initial or --tuned of ltp-sparse select",
    "model": "pass it to --model",
    "run of ltp-sparse train": "pass it to ltp-sparse evaluate, predict, export or push",
    "folder of results": "pass it to ltp-sparse report",
    "table": "pass it to --train, --dev or --test, or to --text of ltp-sparse select",
    "text": "pass it to --text of ltp-sparse select; as a table it needs a header, such as text, and a name in .tsv",
    "YAML file": "pass a recipe to ltp-sparse run or report, and options to --config",
}
"""Kind -> the options and commands that accept it."""

_MADE_BY = {
    "ticket": "ltp-sparse select makes one",
    "run of ltp-sparse train": "ltp-sparse train makes one",
    "folder of results": "ltp-sparse run makes one",
}

_BY_CONTENT = {
    "run.json": "run of ltp-sparse train",
    "results.jsonl": "folder of results",
    "config.json": "model",
}

_BY_SUFFIX = {
    **dict.fromkeys(("tsv", "csv", "jsonl", "parquet"), "table"),
    **dict.fromkeys(("yaml", "yml"), "YAML file"),
    "txt": "text",
}


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The kind of a folder by its content, of a safetensors file by its header, and of other files by their names.

    It is None if the kind is unknown or the path does not exist.
    """
    from ltp_sparse.weights.file_shards import claimed_kind, index_of

    path = index_of(path) or Path(path)
    if path.is_dir():
        return next((kind for name, kind in _BY_CONTENT.items() if (path / name).is_file()), None)
    if not path.is_file():
        return None
    if (suffix := suffix_of(path)) in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    claimed = claimed_kind(path)
    return "file of weights" if claimed == "" else claimed if claimed in _BELONGS else None


def expect(options: argparse.Namespace, name: str, *kinds: str) -> None:
    """Raises a CommandError if the path in an option does not exist, or is known to be of another kind.

    Args:
        options: the options of the command.
        name: the name of an option, which can be absent.
        kinds: the accepted kinds. Paths of unknown kind are accepted, as their reader reports errors.
    """
    given = getattr(options, name)
    for path in given if isinstance(given, list) else [given]:
        if path is None:
            continue
        found, wanted = kind_of(path), " or a ".join(kinds)
        where = shown(options, name)
        made = "; " + _MADE_BY[kinds[0]] if kinds[0] in _MADE_BY else ""
        if found is not None and found not in kinds:
            raise CommandError(f"{where} expects a {wanted}, but {path} is a {found}: {_BELONGS[found]}{made}")
        if found is None and not os.path.exists(path):
            raise CommandError(f"{where} {path}: no such file or folder; expected a {wanted}{made}")


def expect_source(options: argparse.Namespace, name: str) -> None:
    """`expect` for labelled data, which can also be a data set of the Hub or a folder with one."""
    given = getattr(options, name)
    if given is not None and (os.path.isfile(given) or kind_of(given) is not None):
        expect(options, name, "table")


def expect_model(options: argparse.Namespace) -> None:
    """`expect` for --model and --tokenizer. A name must be on the Hub or in its cache."""
    for name in ("model", "tokenizer"):
        given = getattr(options, name, None)
        if given is not None and os.path.exists(given):
            expect(options, name, "model")
        elif given is not None:
            try:
                locate(given)
            except ValueError as error:
                raise CommandError(f"--{name}: {error}") from None
