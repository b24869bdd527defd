"""MAD-X: language and task adapters, and invertible adapters, for XLM-R (Pfeiffer et al. 2020)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltp_sparse.models.attachment import Attachment
from ltp_sparse.weights import files
from ltp_sparse.weights.reading import reader

if TYPE_CHECKING:
    from transformers import XLMRobertaConfig

KIND = "adapter"
_STD = 0.02
_HEADER = ("hidden", "layers", "reduction", "invertible", "metadata")


class Adapter(nn.Module):
    """One bottleneck U ReLU(D x) per layer and, for languages, an invertible adapter on the embeddings.

    Weights are drawn from N(0, 0.02), biases are 0.

    Args:
        hidden: H of the model.
        layers: number of layers with a bottleneck, from the first.
        reduction: the bottleneck has H // reduction units.
        invertible: add an `InvertibleAdapter`.
        metadata: JSON values to save with the weights.
    """

    def __init__(
        self,
        hidden: int,
        layers: int,
        reduction: int,
        *,
        invertible: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layers < 1 or not 1 <= reduction <= hidden:
            raise ValueError(
                f"Adapter: layers must be at least 1 and reduction in [1, {hidden}], got {layers} and {reduction}"
            )
        self.hidden, self.reduction = hidden, reduction
        self.metadata = files.checked_metadata("Adapter", metadata)
        self.layers = nn.ModuleList(_bottleneck(hidden, hidden // reduction) for _ in range(layers))
        self.invertible = InvertibleAdapter(hidden) if invertible else None

    @classmethod
    def for_language(cls, config: XLMRobertaConfig, reduction: int = 2) -> Adapter:
        """A language adapter (XLM-R-base: 7,091,712 parameters, and 296,064 in the invertible adapter).

        It has a bottleneck in every layer. Language modelling uses all; tasks may skip the last one, with 590,976
        parameters.
        """
        return cls(config.hidden_size, config.num_hidden_layers, reduction, invertible=True)

    @classmethod
    def for_task(cls, config: XLMRobertaConfig, reduction: int = 16, *, drop_last: bool = True) -> Adapter:
        """A task adapter.

        Parameters for XLM-R-base: 819,984 with reduction 16 (894,528 with the last layer), 12,993,024 with reduction 1
        (14,174,208).

        Args:
            config: the model's configuration.
            reduction: 1 gives about the budget of a task SFT.
            drop_last: no bottleneck in the last layer.
        """
        return cls(config.hidden_size, config.num_hidden_layers - drop_last, reduction)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, sizes and metadata as one checksummed safetensors file, atomically."""
        sizes = {"hidden": self.hidden, "layers": len(self.layers), "reduction": self.reduction}
        header = {**sizes, "invertible": self.invertible is not None, "metadata": self.metadata}
        files.save(path, KIND, self.state_dict(), header)

    @classmethod
    @reader("adapter")
    def load(cls, path: str | os.PathLike[str]) -> Adapter:
        """Reads a file written by `save`, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is damaged or not an adapter.
        """
        tensors, header = files.load(path, KIND)
        with files.understanding(path, KIND):
            if not 0 < header["layers"] <= len(tensors):
                raise ValueError(f"{header['layers']} layers in {len(tensors)} tensors")
            with torch.device("meta"):  # so that forged sizes take no memory
                adapter = cls(**{name: header[name] for name in _HEADER})
            adapter.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return adapter


