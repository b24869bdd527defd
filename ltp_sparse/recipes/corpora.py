"""Plain text for stage 1, language SFTs and language adapters: corpora by language, and what stands in for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from ltp_sparse.tasks import TASKS, read_hub_text, read_text
from ltp_sparse.tasks.own import texts_of

_WIKIPEDIA = "wikimedia/wikipedia"
_SNAPSHOT = "20231101"
_WIKIPEDIAS = {"aym": "ay", "quy": "qu", "jav": "jv", "sun": "su", "ind": "id", "eng": "en"}
"""Language of a task -> Wikipedia's code, where they differ."""
_STAND_INS = {"en": "wikipedia_en/wikitext-2", "zh": "multilingual_text/common_voice/zh-CN"}
"""Language -> folder of the text that stands in for a corpus. Other languages have the Common Voice of their code."""


class StandIn(UserWarning):
    """Another text, or less of it, than a recipe asks for."""


@dataclass(frozen=True)
class Corpus:
    """Sentences of a language.

    Attributes:
        texts: the sentences.
        source: where they come from.
        stand_in: whether they stand in for the corpus of the recipe, which rows of results then note.
    """

    texts: tuple[str, ...]
    source: str
    stand_in: bool = False


def corpus(language: str, lines: int, data: Path | None, *, text: str | None = None, seed: int = 42) -> Corpus:
    """At most `lines` random sentences of a language.

    Args:
        language: its code, as tasks name it.
        lines: the most sentences.
        data: the data folder. Its `corpora/{language}` (a .txt file, or a folder of them) is the corpus. If it is
            missing, another text there stands in: WikiText for English, Common Voice for other languages, else the
            training or dev sentences of a task in this language, without labels. None: Wikipedia from the Hub.
        text: "hub" for Wikipedia from the Hub, cut into sentences; "generated" for sentences of the demo; or a path in
            the data folder, such as "wikipedia_en"; None: the corpus of `data`.
        seed: seed of the draw.

    Returns:
        The sentences and their source.

    Warns:
        StandIn: another text stands in for a missing corpus.

    Raises:
        FileNotFoundError: there is no text in this language, or no such file or folder.
    """
    if text == "generated":
        from ltp_sparse.tasks.generated.inference import sentences

        return Corpus(tuple(sentences(lines, language)), "generated sentences")
    if text == "hub" or (text is None and data is None):
        config = f"{_SNAPSHOT}.{_WIKIPEDIAS.get(language, language)}"
        texts = read_hub_text(_WIKIPEDIA, config, max_lines=lines, seed=seed, sentences=True)
        return Corpus(tuple(texts), f"{_WIKIPEDIA} {config}")
    if text is not None:
        if data is None or not (data / text).exists():
            raise FileNotFoundError(
                f"text {text!r}: expected hub, generated, or a file or folder in the data folder "
                f"({data or 'none is given'})"
            )
        return Corpus(tuple(read_text([data / text], max_lines=lines, seed=seed)), text)
    assert data is not None
    for name in (language, f"{language}.txt", f"{language}.txt.gz"):
        if (own := data / "corpora" / name).exists():
            return Corpus(tuple(read_text([own], max_lines=lines, seed=seed)), f"corpora/{name}")
    source = _STAND_INS.get(language, f"multilingual_text/common_voice/{language}")
    if (data / source).is_dir():
        nearest = read_text([data / source], max_lines=lines, seed=seed)
    else:
        nearest, source = _of_a_task(language, lines, data)
    cure = f"put one sentence a line into {data / 'corpora' / (language + '.txt')}, or set text: hub"
    if not nearest:
        raise FileNotFoundError(f"no text in {language!r}: {cure}")
    warnings.warn(
        f"{source} stands in for a corpus in {language!r}: {len(nearest):,} lines, {lines:,} were asked for; {cure}",
        StandIn,
        stacklevel=2,
    )
    return Corpus(tuple(nearest), source, stand_in=True)


def mixture(corpora: Sequence[Corpus]) -> Corpus:
    """The texts of several languages in turn."""
    rounds = zip_longest(*(part.texts for part in corpora))
    return Corpus(
        tuple(text for texts in rounds for text in texts if text is not None),
        " + ".join(part.source for part in corpora),
        any(part.stand_in for part in corpora),
    )


def _of_a_task(language: str, lines: int, data: Path) -> tuple[list[str], str]:
    """At most `lines` sentences that a task has in a language, labels left out: its training set, else its dev set."""
    for name in ("smsa", "nusax", "mnli-9k", "americasnli", "americasnli-first"):
        task = TASKS[name]
        if language in task.languages:
            split = "dev" if name.startswith("americasnli") else "train"
            try:
                examples = task.load(split, language, data=data)
            except FileNotFoundError:
                continue
            texts = dict.fromkeys(text for example in examples for text in texts_of(example))
            return list(texts)[:lines], f"{name} {split}, unlabelled"
    return [], ""
