"""Fine-tuning with a classification head: all weights (FT), biases (BitFit), the SFT family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.methods.base import Context, Encode, Method, Settings, Setup, Tune, seeded
from ltp_sparse.models import SequenceClassifier, collator, encode_pairs, encode_texts
from ltp_sparse.prompting import kind_of
from ltp_sparse.selection import pools, select
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.names import canonical_parameters, in_base_model, layer_of

if TYPE_CHECKING:
    from transformers import XLMRobertaForMaskedLM

K_TASK = 14_155_776
"""Entries of a task SFT of XLM-R-base: as many as bottleneck adapters have, 24 x 768^2."""

K_LANGUAGE = 7_667_712
"""Entries of a language SFT of XLM-R-base, 13 x 768^2."""

_MASKABLE = 277_414_656

TASK_SFT = Settings(max_length=128, schedule="linear", eval_steps=625, seeds=(42,))
"""Settings of task SFTs, and of the methods that are compared with them."""

SHARES: dict[str, dict[str, float]] = {
    "nli": {"embeddings": 0.02, "layer -2": 0.02, "layer -1": 0.02, "other layers": 0.94},
    "sentiment": {"embeddings": 0.005, "layer -2": 0.02, "layer -1": 0.02, "other layers": 0.955},
    "language": {"embeddings and last two layers": 0.6, "other layers": 0.4},
}
"""SC-SFT's shares of the budget, by task. Negative layers count from the end."""


def scaled_budget(k: int, maskable: int) -> int:
    """The budget of a model that is the same share of its maskable entries as `k` is of XLM-R-base's 277,414,656."""
    return math.floor(Fraction(k, _MASKABLE) * maskable)


def encode_for_classifier(tokenizer: Any, labels: tuple[str, ...], max_length: int) -> Encode:
    """A function that encodes pairs or single texts for a `SequenceClassifier`."""
    pairs = partial(encode_pairs, tokenizer, classes=labels, max_length=max_length)
    texts = partial(encode_texts, tokenizer, classes=labels, max_length=max_length)
    return lambda examples: (pairs if examples and kind_of(examples[0]) == "pair" else texts)(examples)


@dataclass(frozen=True, kw_only=True)
class ClassifierMethod(Method):
    """A method that trains a classification head on `<s>` in full, and some or no entries of the encoder."""

    inputs = ("pair", "text")

    def build(self, language_model: XLMRobertaForMaskedLM, context: Context, *, baked: bool = False) -> Setup:
        with seeded(context.seed):
            model = SequenceClassifier(language_model, len(context.labels))
        return Setup(
            model=model,
            encode=encode_for_classifier(context.tokenizer, context.labels, self.settings.max_length),
            collate=collator(language_model.config.pad_token_id),
            dense=(model.classifier,),
        )


@dataclass(frozen=True, kw_only=True)
class FineTuning(ClassifierMethod):
    """FT: every weight of the encoder and the head train; Adam without decay or clipping (Zhao & Schütze 2021)."""

    key = "fine-tuning"
    name = "FT"
    settings: Settings = Settings(learning_rate=1e-5, epochs=50, max_grad_norm=0.0)

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket.full(language_model, pool=in_base_model)


@dataclass(frozen=True, kw_only=True)
class BitFit(ClassifierMethod):
    """BitFit: the biases of the encoder, those of LayerNorms included, and the head train."""

    key = "bitfit"
    name = "BitFit"
    settings: Settings = Settings(learning_rate=1e-3, max_length=128, schedule="linear")

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket.full(language_model, pool=lambda name: in_base_model(name) and "bias" in name)


@dataclass(frozen=True, kw_only=True)
class HeadOnly(ClassifierMethod):
    """Only the head trains, on a frozen encoder. A control."""

    key = "head-only"
    name = "head only"
    settings: Settings = Settings(learning_rate=5e-3, max_length=128, schedule="linear")


SCOPES: dict[str, Callable[[str], bool]] = {
    "all": pools.maskable,
    "no-embeddings": pools.without_embeddings,
    "query-value": lambda name: pools.maskable(name) and (".query." in name or ".value." in name),
}


@dataclass(frozen=True, kw_only=True)
class TaskSFT(ClassifierMethod):
    """Sparse fine-tuning of a budget of entries and the head.

    Attributes:
        k: number of entries for XLM-R-base. A model of another size trains the same share of its entries.
        density: share of the entries that trains, instead of k.
        scope: which entries may train: "all", "no-embeddings" or "query-value" (as in Random Masking).
        of: which entries `density` is a share of: all maskable ones ("model"), or those in scope ("pool").
    """

    settings: Settings = TASK_SFT
    k: int = K_TASK
    density: float | None = None
    scope: str = "all"
    of: str = "model"

    def __post_init__(self) -> None:
        for key, known in (("scope", tuple(SCOPES)), ("of", ("model", "pool"))):
            if (found := getattr(self, key)) not in known:
                raise ValueError(f"{type(self).__name__}: {key} must be one of {', '.join(known)}, got {found!r}")

    def budget(self, model: torch.nn.Module) -> int:
        """How many entries of a model train."""
        pool = pools.maskable if self.density is None or self.of == "model" else SCOPES[self.scope]
        n = sum(parameter.numel() for name, parameter in canonical_parameters(model).items() if pool(name))
        return scaled_budget(self.k, n) if self.density is None else entries_for(n, density=self.density)


