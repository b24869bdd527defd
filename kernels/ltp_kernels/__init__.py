"""Triton kernels of `masked_adamw_` and of the band pass of `topk_delta`, with the signatures of the reference.

They import nothing else of this library. CPU tensors are served by Triton's interpreter (TRITON_INTERPRET=1).
"""

from .masked_adamw import masked_adamw_, masked_pack_, masked_sum_squares
from .topk_delta import delta_band

__all__ = ["delta_band", "masked_adamw_", "masked_pack_", "masked_sum_squares"]
