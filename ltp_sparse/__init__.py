"""Sparse-update training: select the weights that matter, and train them at the cost of that subset.

The library is built on two operations: `topk_delta` (which weights moved most between two versions of a model) and
`masked_adamw_` (one AdamW step over a ticket, with state for the active entries only).

Names are imported on first use, so that the command line responds without torch. If torch is already imported, all are
imported at once, with `torch.ops.ltp_sparse`.
"""

__version__ = "0.1.0"

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from ltp_sparse import _moved  # noqa: F401 (modules by their earlier names)

if TYPE_CHECKING:
    from ltp_sparse.backends import available_backends, use_backend
    from ltp_sparse.deltas.delta import SparseDelta
    from ltp_sparse.deltas.switcher import TicketSwitcher
    from ltp_sparse.loading import load
    from ltp_sparse.ops import masked_adamw_, topk_delta
    from ltp_sparse.optim import MaskedAdamW, PackedParameters
    from ltp_sparse.optim.frozen import frozen_digests, verify_frozen
    from ltp_sparse.optim.memory import memory_report
    from ltp_sparse.optim.reduce_scatter import compress_gradients
    from ltp_sparse.selection import Shard, TicketShard, select, select_sharded
    from ltp_sparse.tickets.ticket import Ticket
    from ltp_sparse.weights.names import canonical_parameters
    from ltp_sparse.weights.reading import FileFormatError

__all__ = [
    "FileFormatError",
    "MaskedAdamW",
    "PackedParameters",
    "Shard",
    "SparseDelta",
    "Ticket",
    "TicketShard",
    "TicketSwitcher",
    "available_backends",
    "canonical_parameters",
    "compress_gradients",
    "frozen_digests",
    "load",
    "masked_adamw_",
    "memory_report",
    "select",
    "select_sharded",
    "topk_delta",
    "use_backend",
    "verify_frozen",
]

_MODULES = {  # of the names above
    "backends": ("available_backends", "use_backend"),
    "ops": ("masked_adamw_", "topk_delta"),
    "optim": ("MaskedAdamW", "PackedParameters"),
    "optim.frozen": ("frozen_digests", "verify_frozen"),
    "optim.memory": ("memory_report",),
    "optim.reduce_scatter": ("compress_gradients",),
    "selection": ("Shard", "TicketShard", "select", "select_sharded"),
    "deltas.delta": ("SparseDelta",),
    "deltas.switcher": ("TicketSwitcher",),
    "loading": ("load",),
    "tickets.ticket": ("Ticket",),
    "weights.names": ("canonical_parameters",),
    "weights.reading": ("FileFormatError",),
}


def _import_all() -> None:
    for module, names in _MODULES.items():
        found = importlib.import_module(f"{__name__}.{module}")
        globals().update({name: getattr(found, name) for name in names})


def __getattr__(name: str) -> Any:
    if name in __all__:
        _import_all()
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    _import_all()
