"""The optimizer."""

from ltp_sparse.optim.masked_adamw import MaskedAdamW, NoGradients, StalledUpdates, freeze
from ltp_sparse.optim.packed_parameters import PackedParameters

__all__ = ["MaskedAdamW", "NoGradients", "PackedParameters", "StalledUpdates", "freeze"]
