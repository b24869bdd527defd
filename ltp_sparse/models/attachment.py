"""The base class of adapters, soft masks and deep prompts: modules that are attached to an XLM-R and removed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import nn
from torch.utils.hooks import RemovableHandle


class Attachment(nn.Module):
    """A module that takes part in the forward pass of an XLM-R. The model's parameters keep their names and values.

    Attributes:
        key: name of the submodule in the model while attached; its parameters are "<key>.*" there.
    """

    key: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        # in a tuple, or nn.Module would register the model as a submodule
        self._host: tuple[nn.Module, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._overridden: list[nn.Module] = []

    def attach(self, model: nn.Module) -> Self:
        """Becomes the submodule `key` of a model, in the model's training or evaluation mode. Returns itself.

        Args:
            model: an XLM-R model with or without a head, or a module with one as `roberta`. Its `parameters()`,
                `state_dict()` and `to(device)` then include this module.

        Raises:
            TypeError: the model is of another architecture.
            ValueError: sizes differ, or the model has such a module already.
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
        """Detaches from the model, which is then as before `attach`."""
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
        """Replaces the `forward` of a module. Unlike a wrapper, this changes no parameter name."""
        if "forward" in module.__dict__:
            raise ValueError(f"{type(self).__name__}: another attachment changes the same modules; remove() it first")
        module.__dict__["forward"] = forward
        self._overridden.append(module)


def encoder_of(model: Any) -> Any:
    """The `XLMRobertaModel` of a model with or without a head, or of a module that has one as `roberta`."""
    roberta = getattr(model, "roberta", model)
    if not hasattr(getattr(roberta, "encoder", None), "layer") or not hasattr(roberta, "embeddings"):
        raise TypeError(
            f"expected an XLM-R model, or a module that has one as `roberta`, got {type(model).__name__}; load one "
            "with ltp_sparse.models.backbone.load_backbone"
        )
    return roberta
