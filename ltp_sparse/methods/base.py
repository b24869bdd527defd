"""What every training method is: which weights train, which input is built, which ticket applies, what is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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
        learning_rate: of the language model's entries and of everything that trains beside them
        epochs: over the training examples; `max_steps`, if positive, caps the updates
        batch_size: examples per update
        weight_decay: decoupled, of AdamW
        l2: coupled, of Adam (added to the gradient; not of biases and LayerNorms); trains all weights or none
        max_grad_norm: norm to which the gradient of what trains is clipped; 0: no clipping
        schedule: "constant", or "linear" decay to 0 after `warmup`, a share of the updates
        eval_steps: updates between evaluations on dev; 0: once an epoch
        max_length: tokens of an input
        seeds: those of the repeated runs of an experiment
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
    """What a run gives to its method.

    Attributes:
        labels: classes of the task, in the order of the logits
        language: that of the training examples: the pattern's words, where a pattern has some
        verbalizer: words of the classes, where a method scores words; None: the English ones of inference
        seed: of initial values and of whatever the method draws
    """

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...] = CLASSES
    language: str = "en"
    verbalizer: Verbalizer | None = None
    seed: int = 1

    def words(self) -> Verbalizer:
        """The verbalizer; ValueError where none fits the classes."""
        if self.verbalizer is None and self.labels == CLASSES:
            return Verbalizer.for_language(self.tokenizer, "en")
        found = None if self.verbalizer is None else len(self.verbalizer.token_ids)
        if found != len(self.labels):
            raise ValueError(
                f"expected a verbalizer with words for {', '.join(self.labels)}, got {found or 'none'}; pass "
                "Verbalizer.from_words(tokenizer, {class: word, ...}, classes)"
            )
        assert self.verbalizer is not None
        return self.verbalizer


Encode = Callable[[Sequence[Any]], list[Any]]
"""Turns examples of a task into model inputs, one mapping each, with the class index (or -100) under "labels"."""

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]
"""Turns model inputs into one batch."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model made ready by a method.

    Attributes:
        model: `model(**batch)["logits"]` is [B, C]; it holds the language model's parameters under their own names
        dense: modules and parameters of `model` that train, and are stored, in full
        loss: (outputs, labels [B], examples of the whole update or None) -> scalar; None: cross-entropy over the
            classes
        bake: dense tensors that inference needs in place of those of `dense`; None: the same ones
        facts: for the metadata of results
        undo: takes what the method attached to the language model off again
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
        found: list[nn.Parameter] = []
        for item in self.dense:
            found += item.parameters() if isinstance(item, nn.Module) else [item]
        return found


class Tune(Protocol):
    """Trains a setup once with a ticket and takes everything back to its initial bits; what it found is the delta."""

    def __call__(self, setup: Setup, ticket: Ticket, settings: Settings | None = None) -> SparseDelta: ...


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A training method: a frozen dataclass of options, and of `settings`.

    Attributes:
        key: its name in recipes and on the command line
        name: its name in tables
        needs_ticket: whether `ticket` wants one to be given
        backbone: "masked" (XLM-R) or "causal" (XGLM, BLOOM)
        inputs: the kinds of examples it reads: "pair", "text"
        picks: "loss" where the evaluation of smallest loss on dev is kept; None: that of the best metric
    """

    key: ClassVar[str]
    name: ClassVar[str]
    needs_ticket: ClassVar[bool] = False
    backbone: ClassVar[str] = "masked"
    inputs: ClassVar[tuple[str, ...]] = ("pair",)
    picks: ClassVar[str | None] = None
    settings: Settings = field(default_factory=Settings)

    @property
    def scores_words(self) -> bool:
        """Whether classes are words at `<mask>`, so that a verbalizer is used."""
        return False

    @property
    def tied(self) -> bool:
        """Whether the LM head has to share the word embedding; otherwise it may have a frozen copy of its own."""
        return False

    @abstractmethod
    def prepare(self, language_model: PreTrainedModel) -> None:
        """Brings the LM head, in place, into the state that the method trains with; raises ValueError if it cannot."""

    @abstractmethod
    def build(self, language_model: PreTrainedModel, context: Context, *, baked: bool = False) -> Setup:
        """The model to train, around the language model, and its inputs. baked: as `Setup.bake` stores it."""

    def ticket(self, language_model: PreTrainedModel, given: Ticket | None = None, *, seed: int = 0) -> Ticket:
        """The entries of the language model that train.

        Args:
            given: the ticket of stage 1, for methods that need one; the others refuse it.
            seed: that of the run, for methods that draw.
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

    @abstractmethod
    def _ticket(self, language_model: PreTrainedModel, given: Ticket | None, seed: int) -> Ticket: ...

    def choose(self, setup: Setup, ticket: Ticket, tune: Tune) -> tuple[Setup, Ticket]:
        """Setup and ticket of the last phase, for methods that find them by training: by default the first ones."""
        return setup, ticket

    def finish(self, setup: Setup, *deltas: SparseDelta) -> tuple[SparseDelta, ...]:
        """The deltas to keep, from those of the last phase, with the model at its initial bits: by default the same."""
        return deltas

    def describe(self) -> dict[str, Any]:
        """What `from_description` needs to make this method again: for metadata, as JSON can hold it."""
        options = asdict(self)
        settings = options.pop("settings")
        return {"method": self.key, "settings": {**settings, "seeds": list(settings["seeds"])}, "options": options}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Method:
        """The method that `describe` described, of this class."""
        settings = type(cls().settings)(**description["settings"])
        return cls(**description["options"], settings=settings)


def nothing() -> Ticket:
    """The ticket of methods that leave the language model as it is."""
    return Ticket({}, {}, {"method": "none"})
