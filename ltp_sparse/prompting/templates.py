"""Text preparation and templates: a sentence pair, or a text, becomes token ids with prompt slots and one `<mask>`.

The text preparation and the order of the parts follow Zhao & Schütze (2021).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import Tensor

from ltp_sparse.tasks.pairs import CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 256
"""Tokens of an input, `<s>` and `</s>` included."""

IGNORED_LABEL = -100
"""The label of a pair without one; the loss leaves it out."""

PREMISE, HYPOTHESIS, TEXT, PROMPT, MASK = "{premise}", "{hypothesis}", "{text}", "{prompt}", "{mask}"

_TRUNCATIONS = ("longest_first", "hypothesis_first")


class Pair(Protocol):
    """What a sentence pair must offer; label is a class of the task, or None when it is to be predicted."""

    @property
    def premise(self) -> str: ...
    @property
    def hypothesis(self) -> str: ...
    @property
    def label(self) -> str | None: ...


class Text(Protocol):
    """What a text must offer; label is a class of the task, or None when it is to be predicted."""

    @property
    def text(self) -> str: ...
    @property
    def label(self) -> str | None: ...


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
        parts: `{premise}` and `{hypothesis}`, or `{text}`; `{prompt}` (n slots), `{mask}`, fixed text; each mark once
        n_prompt: prompt slots in all
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
        """The marks that stand for the texts of an example."""
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
        """Encode pairs (`Pair`) or texts (`Text`); those over `max_length` lose tokens at the end of their texts only.

        Args:
            truncation: "longest_first" takes each token from the longer of the two (the hypothesis when they are
                equal); "hypothesis_first" empties the hypothesis before it touches the premise, as the original does.

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
            mark: _encode_texts(tokenizer, [getattr(example, mark.strip("{}")) for example in examples])
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
            # The embedding of a slot is overwritten, so any id but those of padding and mask serves.
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
    """What an example is: "pair" or "text"."""
    return "pair" if hasattr(example, "premise") else "text"


def cloze_template(kind: str = "pair") -> Template:
    """`P . H ? <mask> .`, of a text `T . <mask> .`: the soft template without a prompt among the tokens."""
    return soft_template(0, kind)


def soft_template(n_prompt: int = 4, kind: str = "pair") -> Template:
    """`P . H ? p1..pn <mask> .`: the input of SP and LTP; of a text `T . p1..pn <mask> .`."""
    texts = (PREMISE, ".", HYPOTHESIS, "?") if kind == "pair" else (TEXT, ".")
    prompt = (PROMPT,) if n_prompt else ()
    return Template((*texts, *prompt, MASK, "."), n_prompt)


def discrete_template(language: str = "en", n_prompt: int = 0, kind: str = "pair") -> Template:
    """`P . Question: H ? Answer: <mask> .` (DP), with `p1..pn` before the mask where n_prompt > 0 (MP).

    Of a text `T . Answer: <mask> .`: the papers have no pattern for those.

    Raises:
        ValueError: `QUESTIONS` has no words for the language.
    """
    if language not in QUESTIONS:
        raise ValueError(
            f"discrete_template: words are known for {', '.join(QUESTIONS)}, got {language!r}; make a Template"
        )
    question, answer = QUESTIONS[language]
    prompt = (PROMPT,) if n_prompt else ()
    texts = (PREMISE, ".", question, HYPOTHESIS, "?") if kind == "pair" else (TEXT, ".")
    return Template((*texts, answer, *prompt, MASK, "."), n_prompt)


def strip_punctuation(text: str) -> str:
    """The text without trailing ASCII punctuation, unless nothing would remain."""
    return text.rstrip(string.punctuation) or text


def label_index(label: str | None, classes: Sequence[str] = CLASSES) -> int:
    """Index of a class; `IGNORED_LABEL` for None. Raises ValueError for another label."""
    if label is None:
        return IGNORED_LABEL
    if label not in classes:
        raise ValueError(f"label_index: label must be one of {', '.join(classes)}, got {label!r}")
    return list(classes).index(label)


def collator(pad_token_id: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A function that pads examples on the right into one batch.

    It returns int64 tensors: input_ids, attention_mask [B, L], prompt_positions [B, n], mask_positions, labels [B].
    """

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.long, device="cpu")
        for row, example in zip(input_ids, examples, strict=True):
            row[: len(example["input_ids"])] = torch.tensor(example["input_ids"], dtype=torch.int64, device="cpu")
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != pad_token_id).long(),
            "prompt_positions": torch.tensor(
                [example["prompt_positions"] for example in examples], dtype=torch.long, device="cpu"
            ),
            "mask_positions": torch.tensor(
                [example["mask_positions"] for example in examples], dtype=torch.int64, device="cpu"
            ),
            "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.int64, device="cpu"),
        }

    return collate


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # A text that spells out "<mask>" or "</s>" must not add a real one.
    special = set(tokenizer.all_special_ids)
    encoded = tokenizer([strip_punctuation(text) for text in texts], add_special_tokens=False)["input_ids"]
    return [[tokenizer.unk_token_id if token in special else token for token in ids] for ids in encoded]


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
