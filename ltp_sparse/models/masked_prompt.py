"""A masked language model with a soft prompt and a verbalizer: from encoded examples to class logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltp_sparse.models.prompt_encoder import PromptEncoder
from ltp_sparse.prompting.inputs import IGNORED_LABEL
from ltp_sparse.prompting.verbalizers import Verbalizer

if TYPE_CHECKING:
    from transformers import XLMRobertaForMaskedLM


class PromptedMaskedLM(nn.Module):
    """`XLMRobertaForMaskedLM` with a prompt encoder before it and a verbalizer after it.

    The encoder and the LM head of `language_model` are shared, not copied, and keep their names ("roberta.*",
    "lm_head.*"), so a ticket over the language model also fits this model; the prompt adds "prompt_encoder.*". The LM
    head may be tied or decoupled. It runs at `<mask>` only, its decoder for the verbalizer's words only.

    Args:
        language_model: the model.
        prompt_encoder: None for a discrete prompt, whose inputs have no prompt slots.
        verbalizer: words of the classes.
        frozen_words: score words by a frozen copy of their rows of the output embedding. That is a decoupled head
            without a copy of the whole matrix (768 MB for XLM-R-base), also for a tied model.
    """

    base_model_prefix = "roberta"

    def __init__(
        self,
        language_model: XLMRobertaForMaskedLM,
        prompt_encoder: PromptEncoder | None,
        verbalizer: Verbalizer,
        *,
        frozen_words: bool = False,
    ) -> None:
        super().__init__()
        config = language_model.config
        if prompt_encoder is not None and prompt_encoder.rows.shape[1] != config.hidden_size:
            raise ValueError(
                f"PromptedMaskedLM: expected a prompt encoder of hidden size {config.hidden_size}, that of the "
                f"language model, got {prompt_encoder.rows.shape[1]}"
            )
        ids = [token for tokens in verbalizer.token_ids for token in tokens]
        if max(ids) >= config.vocab_size:
            raise ValueError(
                f"PromptedMaskedLM: the verbalizer has token {max(ids)}, the model {config.vocab_size} embedding rows; "
                "pass the tokenizer that the model was trained with"
            )
        self.config = config
        self.roberta = language_model.roberta
        self.lm_head = language_model.lm_head
        self.prompt_encoder = prompt_encoder
        self._words_per_label = [len(tokens) for tokens in verbalizer.token_ids]
        self.word_ids: Tensor
        self.register_buffer(
            "word_ids", torch.tensor(ids, device=self.lm_head.bias.device, dtype=torch.int64), persistent=False
        )
        rows = self.lm_head.decoder.weight.detach()[self.word_ids].clone() if frozen_words else None
        self.word_rows: Tensor | None
        self.register_buffer("word_rows", rows, persistent=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.roberta.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_positions: Tensor,
        mask_positions: Tensor,
        labels: Tensor | None = None,
    ) -> dict[str, Any]:
        """Class logits, and the loss if there are labels.

        Args:
            input_ids: int64 [B, L].
            attention_mask: int64 [B, L].
            prompt_positions: int64 [B, n].
            mask_positions: int64 [B].
            labels: int64 [B], class indices or `IGNORED_LABEL`.

        Returns:
            "logits" [B, classes] float32 in the order of the verbalizer and, with labels, "loss": the mean over
            labelled examples of the cross-entropy over the classes (not over the vocabulary).
        """
        hidden = self.roberta(
            inputs_embeds=self._embed(input_ids, prompt_positions),
            attention_mask=attention_mask,
            position_ids=self._position_ids(input_ids),
        ).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device, dtype=torch.int64)
        logits = self._class_logits(hidden[rows, mask_positions])
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL), "logits": logits}

    def _embed(self, input_ids: Tensor, prompt_positions: Tensor) -> Tensor:
        # All embeddings are looked up, <mask> included; only those of slots are overwritten and pass no gradient to E.
        embeddings = self.roberta.embeddings.word_embeddings(input_ids)  # [B, L, H]
        n = 0 if self.prompt_encoder is None else len(self.prompt_encoder.rows)
        if prompt_positions.shape[1] != n:
            raise ValueError(
                f"PromptedMaskedLM: the input has {prompt_positions.shape[1]} prompt slots, the prompt encoder gives "
                f"{n}; make the template with n_prompt={n}"
            )
        if self.prompt_encoder is None:
            return embeddings
        prompt = self.prompt_encoder().to(embeddings.dtype)  # [n, H]
        slots = prompt_positions.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])  # [B, n, H]
        return embeddings.scatter(1, slots, prompt.expand(len(input_ids), -1, -1))

    def _position_ids(self, input_ids: Tensor) -> Tensor:
        # The model sees embeddings only and would count padding, which is wrong for padding on the left.
        real = (input_ids != self.config.pad_token_id).long()
        return real.cumsum(1) * real + self.config.pad_token_id

    def _class_logits(self, hidden: Tensor) -> Tensor:
        """Mean logit of each class's words from the hidden states at `<mask>` [B, H]."""
        head = self.lm_head
        features = head.layer_norm(F.gelu(head.dense(hidden)))
        weight = self.word_rows  # [words, H]
        if weight is None:
            # A lookup, not an index: a tied sparse matrix needs gradients of the same kind as from the input.
            sparse = self.roberta.embeddings.word_embeddings.sparse
            weight = F.embedding(self.word_ids, head.decoder.weight, sparse=sparse)
        words = F.linear(features, weight, head.decoder.bias[self.word_ids]).float()  # [B, words]
        return torch.stack([part.mean(-1) for part in words.split(self._words_per_label, dim=-1)], dim=-1)
