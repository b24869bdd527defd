"""`ltp-sparse`: the command line. Every command takes flags or a YAML file, and its `--help` teaches by example."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ltp_sparse.cli.options import CommandError, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user's ends with one line on stderr and exit status 2."""
    parser = build_parser()
    try:
        options = parser.parse(argv)
        return int(options.run(options) or 0)
    except (CommandError, ValueError, TypeError, FileNotFoundError) as error:
        print(f"ltp-sparse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ltp-sparse: stopped; with --save-every, the same command with --resume goes on", file=sys.stderr)
        return 130
