"""The one door to compiled code and kernels: which backends there are, why one is missing, and which one serves a call.

* ``reference``: plain PyTorch, every device.
* ``compiled``:  C++ for CPU tensors, CUDA for GPU tensors (`csrc/`).
* ``triton``:    Triton kernels (`kernels/`), GPU tensors; CPU tensors under TRITON_INTERPRET=1.

A backend is a module with NAME, NEEDS_RANKS (whether it reads the rank directory of a tile table), `probe(device)`
(why it cannot serve a device) and the functions of `arguments.RECORDS`. ``auto`` takes the fastest that serves the
call; an explicit choice is obeyed or refused.
"""

from ltp_sparse.backends.choice import (
    CHOICES,
    ENVIRONMENT,
    NAMES,
    OPERATIONS,
    Backend,
    BackendUnavailable,
    available_backends,
    choices,
    chosen,
    named,
    resolve,
    unavailable_reason,
    use_backend,
)
from ltp_sparse.backends.compiled import isa
from ltp_sparse.weights.tensors import DTYPES

__all__ = [
    "CHOICES",
    "DTYPES",
    "ENVIRONMENT",
    "NAMES",
    "OPERATIONS",
    "Backend",
    "BackendUnavailable",
    "available_backends",
    "choices",
    "chosen",
    "isa",
    "named",
    "resolve",
    "unavailable_reason",
    "use_backend",
]
