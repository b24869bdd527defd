"""`ltp-sparse inspect`: the distribution of a ticket over a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ltp_sparse.cli.checks import check_plot, need
from ltp_sparse.cli.kinds import expect

if TYPE_CHECKING:
    from ltp_sparse import Ticket

HELP = "show how a ticket is distributed over layers and module types, as a plot, and its overlap with another ticket"
EXAMPLES = """\
  ltp-sparse inspect en.safetensors
  ltp-sparse inspect en.safetensors --by parameter --plot en.png
  ltp-sparse inspect en.safetensors --compare hi.safetensors"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ticket", nargs="?", type=Path, help="a ticket, or a delta that was trained on one")
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("layer", "module", "parameter"),
        default=["layer", "module"],
        help="the units that are counted (default: layer module)",
    )
    parser.add_argument("--plot", type=Path, help="also draw the distribution over layers (.png, .pdf, .svg)")
    parser.add_argument("--compare", type=Path, help="another ticket, to show the overlap by layer")


def run(options: argparse.Namespace) -> None:
    need(options, "ticket")
    check_plot(options.plot)
    for name in ("ticket", "compare"):
        expect(options, name, "ticket", "delta")
    from ltp_sparse.report.plots import plot_ticket

    ticket = _load(options.ticket)
    print(ticket)
    for key, value in ticket.metadata.items():
        print(f"  {key}: {value}")
    for by in options.by:
        print(f"\n{by:<60} {'active':>13} {'of':>13} {'density':>8} {'share':>7}")
        for place, (k, n) in ticket.counts(by).items():
            print(f"{place:<60} {k:>13,} {n:>13,} {k / max(n, 1):>8.2%} {k / max(ticket.k, 1):>7.2%}")
    if options.compare is not None:
        other = _load(options.compare)
        shared = ticket & other
        print(f"\nshared with {options.compare}: {shared.k:,} entries, Jaccard overlap {ticket.jaccard(other):.4f}")
        union = (ticket | other).counts("layer")
        for place, (k, _) in shared.counts("layer").items():
            print(f"{place:<60} {k:>13,} of {union[place][0]:>13,} in either")
    if options.plot is not None:
        print(f"\nplot written to {plot_ticket(ticket, options.plot)}")


def _load(path: Path) -> Ticket:
    """A ticket, or the one that a delta was trained on."""
    import ltp_sparse as ls
    from ltp_sparse.weights.files import WrongKind

    try:
        return ls.Ticket.load(path)
    except WrongKind as error:
        if error.found != "delta":
            raise
        return ls.SparseDelta.load(path).ticket
