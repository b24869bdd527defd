"""A sequence classifier: an XLM-R encoder and a head on the hidden state of `<s>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltp_sparse.prompting.inputs import IGNORED_LABEL, Encoded, token_ids
from ltp_sparse.prompting.templates import MAX_LENGTH, label_index, truncated
from ltp_sparse.tasks.pairs import CLASSES, Pair
from ltp_sparse.tasks.texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM, XLMRobertaModel


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    classes: Sequence[str] = CLASSES,
    *,
    max_length: int = MAX_LENGTH,
) -> list[Encoded]:
    """Encodes pairs as `<s> P </s></s> H </s>`, the input of fine-tuning.

    Args:
        tokenizer: the model's tokenizer.
        pairs: pairs to encode; those without a label get `IGNORED_LABEL`.
        classes: classes of the task, in the order of the logits.
        max_length: the most tokens of an input. A longer pair loses tokens at the end of its longer text, one by one
            (of equally long ones, the hypothesis).

    Raises:
        ValueError: a label is unknown, or `max_length` leaves no room.
    """
    room = max_length - 4
    if room < 2:
        raise ValueError(f"encode_pairs: max_length must be at least 6 (a token of each text), got {max_length}")
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    premises = token_ids(tokenizer, [pair.premise for pair in pairs])
    hypotheses = token_ids(tokenizer, [pair.hypothesis for pair in pairs])
    examples = []
    for pair, premise, hypothesis in zip(pairs, premises, hypotheses, strict=True):
        first, second = truncated((len(premise), len(hypothesis)), room)
        ids = [start, *premise[:first], end, end, *hypothesis[:second], end]
        examples.append(Encoded(input_ids=ids, labels=label_index(pair.label, classes)))
    return examples


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], classes: Sequence[str], *, max_length: int = MAX_LENGTH
) -> list[Encoded]:
    """Encodes texts as `<s> T </s>`.

    Args:
        tokenizer: the model's tokenizer.
        texts: texts to encode; those without a label get `IGNORED_LABEL`.
        classes: classes of the task, in the order of the logits.
        max_length: the most tokens of an input. A longer text loses tokens at its end.

    Raises:
        ValueError: a label is unknown, or `max_length` leaves no room.
    """
    if max_length < 3:
        raise ValueError(f"encode_texts: max_length must be at least 3 (a token of the text), got {max_length}")
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    encoded = token_ids(tokenizer, [text.text for text in texts])
    return [
        Encoded(input_ids=[start, *ids[: max_length - 2], end], labels=label_index(text.label, classes))
        for text, ids in zip(texts, encoded, strict=True)
    ]


class SequenceClassifier(nn.Module):
    """An XLM-R encoder with a classification head on the hidden state of `<s>`.

    The encoder of `language_model` is shared, not copied, and keeps its names ("roberta.*"), so a ticket over the
    language model's encoder also fits this model; the head adds "classifier.*", with the layout and initialisation of
    `XLMRobertaForSequenceClassification`. The head is drawn from torch's global generator.

    Args:
        language_model: an XLM-R with or without an LM head.
        classes: number of classes.
        linear: a single linear layer (with dropout before it) instead of dense, tanh and out_proj.
    """

    base_model_prefix = "roberta"

    def __init__(
        self, language_model: XLMRobertaForMaskedLM | XLMRobertaModel, classes: int, *, linear: bool = False
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"SequenceClassifier: classes must be at least 2, got {classes}")
        self.config = language_model.config
        self.roberta = getattr(language_model, "roberta", language_model)
        head = ClassificationHead(self.config, classes, linear=linear)
        self.classifier = head.to(self.roberta.embeddings.word_embeddings.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.roberta.embeddings.word_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Class logits, and the loss if there are labels.

        Args:
            input_ids: int64 [B, L], padded on either side.
            attention_mask: int64 [B, L].
            labels: int64 [B], class indices or `IGNORED_LABEL`.

        Returns:
            "logits" [B, classes] float32 and, with labels, "loss": the mean cross-entropy over labelled examples.
        """
        hidden = self.roberta(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # <s> is the first real token; argmax returns the first of equal maxima
        first, rows = attention_mask.argmax(1), torch.arange(len(input_ids), device=input_ids.device, dtype=torch.int64)
        logits = self.classifier(hidden[rows, first]).float()
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL), "logits": logits}


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, out_proj (H=768, 3 classes: 592,899 parameters), or dropout and out_proj alone.

    Args:
        config: the configuration of the encoder, whose sizes, dropout and initialisation are used.
        classes: number of classes.
        linear: dropout and out_proj alone.
    """

    def __init__(self, config: Any, classes: int, *, linear: bool = False) -> None:
        super().__init__()
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.dense = None if linear else nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, classes)
        for layer in filter(None, (self.dense, self.out_proj)):
            nn.init.normal_(layer.weight, std=config.initializer_range)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, H] at `<s>`. Returns logits [B, classes]."""
        hidden = self.dropout(hidden)
        if self.dense is not None:
            hidden = self.dropout(torch.tanh(self.dense(hidden)))
        return self.out_proj(hidden)
