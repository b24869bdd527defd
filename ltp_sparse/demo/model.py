"""A small XLM-R of our own: architecture, and pre-training as a masked language model on the demo's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ltp_sparse.generated.inference import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, XLMRobertaForMaskedLM

_MASKED = 0.15
_BATCH = 64
_LEARNING_RATE = 1e-3
_WARM_UP = 100


def small_xlmr(vocabulary: int, seed: int = 0) -> XLMRobertaForMaskedLM:
    """XLM-R's architecture with hidden size 128, 2 layers and 64 positions; about half a million parameters."""
    from transformers import XLMRobertaConfig

    from ltp_sparse.training.backbone import backbone_from_config

    config = XLMRobertaConfig(
        vocab_size=vocabulary, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5, initializer_range=0.05,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return backbone_from_config(config, decoupled=False)


def pretrain(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    steps: int,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Trains `model` in place, `steps` updates of 64 documents; returns the loss of the answers at the end.

    Where a document answers a question, mostly the answer alone is masked; elsewhere 15 % of the words are.
    """
    from tqdm.auto import tqdm

    ids, answers = _encode(tokenizer, documents)
    lengths = (ids != tokenizer.pad_token_id).sum(1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP) * max(0.02, 1 - step / steps)
    )
    model.train()
    answer_loss = 0.0
    for step in (bar := tqdm(range(steps), "pre-train", unit="step", disable=not progress)):
        rows = torch.randint(len(ids), (_BATCH,), generator=generator)
        tokens = ids[rows, : int(lengths[rows].max())]
        chosen, is_answer = _choose(tokens, answers[rows], generator)
        kept = torch.rand(tokens.shape, generator=generator) < 0.1
        masked = torch.where(chosen & (is_answer | ~kept), tokenizer.mask_token_id, tokens)
        hidden = model.roberta(masked, attention_mask=(tokens != tokenizer.pad_token_id).long()).last_hidden_state
        losses = F.cross_entropy(model.lm_head(hidden[chosen]), tokens[chosen], reduction="none")
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            answer_loss = losses[is_answer[chosen]].mean().item()
            bar.set_postfix(loss=f"{losses.mean().item():.2f}", answers=f"{answer_loss:.2f}")
    model.eval()
    return answer_loss


def _encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Token ids [N, longest], padded, and the position of each answer [N], -1 where there is none."""
    encoded = tokenizer([document.text for document in documents])["input_ids"]
    ids = torch.full((len(encoded), max(map(len, encoded))), tokenizer.pad_token_id)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    # an exchange ends with the answer, a stop and </s>
    at = [len(tokens) - 3 if document.answer else -1 for tokens, document in zip(encoded, documents, strict=True)]
    return ids, torch.tensor(at)


def _choose(tokens: Tensor, answers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """bool [B, L]: the tokens to predict, and those of them that are answers."""
    chosen = (torch.rand(tokens.shape, generator=generator) < _MASKED) & (tokens > 3)
    asks = answers >= 0
    # the sentences of most exchanges stay whole, or the answer would be a guess
    chosen[asks & (torch.rand(len(tokens), generator=generator) < 0.8)] = False
    is_answer = torch.zeros_like(chosen)
    is_answer[asks.nonzero().view(-1), answers[asks]] = True
    return chosen | is_answer, is_answer
