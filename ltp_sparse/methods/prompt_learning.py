"""Prompt-learning methods: LTP (METHODS.md 4.2), its random controls (4.3 b), SP and the frozen-LM control (3).

A method says which entries of the language model train beside the prompt encoder, and with which settings. All of them
read the soft template, score the verbalizer's words, and save a `SparseDelta` over their ticket with the prompt in its
dense tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ltp_sparse.names import canonical_parameters
from ltp_sparse.selection import pools
from ltp_sparse.ticket import Ticket
from ltp_sparse.training.backbone import decouple, is_decoupled

if TYPE_CHECKING:
    from transformers import XLMRobertaForMaskedLM


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Settings of prompt-learning; the defaults are LTP's (METHODS.md 4.2).

    learning_rate: constant, the same for the language model and the prompt encoder
    batch_size:    pairs per update
    max_grad_norm: norm to which the gradient of what trains is clipped
    n_prompt:      prompt embeddings
    encoder:       "bilstm", "mlp" or "none"
    init:          "normal" draws the rows of the prompt encoder from N(0, 1), "vocabulary" copies word embeddings
    max_length:    tokens of an input
    truncation:    "longest_first" or "hypothesis_first" (see `Template.encode`)
    seeds:         those of the repeated runs of an experiment
    """

    learning_rate: float = 2e-5
    epochs: int = 70
    batch_size: int = 32
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    n_prompt: int = 4
    encoder: str = "bilstm"
    init: str = "normal"
    max_length: int = 256
    truncation: str = "longest_first"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "max_grad_norm", "n_prompt", "max_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"PromptSettings: {name} must be above 0, got {getattr(self, name)}")
        if self.init not in ("normal", "vocabulary"):
            raise ValueError(f"PromptSettings: init must be normal or vocabulary, got {self.init!r}")


@dataclass(frozen=True, kw_only=True)
class PromptMethod(ABC):
    """Which entries of a language model train, and how.

    name:         as in tables
    needs_ticket: whether `ticket` wants one to be given
    """

    name: ClassVar[str]
    needs_ticket: ClassVar[bool] = False
    settings: PromptSettings = field(default_factory=PromptSettings)

    @abstractmethod
    def prepare(self, language_model: XLMRobertaForMaskedLM) -> None:
        """Brings the LM head, in place, into the state that the method trains with; raises ValueError if it cannot."""

    def ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None = None, *, seed: int = 0) -> Ticket:
        """The entries of the language model that train.

        given: the ticket of stage 1, for methods that need one; the others refuse it.
        seed:  that of the run, for methods that draw.
        """
        if self.needs_ticket and given is None:
            raise ValueError(
                f"{self.name}: expected the ticket of stage 1, got none; select one (ltp_sparse.select) or load one "
                "(ltp_sparse.Ticket.load)"
            )
        if not self.needs_ticket and given is not None:
            raise ValueError(f"{self.name}: expected no ticket, since it trains a fixed set of weights, got {given!r}")
        return self._ticket(language_model, given, seed)

    @abstractmethod
    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket: ...


@dataclass(frozen=True, kw_only=True)
class LTP(PromptMethod):
    """Lottery Ticket Prompt-learning: the ticket's entries and the prompt encoder train, from the initial weights.

    LayerNorms, the LM head and its decoupled output embedding stay as they are.
    """

    name = "LTP"
    needs_ticket = True

    def prepare(self, language_model: XLMRobertaForMaskedLM) -> None:
        decouple(language_model)

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        assert given is not None  # checked in `ticket`
        if outside := [name for name in given.active_names if not pools.maskable(name)]:
            raise ValueError(
                f"{self.name}: expected a ticket over the base model without LayerNorm, got active entries in "
                f"{outside[0]!r}; select with pool=ltp_sparse.selection.pools.maskable"
            )
        return given


@dataclass(frozen=True, kw_only=True)
class RandomTicket(LTP):
    """LTP with as many entries as its ticket, drawn at random from the ticket's pool with the seed of the run.

    match: "pool" draws uniformly over the whole pool, "layers" keeps the ticket's count in every parameter
    """

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
class SoftPrompt(PromptMethod):
    """SP: the prompt encoder and every weight of the (tied) language model train (Zhao & Schütze 2021).

    The default schedule is the original's; `SoftPrompt(settings=PromptSettings())` is SP on LTP's schedule (4.3 c).
    """

    name = "SP"
    settings: PromptSettings = field(default_factory=lambda: PromptSettings(learning_rate=1e-5, epochs=50))

    def prepare(self, language_model: XLMRobertaForMaskedLM) -> None:
        if is_decoupled(language_model):
            raise ValueError(
                "SP: expected a language model whose LM head shares the word embedding, got a decoupled one; "
                "load it with load_backbone(..., decoupled=False)"
            )

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket.full(canonical_parameters(language_model))


@dataclass(frozen=True, kw_only=True)
class PromptOnly(PromptMethod):
    """The prompt encoder alone trains; the language model is frozen ("Fixed-LM", the control of METHODS.md 4.3 e)."""

    name = "PT-frozen"
    settings: PromptSettings = field(default_factory=lambda: PromptSettings(learning_rate=5e-3))

    def prepare(self, language_model: XLMRobertaForMaskedLM) -> None:
        """Frozen, a tied head and a decoupled one are the same."""

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket({}, {}, {"method": "none"})
