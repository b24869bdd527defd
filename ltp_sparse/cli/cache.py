"""`ltp-sparse cache`: what recipes keep for later cells."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

HELP = "list or clear the tuned weights, language SFTs and adapters that recipes share between cells"
EXAMPLES = """\
  ltp-sparse cache
  ltp-sparse cache --clear"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, help="the folder (default: $LTP_SPARSE_CACHE or the user's cache folder)")
    parser.add_argument("--clear", action="store_true", help="remove everything in it")


def run(options: argparse.Namespace) -> None:
    from ltp_sparse.recipes.cache import Cache, default_cache

    cache = Cache(options.cache or default_cache())
    if options.clear:
        print(f"{cache.clear():,} bytes freed in {cache.folder}")
        return
    print(cache)
    for entry in cache.entries():
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.made))
        print(f"{made}  {entry.kind:<13} {entry.nbytes:>15,} bytes  {entry.facts.get('source', '')}  {entry.path.name}")
