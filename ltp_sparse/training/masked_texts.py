"""Texts as training data of a masked language model: split, tokenised, masked, padded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ltp_sparse.prompting.inputs import IGNORED_LABEL

_TOKENIZER_BATCH = 1000


def split_texts(texts: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(training texts, validation texts) in their order. A random `share`, at least one text, is for validation."""
    if not 0 < share < 1:
        raise ValueError(f"expected a share of validation texts in (0, 1), got {share}")
    if len(texts) < 2:
        raise ValueError(f"expected at least 2 texts, one of them for validation, got {len(texts)}")
    held_out = max(1, round(share * len(texts)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator, dtype=torch.int64, device="cpu")
    chosen = set(order[:held_out].tolist())
    return (
        [text for i, text in enumerate(texts) if i not in chosen],
        [text for i, text in enumerate(texts) if i in chosen],
    )


def text_hash(texts: Iterable[str]) -> str:
    """The digest of the data in a ticket: SHA-256 (128 bits kept) of the texts in order."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\n")
    return sha.hexdigest()[:32]


class MaskedTexts(Dataset):
    """Token sequences with new masks in every epoch.

    Each token except `<s>`, `</s>` and padding is chosen with `probability`; of the chosen tokens 80 % become `<mask>`,
    10 % a random token of the vocabulary, 10 % stay. Items are {"input_ids", "labels"}, int64 [tokens], with label -100
    for tokens that are not chosen.

    The choice is a counter-based function of (seed, epoch, example), independent of batches, workers, processes and
    other random numbers, so a resumed run sees the same masks. `begin_epoch` changes them; without it they stay the
    same, as evaluation needs.

    Args:
        texts: one per line.
        tokenizer: the model's tokenizer.
        length: tokens of an example.
        packed: join all texts, each between `<s>` and `</s>`, and cut them into blocks of `length` tokens; an
            incomplete last block is dropped. False: one text per example, cut to `length`.
        probability: the probability with which a token is chosen.
        seed: seed of the masks.
        progress: show a progress bar.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 256,
        packed: bool = True,
        probability: float = 0.15,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.tokens, self.offsets = _tokenize(texts, tokenizer, None if packed else length, progress)
        if packed:
            blocks = len(self.tokens) // length
            self.offsets = np.arange(blocks + 1, dtype=np.int64) * length
        if len(self) == 0:
            per_block = f" of {length} tokens; give more text or line_by_line=True"
            wanted = per_block if packed else "; give texts that are not empty"
            raise ValueError(f"{len(self.tokens)} tokens give no example{wanted}")
        self.probability, self.seed = probability, seed
        self.vocabulary, self.mask_id = len(tokenizer), tokenizer.mask_token_id
        self.special = np.unique(
            [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id,
                         tokenizer.pad_token_id) if i is not None]
        )  # fmt: skip
        # in shared memory, for running dataloader workers
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.offsets).max())

    def begin_epoch(self, epoch: int) -> None:
        """Draws other masks for an epoch, in worker processes too. The same epoch always has the same masks."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)
        counter = np.array([0, 0, index, int(self.epoch)], dtype=np.uint64)
        draws = np.random.Philox(key=self.seed, counter=counter).random_raw(2 * len(tokens)).reshape(2, -1)
        uniform = (draws[0] >> np.uint64(11)) * 2.0**-53  # [0, 1): chosen below `probability`, then split 80 : 10 : 10
        chosen = (uniform < self.probability) & ~np.isin(tokens, self.special)
        kind = uniform / self.probability
        random_tokens = (draws[1] % np.uint64(self.vocabulary)).astype(np.int64)
        masked = np.where(kind < 0.8, self.mask_id, np.where(kind < 0.9, random_tokens, tokens))
        return {
            "input_ids": torch.from_numpy(np.where(chosen, masked, tokens)),
            "labels": torch.from_numpy(np.where(chosen, tokens, IGNORED_LABEL)),
        }


def _tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int | None, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, int32 [T], and offsets of the non-empty texts, int64 [texts + 1]."""
    lines = [text for text in (raw.strip() for raw in texts) if text]
    pieces, lengths = [], [0]
    for start in tqdm(range(0, len(lines), _TOKENIZER_BATCH), "tokenize", disable=not progress, unit="k lines"):
        batch = tokenizer(
            lines[start : start + _TOKENIZER_BATCH],
            truncation=length is not None,
            max_length=length,
            return_attention_mask=False,
            verbose=False,  # no warning for long lines: they are packed or cut to `length`
        )["input_ids"]
        pieces += [np.asarray(ids, dtype=np.int32) for ids in batch]
        lengths += [len(ids) for ids in batch]
    return np.concatenate([np.empty(0, np.int32), *pieces]), np.cumsum(lengths, dtype=np.int64)


class PadRight:
    """Collates examples of `MaskedTexts`: pads to the longest; adds the attention mask. All int64 [batch, longest]."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        def padded(key: str, value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence([e[key] for e in examples], batch_first=True, padding_value=value)

        input_ids = padded("input_ids", self.pad_id)
        lengths = torch.tensor([len(e["input_ids"]) for e in examples], dtype=torch.int64, device="cpu")
        attention_mask = (torch.arange(input_ids.shape[1], dtype=torch.int64, device="cpu") < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": padded("labels", IGNORED_LABEL)}
