"""In which languages a label's scores lie above chance, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ltp_sparse.report.escaping import Sheet, plain
from ltp_sparse.report.paired import mean_interval
from ltp_sparse.report.tables import grouped


def chance_sheet(rows: Sequence[Mapping[str, Any]], by: Sequence[str], chance: float) -> Sheet:
    """For each group of rows, the number of languages above chance, and the other languages.

    A language is above chance if the 95 % interval of its mean over seeds (Student's t) is. Languages with one run are
    left out.

    Args:
        rows: results, with "scores" by language.
        by: dotted paths of the facts that make a group.
        chance: the score of guessing, in [0, 1], such as 1 / 3.
    """
    out = [[*by, "seeds", f"above {100 * chance:.1f} %", "not shown to be"]]
    for facts, members in grouped(rows, by).items():
        languages = dict.fromkeys(language for row in members for language in row["scores"])
        scores = {name: [row["scores"][name] for row in members if name in row["scores"]] for name in languages}
        repeated = {language: values for language, values in scores.items() if len(values) > 1}
        if not repeated:
            continue
        above = [language for language, values in repeated.items() if mean_interval(values)[1][0] > chance]
        others = ", ".join(language for language in repeated if language not in above)
        seeds = max(map(len, repeated.values()))
        out.append([*map(plain, facts), str(seeds), f"{len(above)} of {len(repeated)}", others])
    return Sheet(out, [False] * len(by) + [True, True, False])
