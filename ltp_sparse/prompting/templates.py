"""Templates, which turn a pair or a text into token ids with prompt slots and one `<mask>`.

Texts are prepared, and parts are ordered, as by Zhao & Schütze (2021).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ltp_sparse.prompting.inputs import IGNORED_LABEL, PromptedText, token_ids
from ltp_sparse.tasks.pairs import CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 256
"""The most tokens of an input, with `<s>` and `</s>`."""

PREMISE, HYPOTHESIS, TEXT, PROMPT, MASK = "{premise}", "{hypothesis}", "{text}", "{prompt}", "{mask}"

_TRUNCATIONS = ("longest_first", "hypothesis_first")


class Example(PromptedText):
    """One encoded pair or text.

    Attributes:
        mask_positions: the position of `<mask>`.
    """

    mask_positions: int


@dataclass(frozen=True)
class Template:
    """A cloze pattern. Its parts are encoded one by one and joined between `<s>` and `</s>`.

    Attributes:
        parts: fixed texts and placeholders. `{mask}` occurs once, and so do `{premise}` and `{hypothesis}`, or
            `{text}`. `{prompt}` occurs once if there are prompt slots.
        n_prompt: number of prompt slots.
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
            tokenizer: the model's tokenizer.
            examples: pairs or texts, whichever the template has placeholders for.
            classes: classes of the task, in the order of the logits.
            max_length: the most tokens of an input. Longer ones lose tokens at the end of their texts.
            truncation: "longest_first" takes each token from the longer text, or from the hypothesis if both have the
                same length. "hypothesis_first" empties the hypothesis before it cuts the premise, as the original does.

        Raises:
            ValueError: a label or the truncation is unknown, or the fixed parts leave no room for the texts.
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
        texts = [
            token_ids(tokenizer, [strip_punctuation(getattr(example, mark.strip("{}"))) for example in examples])
            for mark in self.texts
        ]
        encoded = []
        for example, *ids in zip(examples, *texts, strict=True):
            lengths = truncated([len(tokens) for tokens in ids], room, truncation)
            kept = {mark: tokens[:n] for mark, tokens, n in zip(self.texts, ids, lengths, strict=True)}
            encoded.append(self._assemble(tokenizer, {**fixed, **kept}, label_index(example.label, classes)))
        return encoded

    def _fixed(self, tokenizer: PreTrainedTokenizerBase, part: str) -> list[int]:
        if part == MASK:
            return [tokenizer.mask_token_id]
        if part == PROMPT:
            # any id except those of padding and mask, since the prompt replaces the embeddings
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
"""Language -> the words before the hypothesis and before the answer (Zhao & Schütze 2021)."""


def kind_of(example: Any) -> str:
    """The kind of an example: "pair" or "text"."""
    return "pair" if hasattr(example, "premise") else "text"


def encoder_by_kind(
    template_of: Callable[[str], Template], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Callable[[Sequence[Any]], list[Any]]:
    """A function that encodes examples by the template of their kind; options as for `Template.encode`."""

    def encode(examples: Sequence[Any]) -> list[Any]:
        return template_of(kind_of(examples[0]) if examples else "pair").encode(tokenizer, examples, **options)

    return encode


def cloze_template(kind: str = "pair") -> Template:
    """The soft template without prompt slots: `P . H ? <mask> .`, or `T . <mask> .` for a text."""
    return soft_template(0, kind)


def soft_template(n_prompt: int = 4, kind: str = "pair") -> Template:
    """The template of SP and LTP: `P . H ? p1..pn <mask> .`, or `T . p1..pn <mask> .` for a text."""
    texts = (PREMISE, ".", HYPOTHESIS, "?") if kind == "pair" else (TEXT, ".")
    prompt = (PROMPT,) if n_prompt else ()
    return Template((*texts, *prompt, MASK, "."), n_prompt)


def discrete_template(language: str = "en", n_prompt: int = 0, kind: str = "pair") -> Template:
    """The template of DP, `P . Question: H ? Answer: <mask> .`, and of MP, with `p1..pn` before the mask.

    For a text it is `T . Answer: <mask> .`; the papers have no pattern for texts.

    Args:
        language: language of the words, a key of `QUESTIONS`.
        n_prompt: number of prompt slots; 0 for DP.
        kind: kind of the examples, "pair" or "text".

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
    """The text without the ASCII punctuation at its end. A text of punctuation only stays as it is."""
    return text.rstrip(string.punctuation) or text


def label_index(label: str | None, classes: Sequence[str] = CLASSES) -> int:
    """The index of a class, or `IGNORED_LABEL` for None.

    Raises:
        ValueError: the label is not one of the classes.
    """
    if label is None:
        return IGNORED_LABEL
    if label not in classes:
        raise ValueError(f"label_index: label must be one of {', '.join(classes)}, got {label!r}")
    return list(classes).index(label)


def truncated(lengths: Sequence[int], room: int, truncation: str = "longest_first") -> tuple[int, ...]:
    """The lengths to which a text, or premise and hypothesis, are cut to fit into `room` tokens."""
    if len(lengths) == 1 or sum(lengths) <= room:
        return tuple(min(length, room) for length in lengths)
    premise, hypothesis = lengths
    if truncation == "hypothesis_first":
        return min(premise, room), max(room - premise, 0)
    hypothesis = min(hypothesis, max(room // 2, room - premise))
    return min(premise, room - hypothesis), hypothesis
