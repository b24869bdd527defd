"""Turns texts into token ids, and encoded examples into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""Stands for a missing label. Losses ignore such examples."""

SIDES = ("right", "left")


class Encoded(TypedDict):
    """One encoded example.

    Attributes:
        input_ids: token ids with the special tokens, without padding.
        labels: index of the class, or `IGNORED_LABEL`.
    """

    input_ids: list[int]
    labels: int


class PromptedText(Encoded):
    """One encoded example with prompt slots.

    Attributes:
        prompt_positions: positions of the slots, ascending. The prompt replaces the embeddings there.
    """

    prompt_positions: list[int]


def collator(pad_token_id: int, side: str = "right") -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """Makes the function that pads encoded examples and joins them into one batch.

    Args:
        pad_token_id: id of the padding token.
        side: side of the padding, "right" or "left". Models give the same logits for both.

    Returns:
        A function from examples to int64 tensors: input_ids and attention_mask [B, L], labels [B], and, if the examples
        have them, prompt_positions [B, n] and mask_positions [B].
    """
    if side not in SIDES:
        raise ValueError(f"collator: side must be one of {', '.join(SIDES)}, got {side!r}")

    def collate(examples: Sequence[Any]) -> dict[str, Tensor]:
        def column(key: str) -> Tensor:
            return torch.tensor([example[key] for example in examples], dtype=torch.int64, device="cpu")

        rows = [torch.tensor(example["input_ids"], dtype=torch.int64, device="cpu") for example in examples]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        starts = attention_mask.argmax(1)  # of equal maxima the first
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": column("labels")}
        if "prompt_positions" in examples[0]:
            batch["prompt_positions"] = column("prompt_positions") + starts[:, None]
        if "mask_positions" in examples[0]:
            batch["mask_positions"] = column("mask_positions") + starts
        return batch

    return collate


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens. Where a text spells one out ("</s>"), it gets the unknown token."""
    if not texts:
        return []
    special = set(tokenizer.all_special_ids)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[tokenizer.unk_token_id if token in special else token for token in ids] for ids in encoded]
