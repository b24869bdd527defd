"""Training data of pre-training: batches of masked tokens, each a function of a random generator alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ltp_sparse.tasks.generated.inference import Document

_MASKED = 0.15
_WHOLE = 0.8  # share of the answered documents in which only the answer is masked
_POWER = 0.5  # of a language's number of tokens
_FIRST_WORD = 4  # ids below are special tokens


@dataclass(frozen=True)
class Batch:
    """A batch of masked tokens.

    Attributes:
        tokens: int64 [B, L], the original tokens
        seen: int64 [B, L], the input of the model
        chosen: bool [B, L], the tokens to predict
    """

    tokens: Tensor
    seen: Tensor
    chosen: Tensor


class Source(Protocol):
    """Something to draw batches from."""

    def draw(self, rng: np.random.Generator, tokens: int) -> Batch:
        """A batch of about this many tokens."""


class Sentences:
    """Blocks of a language's sentences, masked at 15 % as XLM-R's: 80 % `<mask>`, 10 % a random token, 10 % kept.

    A block begins at a random sentence, continues with the following ones (shuffled once) and is cut at `length`
    tokens. As in XLM-R (arXiv 1911.02116, section 3.1), languages are drawn with a probability proportional to a power
    of their number of tokens, which favours small corpora.

    Args:
        texts: language -> sentences.
        tokenizer: of the model.
        length: tokens of a block.
        summarise: each `<s>` also predicts a piece; see `summarised`.
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
        chosen = (rng.random(ids.shape) < _MASKED) & (ids >= _FIRST_WORD)
        batch = masked(ids, chosen, rng, self.vocabulary, self.mask_id)
        return batch if self.begin_id is None else summarised(batch, self.begin_id)


class Translations:
    """A sentence and its translation, `<s> A </s></s> B </s>`, masked as `Sentences`.

    Translation language modelling (arXiv 1901.07291, section 3.3): a masked word of one language can be read in the
    other, which aligns the languages.

    Args:
        rows: language -> sentence, each in at least two languages.
        tokenizer: of the model.
        length: tokens of a pair.
        summarise: each `<s>` also predicts a piece; see `summarised`.
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
        half = length // 2 - 2
        flat = tokenizer(
            [text for row in rows for text in row.values()], add_special_tokens=False, truncation=True, max_length=half
        )["input_ids"]
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
        ids = np.full((len(pairs), max(map(len, pairs))), self.pad_id, dtype=np.int64)
        for padded, pair in zip(ids, pairs, strict=True):
            padded[: len(pair)] = pair
        chosen = (rng.random(ids.shape) < _MASKED) & (ids >= _FIRST_WORD)
        batch = masked(ids, chosen, rng, self.vocabulary, self.mask_id)
        return summarised(batch, begin) if self._summarise else batch


class Documents:
    """Generated documents, one per row. The answer to a question is always masked, and mostly nothing else."""

    def __init__(self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary, self.mask_id, self.pad_id = len(tokenizer), tokenizer.mask_token_id, tokenizer.pad_token_id
        encoded = tokenizer([document.text for document in documents])["input_ids"]
        self._lengths = np.array([len(ids) for ids in encoded])
        self._ids = np.full((len(encoded), self._lengths.max()), self.pad_id, dtype=np.int64)
        for row, ids in zip(self._ids, encoded, strict=True):
            row[: len(ids)] = ids
        # a document with an answer ends with the answer, a full stop and </s>
        answered = np.array([document.answer is not None for document in documents])
        self._answers = np.where(answered, self._lengths - 3, -1)

    def draw(self, rng: np.random.Generator, tokens: int) -> Batch:
        rows = rng.integers(len(self._ids), size=int(tokens / self._lengths.mean()))
        ids, answers = self._ids[rows, : self._lengths[rows].max()], self._answers[rows]
        chosen = (rng.random(ids.shape) < _MASKED) & (ids >= _FIRST_WORD)
        asks = answers >= 0
        chosen[asks & (rng.random(len(ids)) < _WHOLE)] = False  # else the answer could often only be guessed
        batch = masked(ids, chosen, rng, self.vocabulary, self.mask_id)
        at = torch.from_numpy(asks.nonzero()[0]), torch.from_numpy(answers[asks])
        batch.chosen[at] = True
        batch.seen[at] = self.mask_id
        return batch


def masked(ids: np.ndarray, chosen: np.ndarray, rng: np.random.Generator, vocabulary: int, mask_id: int) -> Batch:
    """80 % of the chosen tokens become `<mask>`, 10 % a random one, 10 % stay."""
    kind = rng.random(ids.shape)
    other = rng.integers(_FIRST_WORD, vocabulary - 1, size=ids.shape)
    seen = np.where(chosen & (kind < 0.8), mask_id, np.where(chosen & (kind < 0.9), other, ids))
    return Batch(torch.from_numpy(ids), torch.from_numpy(seen), torch.from_numpy(chosen))


def summarised(batch: Batch, begin_id: int) -> Batch:
    """The batch with another target for `<s>`: the rarest masked piece of its text.

    Otherwise nothing trains the output at `<s>`, which classification heads read. Ids of pieces ascend as frequencies
    fall, so the rarest piece has the highest id. `seen` does not change: the model still sees `<s>`.
    """
    begins = batch.tokens == begin_id
    text = begins.cumsum(1)
    pieces = torch.where(batch.chosen, batch.tokens, 0)
    rarest = torch.zeros(len(text), int(text.max()) + 1, dtype=torch.int64, device="cpu").scatter_reduce(
        1, text, pieces, "amax"
    )
    rarest = rarest.gather(1, text)
    asked = begins & (rarest > 0)
    return Batch(torch.where(asked, rarest, batch.tokens), batch.seen, batch.chosen | asked)
