"""Text preparation and templates: a sentence pair becomes token ids with prompt slots and one `<mask>`.

METHODS.md 3 and 4.2; the text preparation and the order of the parts follow Zhao & Schütze (2021).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASSES = ("contradiction", "entailment", "neutral")
"""The classes in the order of the logits and of the loss."""

MAX_LENGTH = 256
"""Tokens of an input, `<s>` and `</s>` included."""

IGNORED_LABEL = -100
"""The label of a pair without one; the loss leaves it out."""

PREMISE, HYPOTHESIS, PROMPT, MASK = "{premise}", "{hypothesis}", "{prompt}", "{mask}"

_TRUNCATIONS = ("longest_first", "hypothesis_first")


class Pair(Protocol):
    """What a sentence pair must offer; label is one of `CLASSES`, or None when it is to be predicted."""

    @property
    def premise(self) -> str: ...
    @property
    def hypothesis(self) -> str: ...
    @property
    def label(self) -> str | None: ...


class Example(TypedDict):
    """One encoded pair.

    input_ids:        token ids, `<s>` and `</s>` included, not padded
    prompt_positions: the n positions whose embeddings the prompt replaces, ascending
    mask_positions:   the position of `<mask>`
    labels:           index into `CLASSES`, or `IGNORED_LABEL`
    """

    input_ids: list[int]
    prompt_positions: list[int]
    mask_positions: int
    labels: int


@dataclass(frozen=True)
class Template:
    """A cloze pattern: a list of parts, each encoded on its own and joined between `<s>` and `</s>`.

    parts:    `{premise}`, `{hypothesis}`, `{prompt}` (n slots), `{mask}`, or fixed text; the mask exactly once
    n_prompt: prompt slots in all
    """

    parts: tuple[str, ...]
    n_prompt: int = 0

    def __post_init__(self) -> None:
        for mark, wanted in ((MASK, 1), (PREMISE, 1), (HYPOTHESIS, 1), (PROMPT, int(self.n_prompt > 0))):
            if (count := self.parts.count(mark)) != wanted:
                raise ValueError(f"Template: expected {mark} {wanted} times with n_prompt={self.n_prompt}, got {count}")

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        *,
        max_length: int = MAX_LENGTH,
        truncation: str = "longest_first",
    ) -> list[Example]:
        """Encode pairs; those over `max_length` lose tokens at the end of the premise and the hypothesis only.

        truncation: "longest_first" takes each token from the longer of the two (the hypothesis when they are equal);
                    "hypothesis_first" empties the hypothesis before it touches the premise, as the original does.
        Raises ValueError for an unknown label or truncation, and when the fixed parts alone do not fit.
        """
        if truncation not in _TRUNCATIONS:
            raise ValueError(
                f"Template.encode: truncation must be one of {', '.join(_TRUNCATIONS)}, got {truncation!r}"
            )
        if not pairs:
            return []
        fixed = {part: self._fixed(tokenizer, part) for part in self.parts if part not in (PREMISE, HYPOTHESIS)}
        room = max_length - 2 - sum(len(fixed.get(part, ())) for part in self.parts)
        if room < 2:
            raise ValueError(
                f"Template.encode: max_length must be at least {max_length - room + 2} for this template (one token of "
                f"premise and hypothesis each), got {max_length}"
            )
        premises = _encode_texts(tokenizer, [pair.premise for pair in pairs])
        hypotheses = _encode_texts(tokenizer, [pair.hypothesis for pair in pairs])
        examples = []
        for pair, premise, hypothesis in zip(pairs, premises, hypotheses, strict=True):
            keep_premise, keep_hypothesis = _truncated(len(premise), len(hypothesis), room, truncation)
            texts = {PREMISE: premise[:keep_premise], HYPOTHESIS: hypothesis[:keep_hypothesis]}
            examples.append(self._assemble(tokenizer, {**fixed, **texts}, label_index(pair.label)))
        return examples

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


def cloze_template() -> Template:
    """`P . H ? <mask> .`: what remains of the soft template without a prompt among the tokens."""
    return Template((PREMISE, ".", HYPOTHESIS, "?", MASK, "."))


def soft_template(n_prompt: int = 4) -> Template:
    """`P . H ? p1..pn <mask> .`: the input of SP and LTP (METHODS.md 3 and 4.2)."""
    return Template((PREMISE, ".", HYPOTHESIS, "?", PROMPT, MASK, "."), n_prompt)


def discrete_template(language: str = "en", n_prompt: int = 0) -> Template:
    """`P . Question: H ? Answer: <mask> .` (DP), with `p1..pn` before the mask where n_prompt > 0 (MP; METHODS.md 3).

    Raises ValueError for a language without words in `QUESTIONS`.
    """
    if language not in QUESTIONS:
        raise ValueError(
            f"discrete_template: words are known for {', '.join(QUESTIONS)}, got {language!r}; make a Template"
        )
    question, answer = QUESTIONS[language]
    prompt = (PROMPT,) if n_prompt else ()
    return Template((PREMISE, ".", question, HYPOTHESIS, "?", answer, *prompt, MASK, "."), n_prompt)


def strip_punctuation(text: str) -> str:
    """The text without trailing ASCII punctuation, unless nothing would remain."""
    return text.rstrip(string.punctuation) or text


def label_index(label: str | None) -> int:
    """Index of a class in `CLASSES`; `IGNORED_LABEL` for None."""
    if label is None:
        return IGNORED_LABEL
    if label not in CLASSES:
        raise ValueError(f"label_index: label must be one of {', '.join(CLASSES)}, got {label!r}")
    return CLASSES.index(label)


def collator(pad_token_id: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A function that pads examples on the right into one batch.

    It returns int64 tensors: input_ids, attention_mask [B, L], prompt_positions [B, n], mask_positions, labels [B].
    """

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.long)
        for row, example in zip(input_ids, examples, strict=True):
            row[: len(example["input_ids"])] = torch.tensor(example["input_ids"])
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != pad_token_id).long(),
            "prompt_positions": torch.tensor([example["prompt_positions"] for example in examples], dtype=torch.long),
            "mask_positions": torch.tensor([example["mask_positions"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    return collate


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # A text that spells out "<mask>" or "</s>" must not add a real one.
    special = set(tokenizer.all_special_ids)
    encoded = tokenizer([strip_punctuation(text) for text in texts], add_special_tokens=False)["input_ids"]
    return [[tokenizer.unk_token_id if token in special else token for token in ids] for ids in encoded]


def _truncated(premise: int, hypothesis: int, room: int, truncation: str) -> tuple[int, int]:
    """The lengths of premise and hypothesis that fit into `room` tokens."""
    if premise + hypothesis <= room:
        return premise, hypothesis
    if truncation == "hypothesis_first":
        return min(premise, room), max(room - premise, 0)
    if hypothesis <= room // 2:
        return room - hypothesis, hypothesis
    if premise <= room - room // 2:
        return premise, room - premise
    return room - room // 2, room // 2
