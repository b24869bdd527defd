"""The Hub: tickets, deltas and exported models as its repositories. This module does not import torch.

A repository holds `ticket.safetensors`, `delta.safetensors` or an exported model, and a card. Its address is owner/name
or owner/name@revision. Uploads and downloads return the address with the hash of the commit.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from ltp_sparse.weights.card import write_up
from ltp_sparse.weights.reading import FileFormatError

if TYPE_CHECKING:
    from typing import Self

EXPORT = "exported model"
HELD = {
    "ticket": ("ticket.safetensors",),
    "delta": ("delta.safetensors",),
    EXPORT: ("config.json", "predict.py"),
    "SHiRA adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "LT-SFT delta": ("pytorch_diff.bin",),
}
"""Kind of a folder or repository -> the files by which it is recognised."""

_ADDRESS = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_PATIENCE = 3.0  # seconds for the Hub to answer


def hub_answers() -> bool:
    """Whether the Hub can be reached. It is tried in a thread, because a name lookup has no time limit."""
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # a proxy can possibly reach it
        return True
    where, answers = urlsplit(constants.ENDPOINT), []

    def connect() -> None:
        port = where.port or (80 if where.scheme == "http" else 443)
        with suppress(OSError), socket.create_connection((where.hostname, port), timeout=_PATIENCE):
            answers.append(True)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)


def split_address(address: str, revision: str | None = None) -> tuple[str, str | None]:
    """(repository, revision) of an address.

    Args:
        address: owner/name or owner/name@revision.
        revision: a revision that is given separately.

    Raises:
        ValueError: it is no address, or there are two different revisions.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(f"expected a repository of the Hub, owner/name or owner/name@revision, got {address!r}")
    if revision is not None and found[2] not in (None, revision):
        raise ValueError(f"two revisions: {address!r} and {revision!r}; pass one of them")
    return found[1], revision or found[2]


def kind_held(names: Iterable[str], where: str | os.PathLike[str]) -> str:
    """The kind of a folder or repository, see `HELD`.

    Args:
        names: paths of all files of a folder or repository.
        where: the folder or address, for messages.

    Raises:
        FileFormatError: it is none of these kinds, or several.
    """
    names = set(names)
    whole = names | {name.removesuffix(".index.json") for name in names}  # shards are known by their index
    kinds = [kind for kind, files in HELD.items() if whole.issuperset(files)]
    if len(kinds) == 1:
        return kinds[0]
    known = ", ".join(f"{kind} ({' and '.join(files)})" for kind, files in HELD.items())
    holds = ", ".join(sorted(names)[:4]) or "nothing"
    problem = f"it holds {' and '.join(kinds)}; keep one" if kinds else f"expected one of {known}; it holds {holds}"
    raise FileFormatError(where, problem)


