"""Deep prompt tuning: learned keys and values in every layer (P-tuning v2)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltp_sparse.models.attachment import Attachment

if TYPE_CHECKING:
    from transformers import XLMRobertaConfig


class DeepPrompt(Attachment):
    """n keys and n values per layer and head, which every token attends to besides the tokens.

    The parameter is a matrix [n, 2 L H] drawn from N(0, 1), with the axes row, layer, key or value, head, head size
    (XLM-R-base, n=4: 73,728 parameters). While attached, attention always runs in `scaled_dot_product_attention` and
    returns no attention weights.

    Args:
        config: the model's configuration.
        n: number of keys and of values per layer and head.
        projection: None, or the inner width d (512 in the source) of an MLP H -> d -> 2 L H with tanh that is applied
            to rows [n, H] (n=4, d=512: 9,852,416 parameters).
        dropout: probability with which an entry of the keys and values is dropped, drawn for each example.
        position_offset: shift of the tokens' positions; None: n, as if the prompt took the first positions.
        rows: initial rows of a prompt without projection, as from `bake`.
    """

    key = "deep_prompt"

    def __init__(
        self,
        config: XLMRobertaConfig,
        n: int,
        *,
        projection: int | None = None,
        dropout: float = 0.1,
        position_offset: int | None = None,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        offset = n if position_offset is None else position_offset
        if n < 1 or offset < 0 or (projection is not None and projection < 1):
            raise ValueError(
                "DeepPrompt: n and projection must be at least 1, position_offset at least 0, got "
                f"{n}, {projection} and {position_offset}"
            )
        self.n, self.position_offset = n, offset
        self.layers, self.heads, self.hidden = _sizes(config)
        width = 2 * self.layers * self.hidden
        shape = (n, width if projection is None else self.hidden)
        if rows is not None and (projection is not None or rows.shape != shape):
            raise ValueError(
                f"DeepPrompt: expected initial rows of shape {(n, width)} and no projection, got {tuple(rows.shape)} "
                f"and projection={projection}"
            )
        self.rows = nn.Parameter(torch.randn(shape) if rows is None else rows.detach().clone())
        self.projection: nn.Sequential | None = None
        if projection is not None:
            self.projection = nn.Sequential(nn.Linear(self.hidden, projection), nn.Tanh(), nn.Linear(projection, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self) -> Tensor:
        """All keys and values [L, 2, heads, n, H / heads], in the dtype of the weights also under autocast."""
        return torch.stack([self._layer(index) for index in range(self.layers)])

    @torch.no_grad()
    def bake(self) -> Tensor:
        """The matrix [n, 2 L H], for inference with `DeepPrompt(config, n, rows=...)`."""
        return self().permute(3, 0, 1, 2, 4).reshape(self.n, -1).clone()

    def _layer(self, index: int) -> Tensor:
        """Keys and values of one layer, [2, heads, n, H / heads]."""
        # One layer at a time, with nothing kept: gradient checkpointing may run any layer again.
        span = slice(2 * index * self.hidden, 2 * (index + 1) * self.hidden)
        with torch.autocast(self.rows.device.type, enabled=False):
            if self.projection is None:
                rows = self.rows[:, span]
            else:
                last: Any = self.projection[2]
                rows = F.linear(self.projection[:2](self.rows), last.weight[span], last.bias[span])
        return rows.reshape(self.n, 2, self.heads, -1).permute(1, 2, 0, 3)

    def _check(self, roberta: Any) -> None:
        if (sizes := _sizes(roberta.config)) != (self.layers, self.heads, self.hidden):
            raise ValueError(
                f"DeepPrompt: expected a model of {self.layers} layers, {self.heads} heads and hidden size "
                f"{self.hidden}, got {', '.join(map(str, sizes))}; make the prompt from this model's config"
            )

    def _connect(self, model: nn.Module, roberta: Any) -> None:
        for index, layer in enumerate(roberta.encoder.layer):
            attention = layer.attention.self
            self._override(attention, partial(self._attend, attention, index))
        positions = roberta.embeddings.position_embeddings
        self._handles.append(positions.register_forward_pre_hook(self._shift))

    def _attend(
        self, attention: Any, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, length, _ = hidden_states.shape
        shape = (batch, length, self.heads, -1)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)  # [B, heads, L, H / heads]
            for project in (attention.query, attention.key, attention.value)
        )
        prefix = self._layer(index).to(key.dtype).unsqueeze(1)  # [2, 1, heads, n, H / heads]
        keys, values = self.dropout(prefix.expand(-1, batch, -1, -1, -1))
        attended = F.scaled_dot_product_attention(
            query,
            torch.cat([keys, key], 2),
            torch.cat([values, value], 2),
            attn_mask=self._extended(attention_mask),
            dropout_p=attention.dropout.p if attention.training else 0.0,
        )
        return attended.transpose(1, 2).reshape(batch, length, -1), None

    def _extended(self, mask: Tensor | None) -> Tensor | None:
        """The model's attention mask (bool or additive) with n unmasked columns in front."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(
                "DeepPrompt: expected an attention mask [B, 1, L, L], got another kind; call "
                "model.set_attn_implementation('sdpa')"
            )
        return F.pad(mask, (self.n, 0), value=mask.dtype == torch.bool)

    def _shift(self, positions: nn.Embedding, args: tuple[Tensor]) -> tuple[Tensor]:
        (ids,) = args
        padding = positions.padding_idx or 0
        longest = positions.num_embeddings - 1 - padding - self.position_offset
        if ids.shape[1] > longest:
            raise ValueError(
                f"DeepPrompt: expected inputs of at most {longest} tokens, since positions are shifted by "
                f"{self.position_offset}, got {ids.shape[1]}; give a smaller max_length, or position_offset=0"
            )
        return (ids + self.position_offset * (ids != padding),)


def _sizes(config: XLMRobertaConfig) -> tuple[int, int, int]:
    return config.num_hidden_layers, config.num_attention_heads, config.hidden_size
