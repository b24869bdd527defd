"""Stage 1 behind the tickets of a table: updates, loss, and the overlap of the tickets of two seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ltp_sparse.recipes.recipe import look_up
from ltp_sparse.report.escaping import Sheet, plain
from ltp_sparse.report.tables import figure, grouped


def stage_1_sheet(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> Sheet | None:
    """For each group of rows with a ticket of stage 1, and each score in it, the means over its runs.

    "shared" is the share of a ticket's entries that the ticket of another seed has as well; "chance" is the same for
    two random tickets with as many entries in each parameter.

    Args:
        rows: results.
        by: dotted paths of the facts that make a group.

    Returns:
        The table; None if no row has a ticket of stage 1.
    """
    groups = grouped([row for row in rows if row.get("stage_1")], [*by, "stage_1.score"])
    if not groups:
        return None
    out = [[*by, "score", "updates", "validation loss", "seeds", "shared", "chance", "times chance"]]
    for (*facts, score), of_group in groups.items():
        members = [row["stage_1"] for row in of_group]
        shared, chance = (_mean(members, f"overlap.{key}") for key in ("share", "chance"))
        out.append(
            [
                *map(plain, facts),
                score,
                ", ".join(dict.fromkeys(str(m["updates"]) for m in members if "updates" in m)),
                figure(_mean(members, "validation_loss"), "{:.3f}"),
                str(len({member.get("seed") for member in members})),
                figure(shared, "{:.1%}"),
                figure(chance, "{:.1%}"),
                figure(shared / chance if shared is not None and chance else None),
            ]
        )
    return Sheet(out, [False] * (len(by) + 1) + [True] * 6)


def _mean(members: Sequence[Mapping[str, Any]], path: str) -> float | None:
    values = [value for member in members if (value := look_up(member, path)) is not None]
    return statistics.fmean(values) if values else None
