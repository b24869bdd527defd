"""Prompt-learning methods: LTP and its controls, DP, SP and MP.

Each fills a cloze template, scores the words of the verbalizer at `<mask>`, and saves a `SparseDelta` over its ticket,
with the prompt among the dense tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ltp_sparse.methods.base import Context, Method, Settings, Setup, seeded
from ltp_sparse.models.backbone import is_decoupled
from ltp_sparse.models.masked_prompt import PromptedMaskedLM
from ltp_sparse.models.prompt_encoder import PromptEncoder, vocabulary_rows
from ltp_sparse.prompting import Template, collator, discrete_template, soft_template
from ltp_sparse.prompting.templates import encoder_by_kind
from ltp_sparse.selection import pools
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import canonical_parameters, match_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

BAKED_PROMPT = "prompt_encoder.rows"


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """Settings of prompt-learning; the defaults are LTP's.

    Attributes:
        n_prompt: number of prompt embeddings.
        encoder: "bilstm", "mlp" or "none".
        init: "normal" draws the rows of the prompt encoder from N(0, 1); "vocabulary" copies word embeddings.
        truncation: "longest_first" or "hypothesis_first" (see `Template.encode`).
    """

    epochs: float = 70
    n_prompt: int = 4
    encoder: str = "bilstm"
    init: str = "normal"
    truncation: str = "longest_first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.n_prompt > 0:
            raise ValueError(f"PromptSettings: n_prompt must be above 0, got {self.n_prompt}")
        if self.init not in ("normal", "vocabulary"):
            raise ValueError(f"PromptSettings: init must be normal or vocabulary, got {self.init!r}")


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """A method with a template (by default the soft one) that trains its prompt and entries of the language model."""

    settings: PromptSettings = PromptSettings()

    inputs = ("pair", "text")
    freezes_words: ClassVar[bool] = False
    """Whether the label words are scored by frozen copies of their rows of the output embedding."""

    @property
    def scores_words(self) -> bool:
        return True

    def template(self, language: str, kind: str) -> Template:
        """The template for examples of a kind, "pair" or "text", with the words of a language."""
        return soft_template(self.settings.n_prompt, kind)

    def build(self, language_model: XLMRobertaForMaskedLM, context: Context, *, baked: bool = False) -> Setup:
        settings, tokenizer = self.settings, context.tokenizer
        templates = {kind: self.template(context.language, kind) for kind in self.inputs}
        n_prompt = templates["pair"].n_prompt
        encoder = None
        if n_prompt and baked:
            encoder = PromptEncoder(n_prompt, language_model.config.hidden_size, "none")
        elif n_prompt:
            encoder = prompt_encoder(settings, language_model, tokenizer, context.seed)
        if encoder is not None:
            encoder.to(language_model.device)
        verbalizer = context.words()
        options = {"classes": context.labels, "max_length": settings.max_length, "truncation": settings.truncation}
        return Setup(
            model=PromptedMaskedLM(language_model, encoder, verbalizer, frozen_words=self.freezes_words),
            encode=encoder_by_kind(templates.__getitem__, tokenizer, **options),
            collate=collator(language_model.config.pad_token_id),
            dense=() if encoder is None else (encoder,),
            bake=None if encoder is None else lambda: {BAKED_PROMPT: encoder.bake().cpu()},
            facts={
                "verbalizer": [list(tokens) for tokens in verbalizer.token_ids],
                "decoupled": self.freezes_words or is_decoupled(language_model),
            },
        )


@dataclass(frozen=True, kw_only=True)
class LTP(PromptMethod):
    """Lottery Ticket Prompt-learning: the ticket's entries and the prompt encoder train, from the initial weights.

    LayerNorms and the LM head are frozen, and so are the rows of the decoupled output embedding that score the words.
    These rows are copied, so the head may share the word embedding.
    """

    key = "ltp"
    name = "LTP"
    needs_ticket = True
    freezes_words = True

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        assert given is not None  # checked in `ticket`
        if outside := [name for name in given.active_names if not pools.maskable(name)]:
            match_names(given.active_names, canonical_parameters(language_model), what=self.name, where="the model")
            raise ValueError(
                f"{self.name}: expected a ticket over the base model without LayerNorm, got active entries in "
                f"{outside[0]!r}; select with pool=ltp_sparse.selection.pools.maskable"
            )
        return given


@dataclass(frozen=True, kw_only=True)
class RandomTicket(LTP):
    """LTP with a random ticket: as many entries of the same pool as the given ticket, drawn with the seed of the run.

    Attributes:
        match: "pool" draws uniformly from the pool; "layers" keeps the number of entries in every parameter.
    """

    key = "random-ticket"
    name = "random ticket"
    match: str = "pool"

    def __post_init__(self) -> None:
        if self.match not in ("pool", "layers"):
            raise ValueError(f"RandomTicket: match must be pool or layers, got {self.match!r}")

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        given = super()._ticket(language_model, given, seed)
        if self.match == "layers":
            return Ticket.random(given.shapes, seed=seed, like=given)
        return Ticket.random(given.shapes, k=given.k, seed=seed)


@dataclass(frozen=True, kw_only=True)
class AllActive(LTP):
    """LTP with every maskable entry in its ticket. LayerNorms, LM head and output embedding are frozen."""

    key = "all-active"
    name = "LTP, all active"
    needs_ticket = False

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket.full(language_model, pool=pools.maskable)


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(PromptMethod):
    """SP: the prompt encoder and every weight of the (tied) language model train (Zhao & Schütze 2021).

    The default schedule is that of the paper. `SoftPrompt(settings=PromptSettings())` is SP on LTP's schedule.
    """

    key = "soft-prompt"
    name = "SP"
    settings: PromptSettings = PromptSettings(learning_rate=1e-5, epochs=50, l2=0.01)

    @property
    def tied(self) -> bool:
        return True

    def prepare(self, language_model: XLMRobertaForMaskedLM) -> None:
        if is_decoupled(language_model):
            raise ValueError(
                f"{self.name}: expected a language model whose LM head shares the word embedding, got a decoupled one; "
                "load it with ltp_sparse.models.backbone.load_backbone(..., decoupled=False)"
            )

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket.full(canonical_parameters(language_model))


@dataclass(frozen=True, kw_only=True)
class DiscretePrompt(SoftPrompt):
    """DP: a pattern in words, without prompt embeddings. Every weight trains (Zhao & Schütze 2021)."""

    key = "discrete-prompt"
    name = "DP"

    def template(self, language: str, kind: str) -> Template:
        return discrete_template(language, kind=kind)


@dataclass(frozen=True, kw_only=True)
class MixedPrompt(SoftPrompt):
    """MP: DP's pattern with SP's prompt after the answer's word (the order of SoftMV)."""

    key = "mixed-prompt"
    name = "MP"

    def template(self, language: str, kind: str) -> Template:
        return discrete_template(language, self.settings.n_prompt, kind)


@dataclass(frozen=True, kw_only=True)
class PromptOnly(PromptMethod):
    """Only the prompt encoder trains; the language model is frozen ("Fixed-LM")."""

    key = "prompt-only"
    name = "PT-frozen"
    settings: PromptSettings = PromptSettings(learning_rate=5e-3)


def prompt_encoder(
    settings: PromptSettings, language_model: Any, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PromptEncoder:
    """A new prompt encoder, whose initial values depend on the seed alone."""
    embedding: Tensor = language_model.get_input_embeddings().weight
    rows = None
    if settings.init == "vocabulary":
        rows = vocabulary_rows(embedding, settings.n_prompt, seed, exclude=tuple(tokenizer.all_special_ids)).cpu()
    with seeded(seed):
        return PromptEncoder(settings.n_prompt, embedding.shape[1], settings.encoder, rows=rows)
