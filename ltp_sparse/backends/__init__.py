"""The only access to compiled code and kernels: the backends, the reason when one is missing, and the choice of one.

* ``reference``: plain PyTorch, every device.
* ``compiled``:  C++ for CPU tensors, CUDA for GPU tensors (`csrc/`).
* ``triton``:    Triton kernels (`kernels/`), GPU tensors; CPU tensors under TRITON_INTERPRET=1.

A backend is a module with NAME, NEEDS_RANKS (whether it reads the directory of a tile table), `probe(device)` (the
reason why it cannot serve a device) and functions of `arguments.RECORDS`. ``auto`` takes the fastest backend that can
serve the call. A backend chosen by name is used, or the call is refused.
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
