"""Soft prompt tuning of a causal language model (XGLM or BLOOM): from texts to class logits.

The prompt follows the text, and the token predicted at its last row is the answer: `text [PROMPT] x n </s>`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltp_sparse.prompting.inputs import IGNORED_LABEL, PromptedText, token_ids
from ltp_sparse.prompting.templates import label_index
from ltp_sparse.tasks.sib200 import LABELS as TOPICS
from ltp_sparse.tasks.texts import Text

if TYPE_CHECKING:
    from transformers import BloomForCausalLM, PreTrainedTokenizerBase, XGLMForCausalLM

MAX_LENGTH = 128
"""Tokens of an input, prompt and `</s>` included."""

TOPIC_WORDS: dict[str, dict[str, str]] = {
    "xglm": dict(
        zip(TOPICS, ("science", "travel", "politics", "sports", "health", "entertainment", "earth"), strict=True)
    ),
    "bloom": dict(zip(TOPICS, ("science", "travel", "government", "play", "health", "fun", "earth"), strict=True)),
}
"""Model type -> topic -> English word, for all languages."""


def encode_prompted(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    classes: Sequence[str],
    n_prompt: int,
    *,
    max_length: int = MAX_LENGTH,
) -> list[PromptedText]:
    """Encodes texts as `T p1..pn </s>`, without other special tokens.

    Args:
        tokenizer: the model's tokenizer.
        texts: texts to encode; those without a label get `IGNORED_LABEL`.
        classes: classes of the task, in the order of the logits.
        n_prompt: number of prompt slots.
        max_length: the most tokens of an input. A longer text loses tokens at its end.

    Raises:
        ValueError: a label is unknown, or `max_length` leaves no room for a token of the text.
    """
    if n_prompt < 1 or (room := max_length - n_prompt - 1) < 1:
        raise ValueError(
            f"encode_prompted: n_prompt must be at least 1 and max_length at least n_prompt + 2, got {n_prompt} and "
            f"{max_length}"
        )
    # Embeddings of slots are overwritten, so any id will do.
    end = [tokenizer.eos_token_id] * (n_prompt + 1)
    cut = [ids[:room] for ids in token_ids(tokenizer, [text.text for text in texts])]
    return [
        PromptedText(
            input_ids=ids + end,
            prompt_positions=list(range(len(ids), len(ids) + n_prompt)),
            labels=label_index(text.label, classes),
        )
        for text, ids in zip(texts, cut, strict=True)
    ]


def word_tokens(
    tokenizer: PreTrainedTokenizerBase, words: Mapping[str, str], classes: Sequence[str] = TOPICS
) -> tuple[int, ...]:
    """The token of each class's word, in the order of `classes`.

    A word should be one token; for other words the last piece is used, as in the source.

    Args:
        tokenizer: the model's tokenizer.
        words: class -> word, such as `TOPIC_WORDS[config.model_type]`.
        classes: the classes of the task.

    Warns:
        UserWarning: a word is not one token.

    Raises:
        ValueError: a class is missing, a word is unknown, or two words are the same token.
    """
    if missing := [name for name in classes if name not in words]:
        raise ValueError(f"word_tokens: expected a word for each of {', '.join(classes)}, none for {missing[0]!r}")
    tokens = tuple(_word_token(tokenizer, words[name]) for name in classes)
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"word_tokens: expected words of different tokens, two of {[words[name] for name in classes]} are the same "
            "token; choose other words"
        )
    return tokens


class CausalPrompt(nn.Module):
    """A prompt P [n, d], learned as its rows, or as P = LN(W2 ReLU(W1 X)) of rows X [n, d] (no residual).

    Args:
        n: rows of the prompt.
        hidden: hidden size d of the model.
        bottleneck: units h of W1 [h, d] and W2 [d, h] (with biases); None: the rows are the prompt.
        compat: keep the LayerNorm at its initial values, as the source does in frozen mode.
        rows: initial rows; None: drawn from U(-0.5, 0.5).
    """

    def __init__(
        self, n: int, hidden: int, bottleneck: int | None = None, *, compat: bool = False, rows: Tensor | None = None
    ) -> None:
        super().__init__()
        if min(n, hidden, 1 if bottleneck is None else bottleneck) < 1:
            raise ValueError(
                f"CausalPrompt: n, hidden and bottleneck must be at least 1, got {n}, {hidden} and {bottleneck}"
            )
        if rows is not None and rows.shape != (n, hidden):
            raise ValueError(f"CausalPrompt: expected initial rows of shape {(n, hidden)}, got {tuple(rows.shape)}")
        self.rows = nn.Parameter(torch.empty(n, hidden).uniform_(-0.5, 0.5) if rows is None else rows.detach().clone())
        self.mlp: nn.Sequential | None = None
        if bottleneck is not None:
            norm = nn.LayerNorm(hidden, elementwise_affine=not compat)
            self.mlp = nn.Sequential(nn.Linear(hidden, bottleneck), nn.ReLU(), nn.Linear(bottleneck, hidden), norm)

    def forward(self) -> Tensor:
        """The prompt P [n, d], computed in the dtype of the weights also under autocast."""
        with torch.autocast(self.rows.device.type, enabled=False):
            return self.rows if self.mlp is None else self.mlp(self.rows)

    @torch.no_grad()
    def bake(self) -> Tensor:
        """A copy of the prompt P [n, d], for inference with `CausalPrompt(n, d, rows=P)`."""
        return self().detach().clone()


class PromptedCausalLM(nn.Module):
    """A causal language model with a soft prompt after the text, which answers with the words of the classes.

    The model and LM head of `language_model` are shared, not copied, and keep their names ("model.*" or
    "transformer.*", "lm_head.*"), so a ticket over the language model also fits this model; the prompt adds "prompt.*".
    The LM head runs at the last row of the prompt only. XGLM multiplies word embeddings by sqrt(d), so the prompt is
    multiplied as well: its rows take the place of embedding rows.

    Args:
        language_model: an XGLM or BLOOM.
        prompt: a prompt of the same hidden size.
        word_ids: the token of each class, see `word_tokens`.
    """

    def __init__(
        self, language_model: XGLMForCausalLM | BloomForCausalLM, prompt: CausalPrompt, word_ids: Sequence[int]
    ) -> None:
        super().__init__()
        config = language_model.config
        if config.model_type not in TOPIC_WORDS:
            raise ValueError(
                f"PromptedCausalLM: expected a model of type {' or '.join(TOPIC_WORDS)}, got {config.model_type!r}"
            )
        if prompt.rows.shape[1] != config.hidden_size:
            raise ValueError(
                f"PromptedCausalLM: expected a prompt of hidden size {config.hidden_size}, that of the language model, "
                f"got {prompt.rows.shape[1]}"
            )
        if len(word_ids) < 2 or max(word_ids) >= config.vocab_size:
            raise ValueError(
                f"PromptedCausalLM: expected at least two words with tokens below {config.vocab_size}, the rows of the "
                f"embedding, got {tuple(word_ids)}; pass the tokenizer that the model was trained with"
            )
        self.config = config
        self.base_model_prefix = language_model.base_model_prefix
        setattr(self, self.base_model_prefix, language_model.base_model)
        self.lm_head = language_model.lm_head
        self.prompt = prompt
        self.word_ids: Tensor
        device = self.lm_head.weight.device
        self.register_buffer("word_ids", torch.tensor(word_ids, device=device, dtype=torch.int64), persistent=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self._base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_positions: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits of the classes' words, and the loss if there are labels.

        Args:
            input_ids: int64 [B, L], padded on either side.
            attention_mask: int64 [B, L].
            prompt_positions: int64 [B, n].
            labels: int64 [B], class indices.

        Returns:
            "logits" [B, classes] and "log_partition" [B], the logsumexp over the vocabulary, both float32 and at the
            last row of the prompt; with labels also "loss" (`vocabulary_loss`).
        """
        positions: dict[str, Tensor] = {}
        if self.config.model_type == "xglm":  # BLOOM reads the attention mask; XGLM would count padding
            positions["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min(0)
        hidden = self._base(
            inputs_embeds=self._embed(input_ids, prompt_positions),
            attention_mask=attention_mask,
            use_cache=False,
            **positions,
        ).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device, dtype=torch.int64)
        vocabulary = self.lm_head(hidden[rows, prompt_positions[:, -1]]).float()  # [B, V]
        outputs = {"logits": vocabulary[:, self.word_ids], "log_partition": vocabulary.logsumexp(-1)}
        if labels is not None:
            outputs["loss"] = vocabulary_loss(outputs, labels)
        return outputs

    @property
    def _base(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def _embed(self, input_ids: Tensor, prompt_positions: Tensor) -> Tensor:
        if prompt_positions.shape[1] != len(self.prompt.rows):
            raise ValueError(
                f"PromptedCausalLM: the input has {prompt_positions.shape[1]} prompt slots, the prompt "
                f"{len(self.prompt.rows)} rows; encode with n_prompt={len(self.prompt.rows)}"
            )
        lookup: Any = self.get_input_embeddings()
        embeddings = lookup(input_ids)  # [B, L, d]
        prompt = (self.prompt() * getattr(lookup, "embed_scale", 1.0)).to(embeddings.dtype)  # [n, d]
        slots = prompt_positions.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])  # [B, n, d]
        return embeddings.scatter(1, slots, prompt.expand(len(input_ids), -1, -1))


def vocabulary_loss(
    outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of the label's word over the whole vocabulary, averaged over the labelled texts of the batch.

    Args:
        outputs: the outputs of `PromptedCausalLM`.
        labels: int64 [B], class indices or `IGNORED_LABEL`.
        num_items_in_batch: labelled texts in the whole batch, if `outputs` is a part of it.
    """
    labelled = labels != IGNORED_LABEL
    chosen = outputs["logits"].gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    losses = (outputs["log_partition"] - chosen) * labelled
    return losses.sum() / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)


def _word_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if not ids or ids[-1] in tokenizer.all_special_ids:
        raise ValueError(f"word_tokens: the tokenizer has no piece for {word!r}, only {pieces}; choose another")
    if len(ids) > 1:
        warnings.warn(
            f"word_tokens: expected {word!r} to be one token, got {pieces}; the last one, {pieces[-1]!r}, is used",
            stacklevel=4,
        )
    return ids[-1]