def files_in(folder: Path) -> list[str]:
    """The paths of all files in a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def download(address: str, revision: str | None = None) -> tuple[Path, str]:
    """Downloads a repository into the cache of the Hub, or finds it there if the Hub cannot be reached.

    Args:
        address: owner/name or owner/name@revision.
        revision: a branch, a tag or the hash of a commit. Default: that of the address, else main.

    Returns:
        The folder, and the address with the hash of its commit.

    Raises:
        FileNotFoundError: there is no such repository or revision, or it is not in the cache and the Hub does not
            answer.
        FileFormatError: the repository is of no kind in `HELD`; nothing was downloaded.
        OSError: the Hub refuses, or the download is damaged.
    """
    name, revision = split_address(address, revision)
    from huggingface_hub import HfApi, snapshot_download

    with _told(name, revision):
        there = hub_answers()
        if there:
            found = HfApi().model_info(name, revision=revision)
            kind_held((file.rfilename for file in found.siblings or ()), f"{name}@{found.sha}")
        folder = Path(snapshot_download(name, revision=revision, local_files_only=not there))
    return folder, f"{name}@{folder.name}"


def upload(name: str, files: Mapping[str, Path | bytes], *, message: str, private: bool = False) -> str:
    """Writes files into a repository in one commit. Creates the repository if it is missing.

    Args:
        name: owner/name.
        files: path in the repository -> content, or the file with it.
        message: the message of the commit.
        private: whether a new repository is private.

    Returns:
        The address with the hash of the commit.

    Raises:
        FileFormatError: the repository holds something else; nothing was written.
        OSError: the Hub cannot be reached or refuses, e.g. without a token.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    name, revision = split_address(name)
    if revision is not None:
        raise ValueError(f"expected a repository to write to, owner/name, got {name}@{revision}")
    kind = kind_held(files, name)
    with _told(name, None):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        before = api.model_info(name)
        others = [file.rfilename for file in before.siblings or () if file.rfilename != ".gitattributes"]
        if others and (held := kind_held(others, name)) != kind:
            raise FileFormatError(name, f"it holds a {held}; push the {kind} to a repository of its own")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = api.create_commit(name, operations, commit_message=message, parent_commit=before.sha)
    return f"{name}@{commit.oid}"


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Turns errors of huggingface_hub into errors of one line that say what was wanted, where, and what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except FileFormatError:
        raise
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: it has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such repository on {constants.ENDPOINT}, or your token cannot read it (hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        at = "" if revision is None else f" at {revision}"
        raise FileNotFoundError(
            f"{name}{at}: not completely in the cache, and {constants.ENDPOINT} does not answer"
        ) from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(f"{name}: error of the Hub at {constants.ENDPOINT}: {reason}") from error


class OnHub:
    """Base class of tickets and deltas, which can be files or repositories of the Hub."""

    _kind: ClassVar[str]
    metadata: dict[str, Any]
    save: Callable[..., None]
    load: Callable[..., Any]

    def push_to_hub(
        self,
        name: str,
        *,
        base: str | None = None,
        data: str | None = None,
        scores: Iterable[Mapping[str, Any]] = (),
        private: bool = False,
    ) -> str:
        """Uploads it with a card to a repository of the Hub, which is created if it is missing.

        Args:
            name: the repository, owner/name.
            base: Hub name of the base model, for the card; owner/name@revision pins it.
            data: the data of selection or training, for the card.
            scores: rows of `evaluate`, for the card.
            private: whether a new repository is private.

        Returns:
            The address with the hash of the commit, which `ltp_sparse.load` accepts.

        Raises:
            FileFormatError: the repository holds something else.
            OSError: the Hub cannot be reached or refuses, e.g. without a token.
        """
        ticket: Any = getattr(self, "ticket", self)
        active = f"{ticket.k:,} of {ticket.n:,} entries ({ticket.density:.4g} of them)"
        card = write_up(self._kind, name, active=active, base=base, data=data, scores=scores, metadata=self.metadata)
        (file,) = HELD[self._kind]
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder, file))
            written = {path.name: path for path in Path(folder).iterdir()}  # one file, or shards and their index
            return upload(name, {**written, "README.md": card.encode()}, message=f"A {self._kind}", private=private)

    @classmethod
    def from_hub(cls, address: str, *, revision: str | None = None) -> Self:
        """Downloads and verifies it. Its metadata has the address with the hash of the commit under "hub".

        Args:
            address: owner/name or owner/name@revision.
            revision: a branch, a tag or the hash of a commit.

        Raises:
            FileNotFoundError: there is no such repository or revision, or no copy of it without a network.
            FileFormatError: the repository holds something else, or the file is damaged.
        """
        return read_pinned(cls, *download(address, revision))


_Held = TypeVar("_Held", bound=OnHub)


def read_pinned(wanted: type[_Held], folder: Path, pinned: str) -> _Held:
    """The ticket or delta of a folder in the cache, with its address (see `download`) in the metadata."""
    if (held := kind_held(files_in(folder), pinned)) != wanted._kind:
        raise FileFormatError(pinned, f"expected a {wanted._kind}, but it holds a {held}")
    found = wanted.load(folder / HELD[held][0])
    found.metadata["hub"] = pinned
    return found
