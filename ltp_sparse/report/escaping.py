"""Texts of others inside our pages: one function for every format, which what is printed goes through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


class Bold(str):
    """A cell that is printed bold."""


def plain(value: Any) -> str:
    """A fact as a text of one line; None is nothing."""
    return "" if value is None else " ".join(str(value).split())


def for_markdown(value: Any) -> str:
    """A fact as a text of Markdown, without tags, links, emphasis, headings, lists or new columns; code stays code."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\|*\[\]#]|(?<!\w)_|_(?!\w)|^~|^[-+](?=[-\s]|$))", r"\\\1", text)
    return re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", text)


def for_latex(value: Any) -> str:
    """A fact as a text of LaTeX, without commands or formulas."""
    return "".join(_LATEX.get(character, character) for character in plain(value))


def for_csv(value: Any) -> Any:
    """A fact as a cell: a number as it is, a text that a spreadsheet would take for a formula after an apostrophe."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def for_plot(value: Any) -> str:
    """A fact as a label, without formulas. matplotlib leaves labels that begin with an underscore out of a legend."""
    text = plain(value).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


@dataclass(frozen=True)
class Sheet:
    """A table of texts, of which nothing is escaped yet.

    Attributes:
        rows: the head, then the lines.
        right: for each column, whether it holds numbers, which are aligned at the right.
    """

    rows: Sequence[Sequence[str]]
    right: Sequence[bool]

    def markdown(self) -> str:
        """The table in Markdown, escaped."""
        out = [[f"**{for_markdown(c)}**" if isinstance(c, Bold) else for_markdown(c) for c in row] for row in self.rows]
        out.insert(1, ["---:" if numbers else "---" for numbers in self.right])
        return "\n".join("| " + " | ".join(cells) + " |" for cells in out) + "\n"
