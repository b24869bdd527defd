"""Checks of options, before a command does anything."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """A mistake in the options. `main` puts the name of the command in front of its message."""


def shown(options: argparse.Namespace, name: str) -> str:
    """An option as users know it: "--max-steps", or "FOLDER" for one without a flag."""
    return name.upper() if name in options.positional else f"--{name.replace('_', '-')}"


def values_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Option -> its value, for a function whose arguments have the names of options."""
    return {name: getattr(options, name) for name in names}


def given_of(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """`values_of` for those of the options that are given."""
    return {name: value for name, value in values_of(options, *names).items() if value is not None}


def need(options: argparse.Namespace, *names: str) -> None:
    """Raises CommandError for required options that are given by neither flags nor the file."""
    for name in names:
        if getattr(options, name) in (None, []):
            raise CommandError(f"{shown(options, name)} is needed; see ltp-sparse {options.command} --help")


def refuse(options: argparse.Namespace, *names: str, why: str) -> None:
    """Raises CommandError if one of these options is given, e.g. "--dev is for your own data"."""
    for name in names:
        value = getattr(options, name, None)
        if value is not None and value is not False:
            raise CommandError(f"{shown(options, name)} {why}")


def check_writable(path: Path | None, *, folder: bool = False, option: str = "--output") -> None:
    """Raises CommandError if a file, or files in a folder, cannot be written. Call it before hours of work."""
    from ltp_sparse.weights import files

    if path is None:
        return
    if os.path.isdir(path) != folder and os.path.exists(path):
        raise CommandError(f"{option} must be a {'folder' if folder else 'file'}, but {path} is not")
    try:
        files.check_writable(path, folder=folder)
    except OSError as error:
        why = (error.strerror or str(error)).removeprefix("cannot be written: ")
        raise CommandError(f"{option} {path} cannot be written: {why}") from error


def check_plot(path: Path | None) -> None:
    """`check_writable` for --plot, whose ending is the format of the picture."""
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in {"", *known}:
        raise CommandError(f"--plot must end in .{', .'.join(known)}, got {path}")
    check_writable(path, option="--plot")


def check_apart(options: argparse.Namespace) -> None:
    """Raises CommandError if a file to write is one of the files to read."""
    for name in ("output", "plot"):
        target = getattr(options, name, None)
        if target is None or not os.path.isfile(target):
            continue
        for other, value in vars(options).items():
            for path in value if isinstance(value, list) else [value]:
                is_file = isinstance(path, str | Path) and os.path.isfile(path)
                if other != name and is_file and os.path.samefile(path, target):
                    raise CommandError(
                        f"{shown(options, name)} {target} is also {shown(options, other)}, which would be overwritten; "
                        "choose another name"
                    )


def check_starts_anew(folder: Path, option: str) -> None:
    """Raises CommandError if a folder has checkpoints of an interrupted run, which a new run would remove."""
    if any(folder.rglob("checkpoint-*")):
        raise CommandError(
            f"{folder} has checkpoints of an interrupted run; pass --resume to continue, or another {option}"
        )
