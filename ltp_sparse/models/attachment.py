"""What adapters, soft masks and deep prompts have in common: they join an XLM-R and leave it again as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import nn
from torch.utils.hooks import RemovableHandle


class Attachment(nn.Module):
    """A module that takes part in the forward pass of an XLM-R, whose own parameters keep their names and values.

    key: the name under which the model holds it while attached; its parameters are "<key>.*" there
    """

    key: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        # a tuple hides the model from nn.Module, which would take it for a part of this one
        self._host: tuple[nn.Module, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._overridden: list[nn.Module] = []

    def attach(self, model: nn.Module) -> Self:
        """Joins a model, in its training or evaluation mode, and becomes its submodule `key`. Returns itself.

        Args:
            model: an XLM-R model with or without a head, or a module around one that has it as `roberta`. It is the
                model that will be trained: its `parameters()` and `state_dict()` then hold this module's, too, and its
                `to(device)` moves both.

        Raises:
            TypeError: the model is of another architecture.
            ValueError: sizes differ, or it is already attached.
        """
        if self._host or hasattr(model, self.key):
            raise ValueError(
                f"{type(self).__name__}: expected a model without {self.key!r}, it has one; remove() it first"
            )
        roberta: Any = encoder_of(model)
        self._check(roberta)
        self._connect(model, roberta)
        model.add_module(self.key, self.train(model.training))
        self._host = (model,)
        return self

    def remove(self) -> None:
        """Leaves the model as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        for module in self._overridden:
            del module.__dict__["forward"]
        for model in self._host:
            delattr(model, self.key)
        self._handles, self._overridden, self._host = [], [], ()

    def _check(self, roberta: Any) -> None:
        """Raises ValueError if this module does not fit the model."""
        raise NotImplementedError

    def _connect(self, model: nn.Module, roberta: Any) -> None:
        """Registers hooks in `_handles` and overrides forward methods."""
        raise NotImplementedError

    def _override(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Gives one module another `forward`; unlike wrapping it, this changes no name of a parameter."""
        if "forward" in module.__dict__:
            raise ValueError(f"{type(self).__name__}: another attachment changes the same modules; remove() it first")
        module.__dict__["forward"] = forward
        self._overridden.append(module)


def encoder_of(model: Any) -> Any:
    """The `XLMRobertaModel` of a model with or without a head, or of a module around one."""
    roberta = getattr(model, "roberta", model)
    if not hasattr(getattr(roberta, "encoder", None), "layer") or not hasattr(roberta, "embeddings"):
        raise TypeError(
            f"expected an XLM-R model, or a module that has one as `roberta`, got {type(model).__name__}; load one "
            "with ltp_sparse.models.backbone.load_backbone"
        )
    return roberta
