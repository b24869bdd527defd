"""In which languages a label's scores lie above chance, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ltp_sparse.recipes.recipe import look_up
from ltp_sparse.report.paired import mean_interval


def chance_table(rows: Sequence[Mapping[str, Any]], by: Sequence[str], chance: float) -> str:
    """A Markdown table: for each group of `by`, the languages whose 95 % interval of the mean over seeds (Student's t)
    lies above `chance` (a share, such as 1 / 3), and the others. Groups of a single seed are left out.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, float]]] = {}
    for row in rows:
        groups.setdefault(tuple(look_up(row, path) for path in by), []).append(row["scores"])
    out = [[*by, "seeds", f"above {100 * chance:.1f} %", "not shown to be"], ["---"] * len(by) + ["---:"] * 2 + ["---"]]
    for facts, scores in groups.items():
        if len(scores) < 2:
            continue
        languages = [language for language in scores[0] if all(language in one for one in scores)]
        low = {language: mean_interval([one[language] for one in scores])[1][0] for language in languages}
        above = [language for language in languages if low[language] > chance]
        others = ", ".join(language for language in languages if language not in above)
        told = ["" if fact is None else str(fact) for fact in facts]
        out.append([*told, str(len(scores)), f"{len(above)} of {len(languages)}", others])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in out) + "\n"
