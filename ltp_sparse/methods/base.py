"""`Method`, the base class: which weights train, which inputs are built, which ticket applies, what is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.prompting.verbalizers import Verbalizer
from ltp_sparse.tasks.pairs import CLASSES
from ltp_sparse.tickets.ticket import Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a method trains.

    Attributes:
        learning_rate: learning rate of everything that trains.
        epochs: passes over the training examples.
        batch_size: examples per update.
        weight_decay: decoupled weight decay of AdamW.
        l2: coupled decay of Adam, added to the gradients except those of biases and LayerNorms. It needs a method that
            trains all weights or none.
        max_grad_norm: norm to which the gradients are clipped; 0 does not clip.
        schedule: "constant", or "linear", which decays to 0 after the warm-up.
        warmup: share of the updates in which the learning rate rises from 0.
        eval_steps: updates between evaluations on dev; 0 evaluates once an epoch.
        max_steps: if positive, the most updates.
        max_length: tokens per input.
        seeds: seeds of the repeated runs of an experiment.
    """

    learning_rate: float = 2e-5
    epochs: float = 5
    batch_size: int = 32
    weight_decay: float = 0.0
    l2: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    warmup: float = 0.0
    eval_steps: int = 0
    max_steps: int = 0
    max_length: int = 256
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "max_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{type(self).__name__}: {name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "l2", "max_grad_norm", "warmup", "eval_steps", "max_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {getattr(self, name)}")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"{type(self).__name__}: schedule must be constant or linear, got {self.schedule!r}")
        object.__setattr__(self, "seeds", tuple(self.seeds))


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a run hands to its method.

    Attributes:
        tokenizer: the language model's tokenizer.
        labels: classes of the task, in the order of the logits.
        language: language of the training examples, for the words of a discrete pattern.
        verbalizer: words of the classes, for methods that score words; None takes the English words of inference.
        seed: seed of initial values and random choices.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...] = CLASSES
    language: str = "en"
    verbalizer: Verbalizer | None = None
    seed: int = 1

    def words(self) -> Verbalizer:
        """The verbalizer.

        Raises:
            ValueError: there is none that fits the classes.
        """
        if self.verbalizer is None and self.labels == CLASSES:
            return Verbalizer.for_language(self.tokenizer, "en")
        if self.verbalizer is None or len(self.verbalizer.token_ids) != len(self.labels):
            found = "none" if self.verbalizer is None else len(self.verbalizer.token_ids)
            raise ValueError(
                f"expected a verbalizer with words for {', '.join(self.labels)}, got {found}; pass "
                "Verbalizer.from_words(tokenizer, {class: word, ...}, classes)"
            )
        return self.verbalizer


