"""Weights that follow a trainer: it publishes versions to a store as changes, and servers apply them bit for bit."""

from ltp_sparse.sync.follower import Follower
from ltp_sparse.sync.publisher import Publisher
from ltp_sparse.sync.stores import FolderStore, FsspecStore, Store, open_store
from ltp_sparse.sync.version import Version
from ltp_sparse.sync.vllm import SparseWeightPatch, vllm_patches, write_vllm_patches

__all__ = [
    "FolderStore",
    "Follower",
    "FsspecStore",
    "Publisher",
    "SparseWeightPatch",
    "Store",
    "Version",
    "open_store",
    "vllm_patches",
    "write_vllm_patches",
]
