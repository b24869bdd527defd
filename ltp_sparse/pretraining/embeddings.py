"""Initial word embeddings from parallel sentences: pieces of all languages that occur in the same rows are similar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

_ROUNDS = 5
_SPARE = 16  # dimensions worked with beyond those kept


def parallel_embeddings(
    rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, hidden: int, *, seed: int = 0
) -> Tensor:
    """float32 [pieces, hidden]: a unit vector for each piece, zeros for pieces that occur in no row.

    All translations of a row are one document (cross-language latent semantic indexing: Dumais et al., AAAI Spring
    Symposium 1997). The counts are weighted as in correspondence analysis, count / sqrt(piece's total * row's total),
    and reduced to the largest singular vectors by subspace iteration. The weight of a row is its number of pairs of
    languages, since rows in many languages connect these better.

    Args:
        rows: language -> sentence.
        tokenizer: of the model.
        hidden: dimensions.
        seed: of the initial subspace.

    Raises:
        ValueError: there are fewer rows than dimensions.
    """
    kept = hidden + _SPARE
    if len(rows) < kept:
        raise ValueError(f"parallel_embeddings: expected at least {kept} rows for {hidden} dimensions, got {len(rows)}")
    texts = [text for row in rows for text in row.values()]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    languages = np.array([len(row) for row in rows])
    row_of_text = np.repeat(np.arange(len(rows)), languages)
    row = np.repeat(row_of_text, [len(ids) for ids in encoded])
    cells, counts = np.unique(row * len(tokenizer) + np.concatenate(encoded), return_counts=True)
    row, piece = np.divmod(cells, len(tokenizer))
    mass = counts * (languages * (languages - 1))[row]
    scale = np.sqrt(np.bincount(piece, mass)[piece] * np.bincount(row, mass)[row])
    values = torch.from_numpy(np.divide(mass, scale, out=np.zeros(len(mass)), where=scale > 0)).float()
    table = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([piece, row])), values, (len(tokenizer), len(rows)), check_invariants=True
    )
    across = table.t().coalesce()
    table = table.coalesce()
    basis = torch.randn(
        len(tokenizer), kept, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(table @ (across @ basis)).Q
    projected = across @ basis
    order = torch.linalg.eigh(projected.T @ projected).eigenvectors.flip(1)  # largest first
    places = basis @ order[:, :hidden]
    occurs = torch.zeros(len(tokenizer), dtype=torch.bool, device="cpu")
    occurs[torch.from_numpy(piece)] = True
    lengths = places.norm(dim=1, keepdim=True)
    return torch.where(occurs[:, None], places / lengths.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


@torch.no_grad()
def start_from(model: XLMRobertaForMaskedLM, embeddings: Tensor) -> None:
    """Initialises word embeddings with these vectors, scaled to the length of random ones; zeros are skipped."""
    words = model.roberta.embeddings.word_embeddings.weight
    length = model.config.initializer_range * embeddings.shape[1] ** 0.5
    words.copy_(torch.where(embeddings.any(1, keepdim=True), length * embeddings.to(words.device), words))
