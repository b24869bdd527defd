"""SPT: a soft prompt behind the text for XGLM and BLOOM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ltp_sparse.methods.base import Context, Method, Settings, Setup, nothing, seeded
from ltp_sparse.models import (
    TOPIC_WORDS,
    CausalPrompt,
    PromptedCausalLM,
    collator,
    encode_prompted,
    vocabulary_loss,
    word_tokens,
)
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import canonical_parameters

if TYPE_CHECKING:
    from transformers import BloomForCausalLM, XGLMForCausalLM


@dataclass(frozen=True, kw_only=True)
class SPT(Method):
    """Soft prompt tuning of a causal language model. The token after the prompt is the word of the class.

    Training minimises the cross-entropy over the whole vocabulary. The epoch with the smallest loss on dev is kept.

    Attributes:
        n: number of prompt embeddings.
        bottleneck: width of the reparameterisation; None trains the embeddings directly.
        frozen: freezes the language model. Otherwise all of it trains, at a rate of 1e-5 to 5e-5.
        compat: keeps the LayerNorm of the reparameterisation at its initial values, as the paper's code does with a
            frozen model.
        words: class -> word; None takes the words of SIB-200's topics for this model.
    """

    key = "spt"
    name = "SPT"
    backbone = "causal"
    inputs = ("text",)
    picks = "loss"
    settings: Settings = Settings(
        learning_rate=5e-3, epochs=20, batch_size=8, schedule="linear", warmup=0.1, max_length=128, seeds=(0, 1, 2, 3)
    )
    n: int = 10
    bottleneck: int | None = None
    frozen: bool = True
    compat: bool = False
    words: Mapping[str, str] | None = None

    def prepare(self, language_model: XGLMForCausalLM | BloomForCausalLM) -> None:
        if language_model.config.model_type not in TOPIC_WORDS:
            raise ValueError(
                f"SPT: expected a model of type {' or '.join(TOPIC_WORDS)}, got {language_model.config.model_type!r}"
            )

    def _ticket(self, language_model: XGLMForCausalLM | BloomForCausalLM, given: Ticket | None, seed: int) -> Ticket:
        return nothing() if self.frozen else Ticket.full(canonical_parameters(language_model))

    def build(
        self, language_model: XGLMForCausalLM | BloomForCausalLM, context: Context, *, baked: bool = False
    ) -> Setup:
        config, tokenizer = language_model.config, context.tokenizer
        with seeded(context.seed):
            prompt = CausalPrompt(
                self.n, config.hidden_size, None if baked else self.bottleneck, compat=self.compat
            ).to(language_model.device)
        words = TOPIC_WORDS[config.model_type] if self.words is None else self.words
        model = PromptedCausalLM(language_model, prompt, word_tokens(tokenizer, words, context.labels))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Setup(
            model=model,
            encode=partial(
                encode_prompted, tokenizer, classes=context.labels, n_prompt=self.n, max_length=self.settings.max_length
            ),
            collate=collator(pad),
            dense=(prompt,),
            loss=vocabulary_loss,
            bake=lambda: {"prompt.rows": prompt.bake().cpu()},
        )