class InvertibleAdapter(nn.Module):
    """NICE: for x = [x1; x2], y1 = x1 + F(x2), y2 = x2 + G(y1); F and G are H/2 -> H/4 -> H/2 with a ReLU between."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"InvertibleAdapter: hidden must be even, since it is split in halves, got {hidden}")
        half = hidden // 2
        self.f, self.g = _bottleneck(half, half // 2), _bottleneck(half, half // 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H]. Returns y [..., H]."""
        first, second = x.chunk(2, -1)
        first = first + self.f(second)
        return torch.cat([first, second + self.g(first)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """The x with forward(x) = y [..., H]."""
        first, second = y.chunk(2, -1)
        second = second - self.g(first)
        return torch.cat([first - self.f(second), second], -1)


class AdapterStack(Attachment):
    """A language adapter and a task adapter on top of it, attached to an XLM-R. One of them may be missing.

    Let x be the output of a layer's FFN after dropout, r the input of the FFN and LN the norm of the layer. An adapter
    is a(x) = U ReLU(D LN(x + r)) + x, and the layer gives LN(a_task(a_lang(x)) + r). The invertible adapter of the
    language acts on the output of the embeddings, its inverse on the input of the module `lm_head.decoder`. (It has no
    effect in `PromptedMaskedLM`, which only reads rows of the decoder's weight.)

    Args:
        language: the language adapter.
        task: the task adapter.
        drop_last: no adapters in the last layer, for training and tests on a task; pass False for language modelling.
    """

    key = "adapters"

    def __init__(self, language: Adapter | None = None, task: Adapter | None = None, *, drop_last: bool = True) -> None:
        super().__init__()
        if language is None and task is None:
            raise ValueError("AdapterStack: expected a language adapter, a task adapter or both, got neither")
        self.language, self.task, self.drop_last = language, task, drop_last

    def swap(self, language: Adapter | None) -> Adapter | None:
        """Replaces the language adapter and returns the previous one.

        Args:
            language: on the device of the model; None: the task adapter alone.

        Raises:
            ValueError: it does not fit the model.
        """
        before, self.language = self.language, language
        try:
            for model in self._host:
                self._check(getattr(model, "roberta", model))
        except ValueError:
            self.language = before
            raise
        return before

    def _check(self, roberta: Any) -> None:
        # a stack that is attached by another module around the same encoder shows in its hooks
        owners = (getattr(hook, "__self__", None) for hook in roberta.embeddings._forward_hooks.values())
        if any(isinstance(owner, AdapterStack) and owner is not self for owner in owners):
            raise ValueError(
                "AdapterStack: expected an encoder without adapters, this one has another stack; remove() that one "
                "first (release() of a training result)"
            )
        config = roberta.config
        total = config.num_hidden_layers
        used = total - self.drop_last
        for adapter in filter(None, (self.language, self.task)):
            if adapter.hidden != config.hidden_size or not used <= len(adapter.layers) <= total:
                raise ValueError(
                    f"AdapterStack: expected adapters of hidden size {config.hidden_size} with {used} to {total} "
                    f"layers (drop_last={self.drop_last}), got {adapter.hidden} and {len(adapter.layers)}; make them "
                    "from this model's config"
                )

    def _connect(self, model: nn.Module, roberta: Any) -> None:
        layers = roberta.encoder.layer
        for index in range(len(layers) - self.drop_last):
            norm = layers[index].output.LayerNorm
            self._handles.append(norm.register_forward_pre_hook(partial(self._adapt, index)))
        self._handles.append(roberta.embeddings.register_forward_hook(self._into))
        decoder = getattr(getattr(model, "lm_head", None), "decoder", None)
        if decoder is not None:
            self._handles.append(decoder.register_forward_pre_hook(self._back))

    def _adapt(self, index: int, norm: nn.LayerNorm, args: tuple[Tensor]) -> tuple[Tensor]:
        # s = x + r suffices: a(x) + r = s + U ReLU(D LN(s)). Calling forward directly skips this hook.
        (s,) = args
        for adapter in filter(None, (self.language, self.task)):
            s = s + adapter.layers[index](norm.forward(s))
        return (s,)

    def _into(self, embeddings: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        invertible = None if self.language is None else self.language.invertible
        return output if invertible is None else invertible(output)

    def _back(self, decoder: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        invertible = None if self.language is None else self.language.invertible
        return args if invertible is None else (invertible.inverse(args[0]),)


def _bottleneck(outer: int, inner: int) -> nn.Sequential:
    down, up = nn.Linear(outer, inner), nn.Linear(inner, outer)
    for layer in (down, up):
        nn.init.normal_(layer.weight, std=_STD)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(down, nn.ReLU(), up)
