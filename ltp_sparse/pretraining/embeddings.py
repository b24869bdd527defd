"""Initial word embeddings from parallel sentences: pieces that occur in the same rows get similar vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

_ROUNDS = 5
_SPARE = 16  # further dimensions, which make the kept ones more accurate


def parallel_embeddings(
    rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, hidden: int, *, seed: int = 0
) -> Tensor:
    """A vector for each piece of the tokenizer, by latent semantic indexing across languages.

    A row with all its translations is one document (Dumais et al., AAAI Spring Symposium 1997). Counts of pieces in
    rows are divided by sqrt(total of the piece * total of the row), as in correspondence analysis. Subspace iteration
    finds the largest singular vectors. A row weighs as much as it has pairs of languages, because rows in many
    languages connect these better.

    Args:
        rows: each row: language -> sentence.
        tokenizer: the model's tokenizer.
        hidden: number of dimensions.
        seed: seed of the initial subspace.

    Returns:
        float32 [pieces, hidden]: unit vectors, and zeros for pieces that occur in no row.

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
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(len(tokenizer), kept, generator=generator, dtype=torch.float32, device="cpu")
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
    """Writes vectors into the word embeddings of a model. Pieces with a zero vector keep their embedding.

    Args:
        model: a model with random weights.
        embeddings: float32 [pieces, hidden] of `parallel_embeddings`. They are scaled to the length of random ones.
    """
    words = model.roberta.embeddings.word_embeddings.weight
    length = model.config.initializer_range * embeddings.shape[1] ** 0.5
    words.copy_(torch.where(embeddings.any(1, keepdim=True), length * embeddings.to(words.device), words))
