"""`load`: loads a ticket, a delta or an exported model from a file, a folder or the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.deltas.lt_sft import read_lt_sft
from ltp_sparse.deltas.shira import read_shira
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.file_shards import claimed_kind, index_of
from ltp_sparse.weights.hub import EXPORT, HELD, download, files_in, kind_held, read_pinned
from ltp_sparse.weights.reading import FileFormatError

if TYPE_CHECKING:
    from transformers import Pipeline

_READERS = {"SHiRA adapter": read_shira, "LT-SFT delta": read_lt_sft}


def load(
    source: str | os.PathLike[str], *, revision: str | None = None, model: nn.Module | None = None
) -> Ticket | SparseDelta | Pipeline:
    """Loads a ticket, a delta or an exported model.

    Args:
        source: a file, a folder (an export, a SHiRA adapter of PEFT, an LT-SFT delta), or a repository of the Hub with
            one of these, as owner/name or owner/name@revision. Repositories in the cache need no network.
        revision: a branch, a tag or the hash of a commit of the repository.
        model: the base model at its initial weights, for adapters and LT-SFT deltas, which have differences only.

    Returns:
        `Ticket` or `SparseDelta`, with address and commit in `metadata["hub"]` if it is from the Hub. For an exported
        model, a text-classification pipeline of transformers, with the commit in `model.config._commit_hash`. No code
        of a repository is run.

    Raises:
        FileNotFoundError: there is no such file, folder, repository or revision.
        FileFormatError: the file or folder is damaged, or of another kind.
        ValueError: `model` is missing, or `revision` is given with a file or folder.
    """
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        path = index_of(path) or path
    if path.exists() and revision is not None:
        raise ValueError(
            f"{source}: it is a local file or folder, which has no revision {revision!r}; leave revision= out"
        )
    if path.is_file():
        return (SparseDelta if claimed_kind(path) == "delta" else Ticket).load(path)
    pinned = None
    if path.is_dir():
        folder = path
    elif isinstance(source, os.PathLike) or source.startswith((".", os.sep, "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder, and no repository of the Hub (owner/name)")
    else:
        folder, pinned = download(source, revision)
    return _held_in(folder, pinned, model)


def _held_in(folder: Path, pinned: str | None, model: nn.Module | None) -> Ticket | SparseDelta | Pipeline:
    """The content of a folder. `pinned`: the address from which it was downloaded."""
    where = pinned or folder
    kind = kind_held(files_in(folder), where)
    if kind == EXPORT:
        return _pipeline(folder, pinned)
    if kind in _READERS:
        if model is None:
            raise ValueError(f"{where}: this {kind} has differences only; pass its base model, model=")
        found = _READERS[kind](folder, model)
    elif pinned is not None:
        return read_pinned(Ticket if kind == "ticket" else SparseDelta, folder, pinned)
    else:
        return load(folder / HELD[kind][0])
    if pinned is not None:
        found.metadata["hub"] = pinned
    return found


def _pipeline(folder: Path, pinned: str | None) -> Pipeline:
    from ltp_sparse.training import standalone

    try:
        found = standalone.load(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(pinned or folder, f"its exported model cannot be loaded: {reason}") from error
    if pinned is not None:
        found.model.config._commit_hash = pinned.partition("@")[2]
    return found
