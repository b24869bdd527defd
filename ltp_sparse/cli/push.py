"""`ltp-sparse push`: a ticket, a delta, a run or an exported folder to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ltp_sparse.cli.checks import given_of, need, refuse
from ltp_sparse.cli.kinds import expect, kind_of

HELP = "upload a ticket, a delta, the delta of a run or an exported folder to the Hub, with a card"
EXAMPLES = """\
  a ticket for others to train on; the token comes from `hf auth login` or HF_TOKEN
    ltp-sparse push en.safetensors owner/en-ticket --base xlm-roberta-base --data "300,000 lines of Wikipedia"
  the result of a run (some kilobytes to megabytes): the delta of its first seed, with the scores of evaluate
    ltp-sparse push runs/ace owner/ace-delta
  the whole model, for servers
    ltp-sparse export runs/ace --output exported
    ltp-sparse push exported owner/ace --private"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", nargs="?", type=Path, help="a ticket, a delta, a run, or a folder of export")
    add("name", nargs="?", help="the repository, owner/name; it is created if it is missing")
    add("--base", metavar="MODEL", help="for the card: Hub name of the base model (default: the run's)")
    add("--data", metavar="TEXT", help="for the card: the data of selection or training")
    add("--seed", type=int, help="the seed of a run to upload (default: the first that is trained)")
    add("--private", action="store_true", help="make a new repository private")


def run(options: argparse.Namespace) -> None:
    need(options, "source", "name")
    expect(options, "source", "ticket", "delta", "run of ltp-sparse train", "model")
    kind = kind_of(options.source)
    if kind != "run of ltp-sparse train":
        refuse(options, "seed", why="is for a run; leave it out")
    if kind == "model":
        refuse(options, "base", "data", why="is not for an exported folder, which already has a card; leave it out")
        from ltp_sparse.training.export import push_to_hub

        address = push_to_hub(options.source, options.name, private=options.private)
    else:
        address = _push_file(options, kind)
    print(f"pushed to {address}; get it with: ltp-sparse pull {address}, or ltp_sparse.load({address!r})")


def _push_file(options: argparse.Namespace, kind: str | None) -> str:
    """Uploads a ticket or a delta. The facts for its card come from the options, or else from its run."""
    facts: dict[str, Any] = {}
    path = options.source
    if kind == "run of ltp-sparse train":
        from ltp_sparse.cli.export import data_and_scores
        from ltp_sparse.cli.runs import BAKED, Run, first_seed

        trained = Run.load(path)
        seed = first_seed(path, options.seed)
        facts = {"base": trained.model, **data_and_scores(trained, path, seed)}
        path = path / f"seed-{seed}" / BAKED
    import ltp_sparse as ls

    facts |= given_of(options, "base", "data")
    held: Any = ls.load(path)
    return held.push_to_hub(options.name, private=options.private, **facts)
