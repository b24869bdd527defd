"""`ltp-sparse`: the command line. Every command takes flags or a YAML file, and its `--help` teaches by example."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ltp_sparse.backends import BackendUnavailable
from ltp_sparse.cli.options import CommandError, build_parser

_GOES_ON = {
    "select": "with --run-dir and --save-every, the same command with --resume goes on",
    "train": "with --save-every, the same command with --resume goes on",
    "run": "the same command goes on",
}
_EXTRA = ("accelerate", "datasets", "matplotlib", "tqdm", "transformers", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user's ends with one line on stderr and exit status 2."""
    options = None
    try:
        options = build_parser().parse(argv)
        return int(options.run(options) or 0)
    except BrokenPipeError:  # what reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f'ltp-sparse: {error.name} is not installed; pip install "ltp-sparse[train]"', file=sys.stderr)
        return 2
    except (CommandError, ValueError, TypeError, OSError, BackendUnavailable) as error:
        print("ltp-sparse:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = _GOES_ON.get(getattr(options, "command", ""))
        print("ltp-sparse: stopped" + (f"; {hint}" if hint else ""), file=sys.stderr)
        return 130
