"""Names, ties, fingerprints and the stack of applied deltas. Nothing else in the library matches tensors by name."""

from __future__ import annotations

import difflib
import hashlib
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltp_sparse.files import hash_tensor
from ltp_sparse.tensors import check_plain_tensor

if TYPE_CHECKING:
    from ltp_sparse.delta import Applied

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""Prefixes put in front of parameter names by DDP, torch.compile and peft."""


def strip_wrappers(name: str) -> str:
    """The name without the prefixes of wrapping modules, wherever a wrapper put them."""
    name = name.replace("_orig_mod.", "")
    while (prefix := next((w for w in WRAPPERS if name.startswith(w)), None)) is not None:
        name = name.removeprefix(prefix)
    return name


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts "layer.2" before "layer.10"."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)


def parameter_order(names: Iterable[str]) -> list[str]:
    """The canonical order of parameters: natural order of their names.

    Ties of the selection go to the earliest parameter, so this order must not depend on how a model class registers its
    modules (which differs between transformers versions) nor on the order of tensors in a file.
    """
    return sorted(names, key=natural_key)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, in canonical order; a tied parameter appears once.

    Of the names of a tied parameter, the one inside the base model wins ("roberta.embeddings.word_embeddings.weight",
    never "lm_head.decoder.weight"), whichever the model class happens to register first.
    """
    aliases: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(strip_wrappers(name))
        parameters[id(parameter)] = parameter
    prefix = getattr(unwrapped(model), "base_model_prefix", "") or "roberta"
    canonical: dict[str, nn.Parameter] = {}
    for key, names in aliases.items():
        name = min(names, key=lambda name: (not name.startswith(prefix + "."), natural_key(name)))
        if name in canonical:
            raise ValueError(f"two parameters of the model are called {name!r} once wrapping prefixes are taken off")
        canonical[name] = parameters[key]
    return {name: canonical[name] for name in parameter_order(canonical)}


def canonical_tensors(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical name -> tensor of a module's parameters or of a mapping, in canonical order."""
    if isinstance(source, nn.Module):
        return {name: parameter.detach() for name, parameter in canonical_parameters(source).items()}
    if not isinstance(source, Mapping):
        raise TypeError(f"expected a module or a mapping from names to tensors, got {type(source).__name__}")
    stripped = {strip_wrappers(name): tensor for name, tensor in source.items()}
    if len(stripped) != len(source):
        raise ValueError("two names of the mapping are equal once the prefixes of wrapping modules are taken off")
    return {name: stripped[name] for name in parameter_order(stripped)}


def closest(name: str, names: Iterable[str], count: int = 3) -> str:
    """A phrase that lists the known names closest to `name`."""
    near = difflib.get_close_matches(name, list(names), n=count, cutoff=0.0)
    return ", ".join(repr(n) for n in near) if near else "none"


def match_names(wanted: Iterable[str], known: Iterable[str], *, what: str, where: str) -> list[str]:
    """The names of `wanted`, all of which must be in `known`; otherwise an error that lists the closest."""
    wanted, known = list(wanted), set(known)
    missing = [name for name in wanted if name not in known]
    if missing:
        share = "no name" if len(missing) == len(wanted) else f"{len(missing)} of {len(wanted)} names"
        found = "is" if share == "no name" else "are not"
        raise ValueError(
            f"{what}: {share} of the ticket {found} in {where}; {missing[0]!r} is missing, "
            f"closest there: {closest(missing[0], known)}. Check that it belongs to this architecture"
        )
    return wanted


def digest(dtype: torch.dtype, shape: Sequence[int], pieces: Iterable[Tensor]) -> str:
    """A hash of dtype, shape and bits of a tensor that comes in row-major pieces (SHA-256, 128 bits kept)."""
    sha = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    for piece in pieces:
        hash_tensor(sha, piece)
    return sha.hexdigest()[:32]


def tensor_digest(tensor: Tensor) -> str:
    """`digest` of a tensor in memory."""
    return digest(tensor.dtype, tensor.shape, [tensor])


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> digest of the tensor: what identifies a base model. Hashes on all threads of torch.

    Raises:
        TypeError: a tensor is of a subclass, sparse or without values; the message names it.
    """
    for name, tensor in tensors.items():
        check_plain_tensor(tensor, f"fingerprint: {name!r}")
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(tensor_digest, tensors.values()), strict=True))


_applied: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def applied_deltas(model: nn.Module) -> list[Applied]:
    """The stack of deltas applied to a model, earliest first: a live list, shared by all models around one base model.

    Copies of a model start with an empty one.
    """
    model = unwrapped(model)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "roberta", model)
    return _applied.setdefault(base if isinstance(base, nn.Module) else model, [])


def layer_of(name: str) -> str:
    """The layer a parameter belongs to: "embeddings", "layer 0", "layer 1", ..., or "other" (heads)."""
    if match := re.search(r"\b(?:layers?|h|blocks?)\.(\d+)\.", name):
        return f"layer {match[1]}"
    return "embeddings" if "embed" in name else "other"


def module_of(name: str) -> str:
    """The kind of module a parameter belongs to: "embeddings", "attention", "feed-forward", "LayerNorm" or "other"."""
    if is_layer_norm(name):
        return "LayerNorm"
    if "embed" in name:
        return "embeddings"
    if "attention" in name or "attn" in name:
        return "attention"
    return "feed-forward" if layer_of(name) not in ("embeddings", "other") else "other"


def is_layer_norm(name: str) -> bool:
    """Whether a parameter belongs to a LayerNorm module; the LM head's `layer_norm` does not count, as in LT-SFT."""
    return "LayerNorm" in name


def in_base_model(name: str, prefix: str = "roberta") -> bool:
    """Whether a parameter belongs to the base model, as opposed to a head on top of it."""
    return name.startswith(prefix + ".")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the regular expressions is found in the name."""
    return any(re.search(pattern, name) for pattern in patterns)
