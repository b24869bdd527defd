"""`ltp-sparse`: the command line. Every command takes flags or a YAML file; its `--help` has examples."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ltp_sparse.cli.checks import CommandError, check_apart
from ltp_sparse.cli.options import COMMANDS, Parser, flags_of

_HINTS_AFTER_INTERRUPT = {
    "select": "with --run-dir and --save-every, run the same command with --resume to continue",
    "train": "with --save-every, run the same command with --resume to continue",
    "run": "run the same command again to continue",
}
_EXTRA = (
    *("accelerate", "datasets", "filelock", "huggingface_hub", "jinja2", "markdown_it", "matplotlib"),
    *("pyarrow", "scipy", "transformers", "yaml"),
)
"""Packages that the extra `train` installs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        argv: the arguments without the name of the program; None: those of this process.

    Returns:
        0; 1 for a fault of the library or the machine, 2 for a mistake of the user, 130 after an interrupt, 141 if the
        reader of the output has ended. Errors are one line on stderr.
    """
    options, parser = None, None
    try:
        parser = Parser()
        if not (sys.argv[1:] if argv is None else argv):
            parser.parser.print_help()
            return 0
        options = parser.parse(argv)
        check_apart(options)
        with _warnings_as_notes():
            return int(options.run(options) or 0)
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ltp_sparse"):
            return _failed(error)
        wanted = '"ltp-sparse[train]"' if package in _EXTRA else package
        _report(error, f"{package} is not installed; pip install {wanted}")
        return 2
    except CommandError as error:
        return _refused(error, command=getattr(options, "command", None))
    except (ValueError, TypeError, OSError) as error:
        return _refused(error, {} if parser is None or options is None else flags_of(parser.commands[options.command]))
    except Exception as error:
        return _failed(error)
    except KeyboardInterrupt:
        _end_bars()
        hint = _HINTS_AFTER_INTERRUPT.get(getattr(options, "command", ""))
        print("ltp-sparse: stopped" + (f"; {hint}" if hint else ""), file=sys.stderr)
        return 130


def _refused(error: Exception, flags: Mapping[str, argparse.Action] | None = None, command: str | None = None) -> int:
    """Reports a mistake of the user in terms of flags, without the name of the function that found it."""
    message = _with_flags(str(error), flags or {})
    for name in {name for frame, _ in traceback.walk_tb(error.__traceback__) for name in _names(frame.f_code)}:
        message = message.removeprefix(f"{name}: ").replace(f": {name}: ", ": ")
    _report(error, message if command is None else f"{command}: {message}")
    return 2


def _with_flags(message: str, flags: Mapping[str, argparse.Action]) -> str:
    """A message of the library with flags of a command in place of arguments: `epochs=3` becomes `--epochs 3`."""
    for flag, action in flags.items():
        value = "=True" if action.nargs == 0 else r"=(?:(['\"]?)([\w.+-]*\w)\1)?"
        form = flag if action.nargs == 0 else lambda found, flag=flag: " ".join(filter(None, (flag, found[2])))
        message = re.sub(rf"(?<![\w.-]){action.dest}{value}(?![\w(])", form, message)
    return message


def _names(code: types.CodeType) -> tuple[str, ...]:
    """The prefixes to remove from messages of a function: its name and its class, but never a command."""
    return tuple(name for name in (code.co_qualname, code.co_qualname.partition(".")[0]) if name not in COMMANDS)


def _failed(error: Exception) -> int:
    """Reports a fault of the library, the machine or torch."""
    kind, message = type(error).__name__, str(error)
    if getattr(type(error), "__module__", "").startswith("ltp_sparse"):  # a backend that is not available
        return _refused(error)
    _report(error, f"{kind}: {message}" if message else kind, " (LTP_SPARSE_TRACEBACK=1 shows where)")
    return 1


def _report(error: Exception, message: str, hint: str = "") -> None:
    """Prints one line, after closing the progress bars."""
    _end_bars()
    if os.environ.get("LTP_SPARSE_TRACEBACK"):
        traceback.print_exception(error)
    print(f"ltp-sparse: {' '.join(message.split())}{hint}", file=sys.stderr)


def _open_bars() -> list[Any]:
    """All progress bars on the screen, also those of transformers."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return [] if tqdm is None else list(tqdm._instances)


def _end_bars() -> None:
    for bar in _open_bars():
        bar.close()


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Prints warnings of this library as one line each, without their place in the code."""
    before = warnings.formatwarning

    def one_line(message, category, filename, lineno, line=None):
        if f"{os.sep}ltp_sparse{os.sep}" not in filename and not issubclass(category, UserWarning):
            return before(message, category, filename, lineno, line)
        for bar in _open_bars():  # on a terminal, tqdm draws the bar again below the note
            if sys.stderr.isatty():
                bar.clear()
            else:
                print(file=sys.stderr)
        return f"ltp-sparse: note: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before
