"""Texts of others inside our pages: one function for every format, which what is printed goes through."""

from __future__ import annotations

import html
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
    """Without tags, links, emphasis or new columns."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*\[\]])", r"\\\1", text)


def for_html(value: Any) -> str:
    return html.escape(plain(value))


def for_latex(value: Any) -> str:
    return "".join(_LATEX.get(character, character) for character in plain(value))


def for_csv(value: Any) -> Any:
    """Numbers as they are; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def for_plot(value: Any) -> str:
    """Without formulas; matplotlib leaves labels that begin with an underscore out of a legend."""
    text = plain(value).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


@dataclass(frozen=True)
class Sheet:
    """A table of texts, of which nothing is escaped yet.

    Attributes:
        rows: the head and the lines
        right: which columns are numbers
    """

    rows: Sequence[Sequence[str]]
    right: Sequence[bool]

    def markdown(self) -> str:
        out = [[f"**{for_markdown(c)}**" if isinstance(c, Bold) else for_markdown(c) for c in row] for row in self.rows]
        out.insert(1, ["---:" if numbers else "---" for numbers in self.right])
        return "\n".join("| " + " | ".join(cells) + " |" for cells in out) + "\n"

    def html(self) -> str:
        head, *body = self.rows
        out = "".join(f"<th>{for_html(name)}</th>" for name in head)
        for row in body:
            cells = (f"<b>{for_html(cell)}</b>" if isinstance(cell, Bold) else for_html(cell) for cell in row)
            out += "</tr>\n<tr>" + "".join(f"<td>{cell}</td>" for cell in cells)
        return f"<table><tr>{out}</tr></table>\n"