@dataclass(frozen=True, kw_only=True)
class LTSFT(TaskSFT):
    """LT-SFT (Ansell et al. 2022): full tuning finds the entries, then they train again from the initial weights.

    LayerNorms are frozen in both phases. The head trains in both, from new initial values in the second.

    Attributes:
        iterations: how often the first phase runs. Each time it adds k / iterations entries, and starts from a sparse
            tuning of the entries found so far.
    """

    key = "lt-sft"
    name = "LT-SFT"
    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(
                f"{type(self).__name__}: iterations must be a whole number of at least 1, got {self.iterations!r}"
            )

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return Ticket.full(language_model, pool=SCOPES[self.scope])

    def choose(self, setup: Setup, ticket: Ticket, tune: Tune) -> tuple[Setup, Ticket]:
        k, shares = self.budget(setup.model), self.shares(ticket)
        chosen = most_changed(tune(setup, ticket), None, k // self.iterations, shares)
        for iteration in range(2, self.iterations + 1):
            found = tune(setup, chosen)
            found.apply(setup.model)
            try:
                tuned = tune(setup, ticket)
            finally:
                found.revert(setup.model)
            chosen |= most_changed(tuned, chosen, k * iteration // self.iterations - chosen.k, shares)
        chosen.metadata = {"method": self.key, "k": chosen.k, "requested_k": k}
        return setup, chosen

    def shares(self, ticket: Ticket) -> Mapping[str, float] | None:
        """Regular expression over names -> share of the budget; None stands for one budget over all."""
        return None


def most_changed(tuned: SparseDelta, known: Ticket | None, k: int, shares: Mapping[str, float] | None) -> Ticket:
    """The k entries that moved most, without those of the ticket `known`.

    Args:
        tuned: a delta of a tuning of whole parameters.
        known: entries that were found before; None: there are none.
        k: number of entries to find.
        shares: regular expression over names -> share of k; None: one budget over all.
    """
    shapes = tuned.ticket.shapes
    initial = {name: values.view(shapes[name]) for name, values in tuned.originals.items()}
    after = {name: values.view(shapes[name]) for name, values in tuned.values.items()}
    if known is not None:
        after = {
            name: torch.where(known.mask(name), initial[name], values) if name in known.sets else values
            for name, values in after.items()
        }
    ticket = select(initial, after, k=k, budget="global" if shares is None else shares)
    # without the fingerprint: deltas may be applied, and the trainer computes that of the weights below them
    return Ticket(ticket.sets, ticket.shapes, ticket.metadata)


@dataclass(frozen=True, kw_only=True)
class SCSFT(LTSFT):
    """SC-SFT: LT-SFT with a share of the budget for each group of layers.

    Attributes:
        groups: a key of `SHARES`, or regular expression over parameter names -> share.
    """

    key = "sc-sft"
    name = "SC-SFT"
    groups: str | Mapping[str, float] = "nli"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.groups, str) and self.groups not in SHARES:
            raise ValueError(
                f"SCSFT: groups must be one of {', '.join(SHARES)}, or shares by expression, got {self.groups}"
            )

    def shares(self, ticket: Ticket) -> Mapping[str, float]:
        return self.groups if not isinstance(self.groups, str) else group_shares(self.groups, ticket.names)


def group_shares(groups: str, names: list[str]) -> dict[str, float]:
    """Regular expression -> share, for a model with these parameter names. The first expression that matches counts."""
    layers = len({layer_of(name) for name in names} - {"embeddings", "other"})
    patterns = {
        "embeddings": r"embeddings\.",
        "layer -2": rf"layer\.{layers - 2}\.",
        "layer -1": rf"layer\.{layers - 1}\.",
        "embeddings and last two layers": rf"embeddings\.|layer\.({layers - 2}|{layers - 1})\.",
        "other layers": r"layer\.\d+\.",
    }
    return {patterns[group]: share for group, share in SHARES[groups].items()}


@dataclass(frozen=True, kw_only=True)
class RandSFT(TaskSFT):
    """Rand-SFT: random entries and the head train, in one phase.

    Attributes:
        match: "pool" draws uniformly from the scope. "layers" draws as many entries in every parameter as LT-SFT finds
            there, for which it has to run the first phase of LT-SFT.
        bernoulli: draws every entry with probability k / pool, instead of exactly k entries.
    """

    key = "rand-sft"
    name = "Rand-SFT"
    match: str = "pool"
    bernoulli: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match not in ("pool", "layers"):
            raise ValueError(f"RandSFT: match must be pool or layers, got {self.match!r}")
        if self.match == "layers" and self.bernoulli:
            raise ValueError("RandSFT: match='layers' draws exact counts; it takes no bernoulli=True")

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        k, pool = self.budget(language_model), SCOPES[self.scope]
        if self.match == "layers":
            whole = Ticket.full(language_model, pool=pool)
            return Ticket(whole.sets, whole.shapes, {"seed": seed})
        if not self.bernoulli:
            return Ticket.random(language_model, k=k, seed=seed, pool=pool)
        size = Ticket.full(language_model, pool=pool).n
        return Ticket.random(language_model, density=k / size, seed=seed, pool=pool, bernoulli=True)

    def choose(self, setup: Setup, ticket: Ticket, tune: Tune) -> tuple[Setup, Ticket]:
        if self.match == "pool":
            return setup, ticket
        like = LTSFT(settings=self.settings, k=self.k, density=self.density, scope=self.scope, of=self.of)
        _, found = like.choose(setup, ticket, tune)
        return setup, Ticket.random(found.shapes, seed=ticket.metadata["seed"], like=found)
