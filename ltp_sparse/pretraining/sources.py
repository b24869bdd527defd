"""Sources of text for pre-training. They give batches of masked tokens, which depend on a random generator only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ltp_sparse.tasks.generated.inference import Document

_MASKED = 0.15
_WHOLE = 0.8  # share of the documents with an answer in which only the answer is masked
_POWER = 0.5  # the probability of a language grows with this power of its number of tokens
_FIRST_WORD = 4  # smaller ids are special tokens


@dataclass(frozen=True)
class Batch:
    """A batch of masked tokens.

    Attributes:
        tokens: int64 [B, L], the original tokens.
        seen: int64 [B, L], the input of the model.
        chosen: bool [B, L], True at the tokens to predict.
    """

    tokens: Tensor
    seen: Tensor
    chosen: Tensor


class Source(Protocol):
    """Texts from which batches are drawn."""

    def draw(self, rng: np.random.Generator, tokens: int) -> Batch:
        """Draws a batch of about this many tokens."""


class Sentences:
    """Blocks of sentences of one language. 15 % of the tokens are masked, see `masked`.

    The sentences of a language are shuffled once. A block begins at a random one, continues with the next ones, and is
    cut at `length` tokens. The probability of a language is proportional to a power of its number of tokens, as for
    XLM-R (arXiv 1911.02116, section 3.1), which favours small corpora.

    Args:
        texts: language -> sentences.
        tokenizer: the model's tokenizer.
        length: tokens of a block.
        summarise: `<s>` also predicts a piece, see `summarised`.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 64,
        summarise: bool = False,
    ) -> None:
        self.length, self.vocabulary, self.mask_id = length, len(tokenizer), tokenizer.mask_token_id
        self.begin_id = tokenizer.bos_token_id if summarise else None
        self._tokens: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        order = np.random.default_rng(0)
        for sentences in texts.values():
            encoded = tokenizer([sentences[i] for i in order.permutation(len(sentences))], verbose=False)["input_ids"]
            tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
            self._starts.append(np.cumsum([0, *map(len, encoded)])[:-1])
            self._tokens.append(np.concatenate([tokens, np.resize(tokens, length)]))
        counts = np.array([len(tokens) for tokens in self._tokens], dtype=np.float64)
        self.shares = dict(zip(texts, (counts**_POWER / (counts**_POWER).sum()).tolist(), strict=True))

    def draw(self, rng: np.random.Generator, tokens: int) -> Batch:
        rows = []
        for language in rng.choice(len(self._tokens), tokens // self.length, p=list(self.shares.values())):
            start = rng.choice(self._starts[language])
            rows.append(self._tokens[language][start : start + self.length])
        ids = np.stack(rows)
        batch = masked(ids, _chosen(ids, rng), rng, self.vocabulary, self.mask_id)
        return batch if self.begin_id is None else summarised(batch, self.begin_id)


class Translations:
    """Pairs of a sentence and its translation, `<s> A </s></s> B </s>`. 15 % of the tokens are masked, see `masked`.

    This is translation language modelling (arXiv 1901.07291, section 3.3). A word that is masked in one language may
    stand in the other, so that the model learns to align the languages.

    Args:
        rows: each row: language -> sentence, in at least two languages.
        tokenizer: the model's tokenizer.
        length: tokens of a pair.
        summarise: `<s>` also predicts a piece, see `summarised`.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 128,
        summarise: bool = False,
    ) -> None:
        self.vocabulary, self.mask_id, self.pad_id = len(tokenizer), tokenizer.mask_token_id, tokenizer.pad_token_id
        texts, half = [text for row in rows for text in row.values()], length // 2 - 2
        flat = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=half)["input_ids"]
        encoded = iter(flat)
        self._rows = [[next(encoded) for _ in row] for row in rows]
        self._ends = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._summarise = summarise
        self._mean = 2 * sum(map(len, flat)) / max(1, len(flat)) + 4

    def draw(self, rng: np.random.Generator, tokens: int) -> Batch:
        begin, end = self._ends
        pairs = []
        for row in rng.integers(len(self._rows), size=max(1, int(tokens / self._mean))):
            one, two = rng.choice(len(self._rows[row]), 2, replace=False)
            pairs.append([begin, *self._rows[row][one], end, end, *self._rows[row][two], end])
        ids = _padded(pairs, self.pad_id)
        batch = masked(ids, _chosen(ids, rng), rng, self.vocabulary, self.mask_id)
        return summarised(batch, begin) if self._summarise else batch


class Documents:
    """Generated documents, one per row. Answers to questions are always masked.

    In most documents with an answer nothing else is masked, because the model could then often only guess the answer.

    Args:
        documents: the documents.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary, self.mask_id = len(tokenizer), tokenizer.mask_token_id
        encoded = tokenizer([document.text for document in documents])["input_ids"]
        self._lengths = np.array([len(ids) for ids in encoded])
        self._ids = _padded(encoded, tokenizer.pad_token_id)
        # a document with an answer ends with the answer, a full stop and </s>
        answered = np.array([document.answer is not None for document in documents])
        self._answers = np.where(answered, self._lengths - 3, -1)

    def draw(self, rng: np.random.Generator, tokens: int) -> Batch:
        rows = rng.integers(len(self._ids), size=int(tokens / self._lengths.mean()))
        ids, answers = self._ids[rows, : self._lengths[rows].max()], self._answers[rows]
        chosen, asks = _chosen(ids, rng), answers >= 0
        chosen[asks & (rng.random(len(ids)) < _WHOLE)] = False
        batch = masked(ids, chosen, rng, self.vocabulary, self.mask_id)
        at = torch.from_numpy(asks.nonzero()[0]), torch.from_numpy(answers[asks])
        batch.chosen[at] = True
        batch.seen[at] = self.mask_id
        return batch


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """int64 [rows, longest]"""
    ids = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids


def _chosen(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """15 % of the tokens that are not special."""
    return (rng.random(ids.shape) < _MASKED) & (ids >= _FIRST_WORD)


def masked(ids: np.ndarray, chosen: np.ndarray, rng: np.random.Generator, vocabulary: int, mask_id: int) -> Batch:
    """The batch in which, of the chosen tokens, 80 % become `<mask>`, 10 % become a random token, and 10 % stay."""
    kind = rng.random(ids.shape)
    other = rng.integers(_FIRST_WORD, vocabulary - 1, size=ids.shape)
    seen = np.where(chosen & (kind < 0.8), mask_id, np.where(chosen & (kind < 0.9), other, ids))
    return Batch(torch.from_numpy(ids), torch.from_numpy(seen), torch.from_numpy(chosen))


def summarised(batch: Batch, begin_id: int) -> Batch:
    """The batch in which `<s>` predicts the rarest masked piece of its text. The input does not change.

    Nothing else trains the output at `<s>`, which classification heads read. The tokenizer sorts its pieces by
    frequency, so the rarest piece has the highest id.
    """
    begins = batch.tokens == begin_id
    text = begins.cumsum(1)
    pieces = torch.where(batch.chosen, batch.tokens, 0)
    of_text = torch.zeros(len(text), int(text.max()) + 1, dtype=torch.int64, device="cpu")
    rarest = of_text.scatter_reduce(1, text, pieces, "amax").gather(1, text)
    asked = begins & (rarest > 0)
    return Batch(torch.where(asked, rarest, batch.tokens), batch.seen, batch.chosen | asked)
