"""Sparse-update training: select the weights that matter, and train them for the price of that subset.

Two operations carry everything: `topk_delta` (which weights moved most between two versions of a model) and
`masked_adamw_` (one AdamW step over a ticket, with state for the active entries only).
"""

__version__ = "0.1.0"

from ltp_sparse.backends import available_backends, use_backend
from ltp_sparse.delta import SparseDelta
from ltp_sparse.files import FileFormatError
from ltp_sparse.frozen import frozen_digests, verify_frozen
from ltp_sparse.memory import memory_report
from ltp_sparse.names import canonical_parameters
from ltp_sparse.ops import masked_adamw_, topk_delta
from ltp_sparse.optim import MaskedAdamW, PackedParameters
from ltp_sparse.selection import Shard, TicketShard, select, select_sharded
from ltp_sparse.ticket import Ticket

__all__ = [
    "FileFormatError",
    "MaskedAdamW",
    "PackedParameters",
    "Shard",
    "SparseDelta",
    "Ticket",
    "TicketShard",
    "available_backends",
    "canonical_parameters",
    "frozen_digests",
    "masked_adamw_",
    "memory_report",
    "select",
    "select_sharded",
    "topk_delta",
    "use_backend",
    "verify_frozen",
]
