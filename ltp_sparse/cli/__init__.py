"""`ltp-sparse`: the command line. Every command takes flags or a YAML file, and its `--help` teaches by example."""

from __future__ import annotations

import os
import sys
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ltp_sparse.cli.options import COMMANDS, CommandError, build_parser

_GOES_ON = {
    "select": "with --run-dir and --save-every, run the same command with --resume to continue",
    "train": "with --save-every, run the same command with --resume to continue",
    "run": "run the same command again to continue",
}
_EXTRA = ("accelerate", "datasets", "matplotlib", "pyarrow", "scipy", "tqdm", "transformers", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; what goes wrong ends with one line on stderr, and exit status 2, or 1 for a fault of ours."""
    options = None
    try:
        parser = build_parser()
        if not (sys.argv[1:] if argv is None else argv):
            parser.parser.print_help()
            return 0
        options = parser.parse(argv)
        with _warnings_as_notes():
            return int(options.run(options) or 0)
    except BrokenPipeError:  # what reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            return _failed(error)
        print(f'ltp-sparse: {error.name} is not installed; pip install "ltp-sparse[train]"', file=sys.stderr)
        return 2
    except (CommandError, ValueError, TypeError, OSError) as error:
        return _refused(error)
    except Exception as error:
        return _failed(error)
    except KeyboardInterrupt:
        _end_bars()
        hint = _GOES_ON.get(getattr(options, "command", ""))
        print("ltp-sparse: stopped" + (f"; {hint}" if hint else ""), file=sys.stderr)
        return 130


def _refused(error: Exception) -> int:
    """Tells a mistake of the user's, without the name of the function that found it."""
    told = str(error)
    for name in {name for frame, _ in traceback.walk_tb(error.__traceback__) for name in _names(frame.f_code)}:
        told = told.removeprefix(f"{name}: ").replace(f": {name}: ", ": ")
    _tell(error, told)
    return 2


def _names(code: types.CodeType) -> tuple[str, ...]:
    """What messages of a function may begin with: its name, or its class; a command keeps its own."""
    return tuple(name for name in (code.co_qualname, code.co_qualname.partition(".")[0]) if name not in COMMANDS)


def _failed(error: Exception) -> int:
    """Tells what we, the machine or torch did wrong."""
    kind, said = type(error).__name__, str(error)
    if getattr(type(error), "__module__", "").startswith("ltp_sparse"):  # a backend that is not available
        return _refused(error)
    _tell(error, f"{kind}: {said}" if said else kind, " (LTP_SPARSE_TRACEBACK=1 shows where)")
    return 1


def _tell(error: Exception, told: str, hint: str = "") -> None:
    """One line, the last one, with no bar around it."""
    _end_bars()
    if os.environ.get("LTP_SPARSE_TRACEBACK"):
        traceback.print_exception(error)
    print(f"ltp-sparse: {' '.join(told.split())}{hint}", file=sys.stderr)


def _open_bars() -> list[Any]:
    """The bars of tqdm on the screen, of ours and of transformers alike."""
    return list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []


def _end_bars() -> None:
    for bar in _open_bars():
        bar.close()


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Warnings of ours as one line each, without the place in the code that raises them."""
    before = warnings.formatwarning

    def one_line(message, category, filename, lineno, line=None):
        if f"{os.sep}ltp_sparse{os.sep}" not in filename and not issubclass(category, UserWarning):
            return before(message, category, filename, lineno, line)
        for bar in _open_bars():  # a terminal gets the bar back below the note
            bar.clear() if sys.stderr.isatty() else print(file=sys.stderr)
        return f"ltp-sparse: note: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before
