"""Verbalizers: the words that stand for the classes at `<mask>`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ltp_sparse.tasks.pairs import CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_START = "\u2581"
"""Begins a piece of SentencePiece that begins a word."""

WORDS: dict[str, tuple[str, str, str]] = {
    "ar": ("لا", "نعم", "يمكن"),
    "bg": ("не", "да", "можеби"),
    "de": ("Nein", "Ja", "vielleicht"),
    "el": ("όχι", "Nαί", "μπορεί"),
    "en": ("wrong", "right", "maybe"),
    "es": ("no", "sí", "talvez"),
    "fr": ("non", "oui", "possible"),
    "hi": ("झूठ", "सच", "शायद"),
    "ru": ("нет", "да", "возможно"),
    "sw": ("hasi", "ndio", "labda"),
    "th": ("ไม่", "ใช่", "อาจจะ"),
    "tr": ("hiçbir", "Evet", "belki"),
    "ur": ("نہیں", "ہاں", "شاید"),
    "vi": ("Không", "dạ", "lẽ"),
    "zh": ("否", "是", "也许"),
}
"""Language -> words of `CLASSES` (Zhao & Schütze 2021; the Greek "Nαί" has a Latin N there as well)."""


@dataclass(frozen=True)
class Verbalizer:
    """Token ids of the words of each class, in the order of the logits. The score of a class is their mean logit."""

    token_ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or not all(self.token_ids):
            raise ValueError(f"Verbalizer: expected at least two classes with a token each, got {self.token_ids}")

    @classmethod
    def for_language(cls, tokenizer: PreTrainedTokenizerBase, language: str = "en") -> Verbalizer:
        """The verbalizer of inference in one of the 15 languages of XNLI.

        Args:
            tokenizer: the model's tokenizer.
            language: a key of `WORDS`.

        Raises:
            ValueError: no words are known for the language (use `from_words`), or an English word is not one piece, as
                it is for XLM-R's tokenizer.
        """
        if language not in WORDS:
            raise ValueError(
                f"Verbalizer.for_language: words are known for {', '.join(WORDS)}, got {language!r}; pass your own "
                "to Verbalizer.from_words"
            )
        words = dict(zip(CLASSES, WORDS[language], strict=True))
        return cls.from_words(tokenizer, words, strict=language == "en")

    @classmethod
    def from_words(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        words: Mapping[str, str | Sequence[str]],
        classes: Sequence[str] = CLASSES,
        *,
        strict: bool = False,
    ) -> Verbalizer:
        """The verbalizer of your own words.

        A word should be one piece of the tokenizer that begins a word. Of other words the last piece is used, as by
        Zhao & Schütze.

        Args:
            tokenizer: the model's tokenizer.
            words: class -> its word or words.
            classes: classes of the task, in the order of the logits.
            strict: whether a word of several pieces is an error.

        Warns:
            UserWarning: a word is not one piece.

        Raises:
            ValueError: a class has no words, the tokenizer does not know a word, or two words are the same token.
        """
        if set(words) != set(classes):
            raise ValueError(
                f"Verbalizer.from_words: expected words for {', '.join(classes)}, got {', '.join(words) or 'none'}"
            )
        ids: dict[str, list[int]] = {label: [] for label in classes}
        word_of: dict[int, str] = {}
        for label in classes:
            given = words[label]
            for word in [given] if isinstance(given, str) else given:
                token = _word_id(tokenizer, word, label, strict)
                if token in word_of:
                    raise ValueError(
                        f"Verbalizer.from_words: the words {word_of[token]!r} and {word!r} are the same token "
                        f"{tokenizer.convert_ids_to_tokens([token])[0]!r}; choose other words"
                    )
                word_of[token] = word
                ids[label].append(token)
        return cls(tuple(map(tuple, ids.values())))


def _word_id(tokenizer: PreTrainedTokenizerBase, word: str, label: str, strict: bool) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    subject = f"the word {word!r} of class {label!r}"
    if not ids or set(ids) & set(tokenizer.all_special_ids) or pieces[-1] == _WORD_START:
        made = " + ".join(pieces) or "nothing"
        raise ValueError(
            f"Verbalizer.from_words: {subject} is not in the tokenizer, which splits it into {made}; choose another "
            f"word{_instead(tokenizer, word)}"
        )
    if len(ids) > 1 or not pieces[0].startswith(_WORD_START):
        problem = f"{subject} is not one piece of the tokenizer but {' + '.join(pieces)}"
        if strict:
            raise ValueError(f"Verbalizer.from_words: {problem}; use the model's tokenizer, or choose another word")
        warnings.warn(
            f"{problem}; its last piece {pieces[-1]!r} is used. A word of one piece works better"
            f"{_instead(tokenizer, word)}",
            stacklevel=3,
        )
    return ids[-1]


def _instead(tokenizer: PreTrainedTokenizerBase, word: str) -> str:
    """A phrase with a spelling of the word that is one piece, or "" if there is none."""
    spellings = dict.fromkeys((word.strip(), word.lower(), word.capitalize(), word.title().replace(" ", "")))
    known = [s for s in spellings if s != word and len(s.split()) == 1 and _is_a_piece(tokenizer, s)]
    return f", e.g. {known[0]!r}" if known else ""


def _is_a_piece(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] not in tokenizer.all_special_ids
