"""An example of the kind "text"."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TinyText:
    text: str
    label: str | None
    language: str = "en"
