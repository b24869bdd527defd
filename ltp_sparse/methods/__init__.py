"""Training methods: small classes that say which weights train, which input is built, and which ticket applies."""

from ltp_sparse.methods.prompt_learning import (
    LTP,
    PromptMethod,
    PromptOnly,
    PromptSettings,
    RandomTicket,
    SoftPrompt,
)

METHODS: dict[str, type[PromptMethod]] = {
    "ltp": LTP,
    "random-ticket": RandomTicket,
    "soft-prompt": SoftPrompt,
    "prompt-only": PromptOnly,
}
"""Every method by the name that recipes and the command line use."""

__all__ = ["LTP", "METHODS", "PromptMethod", "PromptOnly", "PromptSettings", "RandomTicket", "SoftPrompt"]