Encode = Callable[[Sequence[Any]], list[Any]]
"""Turns examples of a task into model inputs, one mapping each, with the class index (or -100) under "labels"."""

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]
"""Turns model inputs into one batch."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model that a method has made ready to train.

    Attributes:
        model: `model(**batch)["logits"]` is [B, C]. The parameters of the language model have their own names in it.
        encode: see `Encode`.
        collate: see `Collate`.
        dense: modules and parameters of `model` that train in full and are stored in full.
        loss: (outputs, labels [B], number of examples of the whole update or None) -> scalar; None stands for
            cross-entropy over the classes.
        bake: returns the dense tensors that inference needs; None if they are those of `dense`.
        facts: metadata of the results.
        undo: removes what the method attached to the language model.
    """

    model: nn.Module
    encode: Encode
    collate: Collate
    dense: Sequence[nn.Module | nn.Parameter] = ()
    loss: Callable[..., Tensor] | None = None
    bake: Callable[[], dict[str, Tensor]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    undo: Callable[[], None] = lambda: None

    def dense_parameters(self) -> list[nn.Parameter]:
        """The parameters of `dense`, in its order."""
        found: list[nn.Parameter] = []
        for item in self.dense:
            found += item.parameters() if isinstance(item, nn.Module) else [item]
        return found


class Tune(Protocol):
    """Trains a setup with a ticket, puts all weights back to their initial bits, and returns the delta it found."""

    def __call__(self, setup: Setup, ticket: Ticket, settings: Settings | None = None) -> SparseDelta: ...


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A training method: a frozen dataclass of options and `settings`.

    Attributes:
        key: name in recipes and on the command line.
        name: name in tables.
        needs_ticket: whether `ticket` needs the ticket of stage 1.
        backbone: "masked" (XLM-R) or "causal" (XGLM, BLOOM).
        inputs: kinds of examples that it reads: "pair", "text".
        picks: "loss" keeps the weights of the smallest loss on dev; None keeps those of the best metric.
        settings: how it trains.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    needs_ticket: ClassVar[bool] = False
    backbone: ClassVar[str] = "masked"
    inputs: ClassVar[tuple[str, ...]] = ("pair",)
    picks: ClassVar[str | None] = None
    settings: Settings = Settings()

    @property
    def scores_words(self) -> bool:
        """Whether classes are words at `<mask>`, so that a verbalizer is used."""
        return False

    @property
    def tied(self) -> bool:
        """Whether the LM head must share the word embedding. Otherwise it may have a frozen copy."""
        return False

    def prepare(self, language_model: PreTrainedModel) -> None:  # noqa: B027
        """Checks that the method can train this model. Methods that cannot train every model override it.

        Raises:
            ValueError: the method cannot train it.
        """

    @abstractmethod
    def build(self, language_model: PreTrainedModel, context: Context, *, baked: bool = False) -> Setup:
        """The model to train, around the language model, and its inputs.

        Args:
            language_model: it stays as it is, except for modules that `Setup.undo` removes.
            context: what the run gives.
            baked: builds the model that reads the tensors of `Setup.bake`.
        """

    def ticket(self, language_model: PreTrainedModel, given: Ticket | None = None, *, seed: int = 0) -> Ticket:
        """The entries of the language model that train.

        Args:
            language_model: the model at its initial weights.
            given: the ticket of stage 1, if the method needs one.
            seed: seed of the run, for methods that draw entries at random.

        Raises:
            ValueError: a ticket is missing, or given to a method without one.
        """
        if self.needs_ticket and given is None:
            raise ValueError(
                f"{self.name}: expected the ticket of stage 1, got none; select one (ltp_sparse.select) or load one "
                "(ltp_sparse.Ticket.load)"
            )
        if not self.needs_ticket and given is not None:
            raise ValueError(
                f"{self.name}: expected no ticket, since it knows itself which weights to train, got {given!r}"
            )
        return self._ticket(language_model, given, seed)

    def _ticket(self, language_model: PreTrainedModel, given: Ticket | None, seed: int) -> Ticket:
        """By default, no entry: the language model is frozen."""
        return nothing()

    def choose(self, setup: Setup, ticket: Ticket, tune: Tune) -> tuple[Setup, Ticket]:
        """Setup and ticket of the last phase. Methods that find these by training override it."""
        return setup, ticket

    def finish(self, setup: Setup, *deltas: SparseDelta) -> tuple[SparseDelta, ...]:
        """The deltas to keep, made from those of the last phase, with the model at its initial bits."""
        return deltas

    def describe(self) -> dict[str, Any]:
        """JSON values, for metadata, from which `from_description` makes this method again."""
        options = asdict(self)
        settings = options.pop("settings")
        return {"method": self.key, "settings": {**settings, "seeds": list(settings["seeds"])}, "options": options}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Method:
        """The method of this class that `describe` has described."""
        settings = type(cls().settings)(**description["settings"])
        return cls(**description["options"], settings=settings)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Sets the seed of torch's global generators, and restores their states at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def nothing() -> Ticket:
    """The ticket of methods that leave the language model as it is."""
    return Ticket({}, {}, {"method": "none"})
