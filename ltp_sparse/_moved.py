"""Modules by their names in 0.1, until 0.3: `ltp_sparse.names` is `ltp_sparse.weights.names`, and so on.

A module that moved is the same object under both names. For a module that was split, the old name is a module with the
names of all parts.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "checkpoints": ("weights.checkpoints", "ops.sources"),
    "delta": ("deltas.delta",),
    "encoding": ("tickets.index_set", "tickets.bits", "tickets.tile_table"),
    "files": ("weights.files",),
    "foreign": ("deltas.lt_sft",),
    "frozen": ("optim.frozen",),
    "generated": ("tasks.generated",),
    "memory": ("optim.memory",),
    "modules": ("models",),
    "names": ("weights.names", "weights.digests", "deltas.delta"),
    "prompting.model": ("models.masked_prompt",),
    "prompting.prompt_encoder": ("models.prompt_encoder",),
    "quantization": ("backends.quantization",),
    "random_sets": ("tickets.random_sets",),
    "reference": ("backends.reference",),
    "results": ("recipes.results",),
    "rounding": ("backends.rounding",),
    "staging": ("ops.staging",),
    "ticket": ("tickets.ticket",),
    "topk": ("ops.routes", "ops.samples", "ops.digits", "ops.ranks", "ops.sources", "tickets.counts", "tickets.layout"),
    "training.adam_l2": ("optim.adam_l2",),
    "training.backbone": ("models.backbone",),
}
"""Name in 0.1 -> modules, the main part first; all without `ltp_sparse.`."""


class _Moved(MetaPathFinder, Loader):
    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}  # of modules that are being imported by an old name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package == "ltp_sparse" and self.parts(old):
            return ModuleSpec(name, self, is_package=old in ("generated", "modules"))
        return None

    @staticmethod
    def parts(old: str) -> tuple[str, ...]:
        """The present modules for an old name, also inside moved folders; empty if the name has not changed."""
        folder, _, inside = old.partition(".")
        if inside and folder in ("generated", "modules"):
            return (f"{MOVED[folder][0]}.{inside}",)
        return MOVED.get(old, ())

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        parts = [import_module(f"ltp_sparse.{part}") for part in self.parts(spec.name.partition(".")[2])]
        if len(parts) == 1:
            self._specs[spec.name] = parts[0].__spec__
            return parts[0]
        both = ModuleType(spec.name, f"Moved: {', '.join(part.__name__ for part in parts)}.")
        for part in reversed(parts):
            both.__dict__.update({name: value for name, value in vars(part).items() if not name.startswith("__")})
        return both

    def exec_module(self, module: ModuleType) -> None:
        old = module.__spec__
        if old is not None and old.name in self._specs:
            module.__spec__ = self._specs.pop(old.name)  # the import system has replaced it by the old name


sys.meta_path.insert(0, _Moved())
