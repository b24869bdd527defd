"""A small model that ties its embedding, as XLM-R does, and the names of two of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING = "roberta.embeddings.word_embeddings.weight"
DENSE = "roberta.encoder.layer.0.dense.weight"


class TiedModel(nn.Module):
    """Embedding and LM head share their weight, as in XLM-R; the head is registered first, without effect."""

    base_model_prefix = "roberta"

    def __init__(self, vocabulary: int = 40, hidden: int = 16) -> None:
        super().__init__()
        self.lm_head = nn.ModuleDict({"decoder": nn.Linear(hidden, vocabulary)})
        layers = [
            nn.ModuleDict(
                {"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden)},
            )
            for _ in range(2)
        ]
        self.roberta = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"word_embeddings": nn.Embedding(vocabulary, hidden)}),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
            }
        )
        self.lm_head["decoder"].weight = self.embedding.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.roberta["embeddings"]["word_embeddings"]

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.roberta["encoder"]["layer"]:
            hidden = layer["LayerNorm"](hidden + torch.tanh(layer["dense"](hidden)))
        return self.lm_head["decoder"](hidden)
