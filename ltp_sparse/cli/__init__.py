"""`ltp-sparse`: the command line. Every command takes flags or a YAML file, and its `--help` teaches by example."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ltp_sparse.cli.options import CommandError, build_parser

_GOES_ON = {
    "select": "with --run-dir and --save-every, the same command with --resume goes on",
    "train": "with --save-every, the same command with --resume goes on",
    "run": "the same command goes on",
}
_EXTRA = ("accelerate", "datasets", "matplotlib", "pyarrow", "scipy", "tqdm", "transformers", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user's ends with one line on stderr and exit status 2."""
    options = None
    try:
        options = build_parser().parse(argv)
        with _warnings_as_notes():
            return int(options.run(options) or 0)
    except BrokenPipeError:  # what reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f'ltp-sparse: {error.name} is not installed; pip install "ltp-sparse[train]"', file=sys.stderr)
        return 2
    except (CommandError, ValueError, TypeError, OSError) as error:
        return _refused(error)
    except RuntimeError as error:
        from ltp_sparse.backends import BackendUnavailable  # with torch, which is there once a command has run into it

        if not isinstance(error, BackendUnavailable):
            raise
        return _refused(error)
    except KeyboardInterrupt:
        hint = _GOES_ON.get(getattr(options, "command", ""))
        print("ltp-sparse: stopped" + (f"; {hint}" if hint else ""), file=sys.stderr)
        return 130


def _refused(error: Exception) -> int:
    print("ltp-sparse:", str(error).replace("\n", " "), file=sys.stderr)
    return 2


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Warnings of ours as one line each, without the place in the code that raises them."""
    before = warnings.formatwarning

    def one_line(message, category, filename, lineno, line=None):
        if f"{os.sep}ltp_sparse{os.sep}" not in filename and not issubclass(category, UserWarning):
            return before(message, category, filename, lineno, line)
        return f"ltp-sparse: note: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before
