"""Encoded examples and batches for the modules of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("right", "left")


def collator(pad_token_id: int, side: str = "right") -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """A function that pads examples of `encode_pairs`, `encode_texts` or `encode_prompted` into one batch.

    Args:
        side: "right" or "left", where the padding goes; the modules give the same logits for both.

    It returns int64 tensors: input_ids, attention_mask [B, L], labels [B] and, where the examples have them,
    prompt_positions [B, n].
    """
    if side not in SIDES:
        raise ValueError(f"collator: side must be one of {', '.join(SIDES)}, got {side!r}")

    def collate(examples: Sequence[Any]) -> dict[str, Tensor]:
        sizes = [len(example["input_ids"]) for example in examples]
        length = max(sizes)
        starts = [length - size if side == "left" else 0 for size in sizes]
        input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.long, device="cpu")
        attention_mask = torch.zeros_like(input_ids)
        for row, (example, start, size) in enumerate(zip(examples, starts, sizes, strict=True)):
            input_ids[row, start : start + size] = torch.tensor(example["input_ids"], dtype=torch.int64, device="cpu")
            attention_mask[row, start : start + size] = 1
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.int64, device="cpu"),
        }
        if "prompt_positions" in examples[0]:
            positions = torch.tensor(
                [example["prompt_positions"] for example in examples], dtype=torch.long, device="cpu"
            )
            batch["prompt_positions"] = positions + torch.tensor(starts, dtype=torch.int64, device="cpu")[:, None]
        return batch

    return collate


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, without special tokens: one that a text spells out ("</s>") becomes the unknown token."""
    if not texts:
        return []
    special = set(tokenizer.all_special_ids)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[tokenizer.unk_token_id if token in special else token for token in ids] for ids in encoded]
