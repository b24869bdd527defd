"""MAD-X: task adapters stacked on language adapters, the language model frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ltp_sparse.methods.base import Context, Settings, Setup, nothing
from ltp_sparse.methods.fine_tuning import ClassifierMethod
from ltp_sparse.modules import Adapter, AdapterStack
from ltp_sparse.ticket import Ticket
from ltp_sparse.training.mlm import MLMSettings, tune_mlm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, XLMRobertaForMaskedLM

ADAPTER_SETTINGS = MLMSettings(batch_size=8, epochs=100, step_bounds=(30_000, 100_000), validation=0.05, l1=0.0)
"""Of language adapters."""


@dataclass(frozen=True, kw_only=True)
class MADX(ClassifierMethod):
    """A task adapter and the head train; below the task adapter a language adapter stays as it is.

    reduction:        of the task adapter; 1 gives about the budget of a task SFT
    drop_last:        no adapters in the last layer
    language_adapter: file of the adapter of the training language, or, on loading, of the language to be labelled;
                      None: none
    """

    key = "mad-x"
    name = "MAD-X"
    settings: Settings = field(
        default_factory=lambda: Settings(max_length=128, schedule="linear", eval_steps=625, seeds=(42,))
    )
    reduction: int = 16
    drop_last: bool = True
    language_adapter: str | None = None

    def _ticket(self, language_model: XLMRobertaForMaskedLM, given: Ticket | None, seed: int) -> Ticket:
        return nothing()

    def build(self, language_model: XLMRobertaForMaskedLM, context: Context, *, baked: bool = False) -> Setup:
        setup = super().build(language_model, context, baked=baked)
        language = None if self.language_adapter is None else Adapter.load(self.language_adapter)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            task = Adapter.for_task(language_model.config, self.reduction, drop_last=self.drop_last)
        stack = AdapterStack(language, task, drop_last=self.drop_last).to(language_model.device).attach(setup.model)
        return replace(setup, dense=(task, *setup.dense), undo=stack.remove)


def train_language_adapter(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: MLMSettings = ADAPTER_SETTINGS,
    **options: Any,
) -> Adapter:
    """A language adapter with its invertible adapter, trained as a masked language model; the model stays as it is.

    model: with a decoupled LM head
    options: further arguments of `tune_mlm`
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        adapter = Adapter.for_language(model.config)
    stack = AdapterStack(adapter, drop_last=False).to(model.device).attach(model)
    try:
        result = tune_mlm(model, tokenizer, texts, settings, ticket=nothing(), dense=adapter, **options)
    finally:
        stack.remove()
    adapter.metadata = result.metadata
    return adapter
