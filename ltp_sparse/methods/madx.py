"""MAD-X: task adapters stacked on language adapters, the language model frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ltp_sparse.methods.base import Context, Settings, Setup, seeded
from ltp_sparse.methods.fine_tuning import TASK_SFT, ClassifierMethod
from ltp_sparse.models import Adapter, AdapterStack

if TYPE_CHECKING:
    from transformers import XLMRobertaForMaskedLM


@dataclass(frozen=True, kw_only=True)
class MADX(ClassifierMethod):
    """A task adapter and the head train. The language adapter below the task adapter stays as it is.

    Attributes:
        reduction: hidden size divided by the size of the task adapter. 1 gives about as many values as a task SFT.
        drop_last: leaves the adapters of the last layer out.
        language_adapter: file with the adapter of the training language or, when a trained model is loaded, of the
            language to label. None uses no language adapter.
    """

    key = "mad-x"
    name = "MAD-X"
    settings: Settings = TASK_SFT
    reduction: int = 16
    drop_last: bool = True
    language_adapter: str | None = None

    def build(self, language_model: XLMRobertaForMaskedLM, context: Context, *, baked: bool = False) -> Setup:
        setup = super().build(language_model, context, baked=baked)
        language = None if self.language_adapter is None else Adapter.load(self.language_adapter)
        with seeded(context.seed):
            task = Adapter.for_task(language_model.config, self.reduction, drop_last=self.drop_last)
        stack = AdapterStack(language, task, drop_last=self.drop_last).to(language_model.device).attach(setup.model)
        return replace(setup, dense=(task, *setup.dense), undo=stack.remove)
