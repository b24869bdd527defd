"""`ltp-sparse pull`: a ticket, a delta or an exported model from the Hub."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ltp_sparse.cli.checks import check_writable, need

HELP = "download and verify a ticket, a delta or an exported model from the Hub, and print its commit"
EXAMPLES = """\
  ltp-sparse pull owner/en-ticket --output en.safetensors
  ltp-sparse pull owner/ace@v1 --output exported                # a branch, a tag or the hash of a commit
  python exported/predict.py "Kueh nyang dihidang mangat that" """


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the repository, owner/name or owner/name@revision")
    parser.add_argument("--output", type=Path, help="the file to write, or the folder for an exported model")


def run(options: argparse.Namespace) -> None:
    need(options, "name", "output")
    from ltp_sparse.weights.files import atomic_folder
    from ltp_sparse.weights.hub import HELD, download, files_in, kind_held, read_pinned

    folder, address = download(options.name)
    kind = kind_held(files_in(folder), address)
    if kind in ("ticket", "delta"):
        check_writable(options.output)
        import ltp_sparse as ls

        held = read_pinned(ls.Ticket if kind == "ticket" else ls.SparseDelta, folder, address)
        held.save(options.output)
        print(held)
    else:
        with atomic_folder(options.output) as place:
            shutil.copytree(folder, place, dirs_exist_ok=True)
        print(f"{kind} with {', '.join(HELD[kind])}")
    print(f"{address} written to {options.output}")
