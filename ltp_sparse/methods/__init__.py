"""Training methods: small classes that define which weights train, which inputs are built and which ticket applies."""

from ltp_sparse.methods.adaptive import AdaSFT
from ltp_sparse.methods.base import Context, Method, Settings, Setup
from ltp_sparse.methods.deep_prompt import DeepPromptTuning
from ltp_sparse.methods.fine_tuning import LTSFT, SCSFT, BitFit, FineTuning, HeadOnly, RandSFT
from ltp_sparse.methods.madx import MADX
from ltp_sparse.methods.prompt_learning import (
    LTP,
    AllActive,
    DiscretePrompt,
    MixedPrompt,
    PromptMethod,
    PromptOnly,
    PromptSettings,
    RandomTicket,
    SoftPrompt,
)
from ltp_sparse.methods.soft_prompt_tuning import SPT

METHODS: dict[str, type[Method]] = {
    method.key: method
    for method in (
        LTP, AllActive, RandomTicket, DiscretePrompt, SoftPrompt, MixedPrompt, PromptOnly,
        DeepPromptTuning, FineTuning, BitFit, HeadOnly, LTSFT, SCSFT, RandSFT, AdaSFT, MADX, SPT,
    )
}  # fmt: skip
"""Name in recipes and on the command line -> method."""


def register(method: type[Method]) -> type[Method]:
    """Class decorator that adds your own method, so that recipes and `load_trained` find it by its key.

    Raises:
        ValueError: another method has this key.
    """
    if METHODS.get(method.key, method).__qualname__ != method.__qualname__:
        raise ValueError(
            f"register: there is a method {method.key!r} already, {METHODS[method.key].__name__}; take another key"
        )
    METHODS[method.key] = method
    return method


__all__ = [
    "LTP",
    "LTSFT",
    "MADX",
    "METHODS",
    "SCSFT",
    "SPT",
    "AdaSFT",
    "AllActive",
    "BitFit",
    "Context",
    "DeepPromptTuning",
    "DiscretePrompt",
    "FineTuning",
    "HeadOnly",
    "Method",
    "MixedPrompt",
    "PromptMethod",
    "PromptOnly",
    "PromptSettings",
    "RandSFT",
    "RandomTicket",
    "Settings",
    "Setup",
    "SoftPrompt",
    "register",
]
