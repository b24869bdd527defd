"""The optimizer."""

from ltp_sparse.optim.masked_adamw import MaskedAdamW, freeze

__all__ = ["MaskedAdamW", "freeze"]
