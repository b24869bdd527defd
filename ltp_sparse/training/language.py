"""Language SFTs: LT-SFT's two phases on text in one language, and BitFit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

from ltp_sparse.deltas.delta import SparseDelta
from ltp_sparse.methods.base import nothing, seeded
from ltp_sparse.methods.fine_tuning import K_LANGUAGE, group_shares, most_changed, scaled_budget
from ltp_sparse.models import Adapter, AdapterStack
from ltp_sparse.selection import pools
from ltp_sparse.tickets.counts import entries_for
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.training.mlm import MLMSettings, tune_mlm
from ltp_sparse.weights.names import in_base_model

LANGUAGE_SETTINGS = MLMSettings(batch_size=8, epochs=100, step_bounds=(10_000, 100_000), validation=0.05)
"""Settings of both phases."""

ADAPTER_SETTINGS = MLMSettings(batch_size=8, epochs=100, step_bounds=(30_000, 100_000), validation=0.05, l1=0.0)
"""Settings of language adapters."""

KINDS = ("lt-sft", "sc-sft", "bitfit")


def train_language(
    kind: str,
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: MLMSettings = LANGUAGE_SETTINGS,
    *,
    k: int = K_LANGUAGE,
    density: float | None = None,
    **options: Any,
) -> SparseDelta:
    """Trains the delta of a language, which is applied before a task delta. The model gets its initial bits back.

    The LM head is trained as well, but is not part of the result, since composition needs the language's weights only.

    Args:
        kind: "lt-sft" and "sc-sft" tune all weights, keep the entries that moved most (of all, or by SC-SFT's shares)
            and tune these again from the start; "bitfit" tunes the biases of the encoder.
        model: a model with a decoupled LM head, at its initial weights.
        tokenizer: its tokenizer.
        texts: texts in the language.
        settings: the settings of each phase.
        k: entries for XLM-R-base; a model of another size gets the same share of its entries.
        density: share of the maskable entries, instead of k.
        options: further arguments of `tune_mlm`; each phase gets a subfolder of `output_dir`.

    Raises:
        ValueError: unknown kind, or as `tune_mlm`.
    """
    if kind not in KINDS:
        raise ValueError(f"train_language: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "bitfit":
        ticket = Ticket.full(model, pool=lambda name: in_base_model(name) and "bias" in name)
    else:
        tuned = tune_mlm(model, tokenizer, texts, settings, **_phase(1, options))
        moved = tuned.delta()
        tuned.reset()
        maskable = sum(s.numel() for name, s in moved.ticket.shapes.items() if pools.maskable(name))
        budget = scaled_budget(k, maskable) if density is None else entries_for(maskable, density=density)
        shares = group_shares("language", moved.ticket.names) if kind == "sc-sft" else None
        ticket = most_changed(moved, None, budget, shares)
    tuned = tune_mlm(model, tokenizer, texts, settings, ticket=ticket, **_phase(2, options))
    delta = tuned.delta()
    tuned.reset()
    delta.dense, delta.metadata["method"] = {}, f"{kind} language"
    return delta


def train_language_adapter(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: MLMSettings = ADAPTER_SETTINGS,
    **options: Any,
) -> Adapter:
    """Trains a language adapter and its invertible adapter by masked language modelling. The model is unchanged.

    Args:
        model: a model with a decoupled LM head.
        tokenizer: its tokenizer.
        texts: texts in the language.
        settings: the settings of training.
        options: further arguments of `tune_mlm`.
    """
    with seeded(settings.seed):
        adapter = Adapter.for_language(model.config)
    stack = AdapterStack(adapter, drop_last=False).to(model.device).attach(model)
    try:
        result = tune_mlm(model, tokenizer, texts, settings, ticket=nothing(), dense=adapter, **options)
    finally:
        stack.remove()
    adapter.metadata = result.metadata
    return adapter


def _phase(number: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a phase, with its own folder for checkpoints."""
    folder = options.get("output_dir")
    return dict(options) if folder is None else {**options, "output_dir": Path(folder) / f"phase-{number}"}
