"""Triton kernels of `masked_adamw_`, of copies of active entries, of the passes of `topk_delta`, and of digests.

They take the records of `ltp_sparse/backends/arguments.py` without importing this library. Triton's interpreter runs
them on CPU tensors (TRITON_INTERPRET=1).
"""

from .digests import tile_digests
from .masked_adamw import gradient_norm, masked_adamw_, masked_pack_, masked_sum_squares, prepare_step, prepared_of
from .masked_copy import masked_gather_, masked_scatter_, masked_swap_
from .topk_delta import candidate_histogram, delta_band, sample_keys, take_above, take_ties

__all__ = [
    "candidate_histogram",
    "delta_band",
    "gradient_norm",
    "masked_adamw_",
    "masked_gather_",
    "masked_pack_",
    "masked_scatter_",
    "masked_sum_squares",
    "masked_swap_",
    "prepare_step",
    "prepared_of",
    "sample_keys",
    "take_above",
    "take_ties",
    "tile_digests",
]
