"""Deep prompt tuning: learned keys and values in every layer, the language model frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ltp_sparse.methods.base import Context, Encode, Method, Settings, Setup, seeded
from ltp_sparse.methods.fine_tuning import encode_for_classifier
from ltp_sparse.models import DeepPrompt, SequenceClassifier
from ltp_sparse.models.masked_prompt import PromptedMaskedLM
from ltp_sparse.prompting import cloze_template, collator
from ltp_sparse.prompting.templates import encoder_by_kind

if TYPE_CHECKING:
    from transformers import XLMRobertaForMaskedLM

HEADS = ("classifier", "mlm")


@dataclass(frozen=True, kw_only=True)
class DeepPromptTuning(Method):
    """P-tuning v2: the prompt of every layer trains, and a head.

    Attributes:
        n: number of rows of the prompt.
        head: "classifier" is a linear layer on `<s>`, as in the paper. "mlm" is the frozen LM head with the verbalizer
            at `<mask>`, for comparison with the other prompts.
        projection: see `DeepPrompt`.
        position_offset: see `DeepPrompt`.
    """

    key = "deep-prompt"
    name = "deep prompt"
    inputs = ("pair", "text")
    settings: Settings = Settings(learning_rate=5e-3, epochs=100)
    n: int = 128
    head: str = "classifier"
    projection: int | None = None
    position_offset: int | None = None

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"DeepPromptTuning: head must be one of {', '.join(HEADS)}, got {self.head!r}")

    @property
    def scores_words(self) -> bool:
        return self.head == "mlm"

    def build(self, language_model: XLMRobertaForMaskedLM, context: Context, *, baked: bool = False) -> Setup:
        config, tokenizer, max_length = language_model.config, context.tokenizer, self.settings.max_length
        facts: dict[str, Any] = {}
        with seeded(context.seed):
            if self.head == "classifier":
                model: nn.Module = SequenceClassifier(language_model, len(context.labels), linear=True)
                encode: Encode = encode_for_classifier(tokenizer, context.labels, max_length)
            else:
                verbalizer = context.words()
                facts = {"verbalizer": [list(tokens) for tokens in verbalizer.token_ids]}
                model = PromptedMaskedLM(language_model, None, verbalizer)
                encode = encoder_by_kind(cloze_template, tokenizer, classes=context.labels, max_length=max_length)
            prompt = DeepPrompt(
                config, self.n, projection=None if baked else self.projection, position_offset=self.position_offset
            )
        prompt.to(language_model.device).attach(model)
        classifier = [model.classifier] if isinstance(model, SequenceClassifier) else []

        def bake() -> dict[str, Tensor]:
            named = model.named_parameters()
            head = {name: p.detach().cpu().clone() for name, p in named if name.startswith("classifier.")}
            return {f"{prompt.key}.rows": prompt.bake().cpu(), **head}

        return Setup(
            model=model,
            encode=encode,
            collate=collator(config.pad_token_id),
            dense=(prompt, *classifier),
            bake=bake,
            facts=facts,
            undo=prompt.remove,
        )
