"""Templates: from a sentence pair or a text to token ids with prompt slots and one `<mask>`.

The text preparation and the order of the parts follow Zhao & Schütze (2021).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from ltp_sparse.prompting.inputs import IGNORED_LABEL, token_ids
from ltp_sparse.tasks.pairs import CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 256
"""Tokens of an input, `<s>` and `</s>` included."""

PREMISE, HYPOTHESIS, TEXT, PROMPT, MASK = "{premise}", "{hypothesis}", "{text}", "{prompt}", "{mask}"

_TRUNCATIONS = ("longest_first", "hypothesis_first")


class Example(TypedDict):
    """One encoded pair or text.

    Attributes:
        input_ids: token ids, `<s>` and `</s>` included, not padded
        prompt_positions: the n positions whose embeddings the prompt replaces, ascending
        mask_positions: the position of `<mask>`
        labels: index of the class, or `IGNORED_LABEL`
    """

    input_ids: list[int]
    prompt_positions: list[int]
    mask_positions: int
    labels: int


@dataclass(frozen=True)
class Template:
    """A cloze pattern: a list of parts, each encoded on its own and joined between `<s>` and `</s>`.

    Attributes:
        parts: `{premise}` and `{hypothesis}`, or `{text}`; `{prompt}` (the prompt slots), `{mask}`; fixed text. Each
            placeholder occurs once
        n_prompt: prompt slots
    """

    parts: tuple[str, ...]
    n_prompt: int = 0

    def __post_init__(self) -> None:
        wanted = {MASK: 1, PROMPT: int(self.n_prompt > 0), **dict.fromkeys(self.texts, 1)}
        for mark, times in wanted.items():
            if (count := self.parts.count(mark)) != times:
                raise ValueError(f"Template: expected {mark} {times} times with n_prompt={self.n_prompt}, got {count}")

    @property
    def texts(self) -> tuple[str, ...]:
        """The placeholders for the texts of an example."""
        return (TEXT,) if TEXT in self.parts else (PREMISE, HYPOTHESIS)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        *,
        classes: Sequence[str] = CLASSES,
        max_length: int = MAX_LENGTH,
        truncation: str = "longest_first",
    ) -> list[Example]:
        """Encodes pairs (`Pair`) or texts (`Text`).

        Args:
            tokenizer: of the model.
            examples: pairs or texts, as the template has them.
            classes: of the task, in the order of the logits.
            max_length: longer inputs are cut at the end of their texts only.
            truncation: "longest_first" takes each token from the longer text (of equally long ones, the hypothesis);
                "hypothesis_first" empties the hypothesis before it cuts the premise, as the original does.

        Raises:
            ValueError: an unknown label or truncation, or the fixed parts alone do not fit.
        """
        if truncation not in _TRUNCATIONS:
            raise ValueError(
                f"Template.encode: truncation must be one of {', '.join(_TRUNCATIONS)}, got {truncation!r}"
            )
        if not examples:
            return []
        fixed = {part: self._fixed(tokenizer, part) for part in self.parts if part not in self.texts}
        room = max_length - 2 - sum(len(fixed.get(part, ())) for part in self.parts)
        if room < (least := len(self.texts)):
            names = " and ".join(mark.strip("{}") for mark in self.texts)
            raise ValueError(
                f"Template.encode: max_length must be at least {max_length - room + least} for this template (one "
                f"token of {names} each), got {max_length}"
            )
        texts = {
            mark: token_ids(tokenizer, [strip_punctuation(getattr(example, mark.strip("{}"))) for example in examples])
            for mark in self.texts
        }
        encoded = []
        for row, example in enumerate(examples):
            ids = [texts[mark][row] for mark in self.texts]
            lengths = _truncated([len(tokens) for tokens in ids], room, truncation)
            kept = {mark: tokens[:n] for mark, tokens, n in zip(self.texts, ids, lengths, strict=True)}
            encoded.append(self._assemble(tokenizer, {**fixed, **kept}, label_index(example.label, classes)))
        return encoded

    def _fixed(self, tokenizer: PreTrainedTokenizerBase, part: str) -> list[int]:
        if part == MASK:
            return [tokenizer.mask_token_id]
        if part == PROMPT:
            # Embeddings of slots are overwritten, so any id but those of padding and mask will do.
            return [tokenizer.unk_token_id] * self.n_prompt
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    def _assemble(self, tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, list[int]], label: int) -> Example:
        input_ids, prompt_positions, mask_position = [tokenizer.cls_token_id], [], -1
        for part in self.parts:
            start = len(input_ids)
            input_ids += ids[part]
            if part == MASK:
                mask_position = start
            elif part == PROMPT:
                prompt_positions = list(range(start, len(input_ids)))
        input_ids.append(tokenizer.sep_token_id)
        return Example(
            input_ids=input_ids, prompt_positions=prompt_positions, mask_positions=mask_position, labels=label
        )


QUESTIONS: dict[str, tuple[str, str]] = {
    "ar": ("سؤال:", "إجابه:"),
    "bg": ("Въпрос:", "Отговор:"),
    "de": ("Frage:", "Antworten:"),
    "el": ("Ερώτηση:", "Απάντηση:"),
    "en": ("Question:", "Answer:"),
    "es": ("Pregunta:", "Respuesta:"),
    "fr": ("Question:", "Répondre:"),
    "hi": ("सवाल:", "उत्तर:"),
    "ru": ("Вопрос:", "Отвечать:"),
    "sw": ("Swali:", "Jibu:"),
    "th": ("คำถาม:", "ตอบ:"),
    "tr": ("Soru:", "Cevap:"),
    "ur": ("سوال:", "جواب:"),
    "vi": ("Câu hỏi:", "Câu trả lời:"),
    "zh": ("问题：", "答案："),
}
"""Language -> words before the hypothesis and before the answer (Zhao & Schütze 2021)."""


def kind_of(example: Any) -> str:
    """The kind of an example: "pair" or "text"."""
    return "pair" if hasattr(example, "premise") else "text"


def cloze_template(kind: str = "pair") -> Template:
    """`P . H ? <mask> .`, or `T . <mask> .` for a text: the soft template without prompt slots."""
    return soft_template(0, kind)


def soft_template(n_prompt: int = 4, kind: str = "pair") -> Template:
    """`P . H ? p1..pn <mask> .`, or `T . p1..pn <mask> .` for a text: the input of SP and LTP."""
    texts = (PREMISE, ".", HYPOTHESIS, "?") if kind == "pair" else (TEXT, ".")
    prompt = (PROMPT,) if n_prompt else ()
    return Template((*texts, *prompt, MASK, "."), n_prompt)


def discrete_template(language: str = "en", n_prompt: int = 0, kind: str = "pair") -> Template:
    """`P . Question: H ? Answer: <mask> .` (DP), with `p1..pn` before the mask where n_prompt > 0 (MP).

    For a text `T . Answer: <mask> .`; the papers have no pattern for texts.

    Raises:
        ValueError: `QUESTIONS` has no words for the language.
    """
    if language not in QUESTIONS:
        raise ValueError(
            f"discrete_template: words are known for {', '.join(QUESTIONS)}, got {language!r}; make your own Template"
        )
    question, answer = QUESTIONS[language]
    prompt = (PROMPT,) if n_prompt else ()
    texts = (PREMISE, ".", question, HYPOTHESIS, "?") if kind == "pair" else (TEXT, ".")
    return Template((*texts, answer, *prompt, MASK, "."), n_prompt)


def strip_punctuation(text: str) -> str:
    """The text without trailing ASCII punctuation, unless nothing would remain."""
    return text.rstrip(string.punctuation) or text


def label_index(label: str | None, classes: Sequence[str] = CLASSES) -> int:
    """Index of a class; `IGNORED_LABEL` for None.

    Raises:
        ValueError: the label is unknown.
    """
    if label is None:
        return IGNORED_LABEL
    if label not in classes:
        raise ValueError(f"label_index: label must be one of {', '.join(classes)}, got {label!r}")
    return list(classes).index(label)


def _truncated(lengths: Sequence[int], room: int, truncation: str) -> tuple[int, ...]:
    """The lengths of a text, or of premise and hypothesis, that fit into `room` tokens."""
    if len(lengths) == 1 or sum(lengths) <= room:
        return tuple(min(length, room) for length in lengths)
    premise, hypothesis = lengths
    if truncation == "hypothesis_first":
        return min(premise, room), max(room - premise, 0)
    if hypothesis <= room // 2:
        return room - hypothesis, hypothesis
    if premise <= room - room // 2:
        return premise, room - premise
    return room - room // 2, room // 2
