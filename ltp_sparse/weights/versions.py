"""Versions of a model (modules, mappings or checkpoints) as weights by name, and the matching of two versions."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ltp_sparse.weights.checkpoints import Readable, open_checkpoint, pairs_of_pieces, read_piece
from ltp_sparse.weights.names import (
    Named,
    bare_names,
    canonical_group,
    canonical_parameters,
    canonical_tensors,
    is_floating,
    matches,
    unwrapped,
)
from ltp_sparse.weights.reading import closest
from ltp_sparse.weights.sharding import Cut, everywhere, is_sharded, local, reshard

Weights = nn.Module | Mapping[str, Any] | str | os.PathLike[str]
"""A version of a model: a module, a mapping from names to tensors, or a safetensors checkpoint (file or folder)."""

BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|final_logits_bias|e_score_correction_bias|masked_bias"
    r"|(original_)?inv_freq|inv_timescales|freqs_cis|position_ids|token_type_ids|relative_position_index"
    r"|embed_avg|cluster_size|empty_weight)$"
)
"""Names of floating-point buffers (integer buffers are known by their dtype).

A file does not distinguish buffers from weights. If the other side of a selection is a module, its buffers are known.
Between two files, a floating-point buffer with an unusual name counts as a weight.
"""

_OF_QUANTISED = re.compile(
    r"(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|scales|qzeros|g_idx|weight_scale(_inv)?"
    r"|weight_zero_point|weight_shape|quant_state\..*)$"
)
"""Names of tensors that bitsandbytes, GPTQ, AWQ and compressed-tensors store with a quantised weight."""

_WRAPPED_PART = re.compile(r"(^|\.)(module|base_model\.model)(?=\.)")

Missing = bool | str | Iterable[str]
"""Names that can be on one side only: all, none, or those that match one of the regular expressions."""


def open_weights(weights: Weights) -> Named[Readable]:
    """Canonical name -> weight, in canonical order; the same for a module, its state dict and its checkpoint.

    Buffers (see `BUFFERS`), integers, quantised tensors, and tensors that a class of transformers does not save are
    left out.

    Args:
        weights: the version of the model.

    Warns:
        UserWarning: tensors are quantised, so a ticket cannot train them.

    Raises:
        FileFormatError: a file is damaged (see `open_checkpoint`).
        ValueError: two names are equal without the names of wrapping modules.
    """
    if isinstance(weights, nn.Module):
        found = _of_module(weights)
    else:
        found = _of_mapping(open_checkpoint(weights) if isinstance(weights, str | os.PathLike) else weights)
    if new := found.quantised - getattr(weights, "quantised", frozenset()):
        warnings.warn(
            f"{len(new)} quantised tensors, e.g. {min(new)!r}, are left out: a ticket selects "
            "and trains weights in float32, bfloat16 or float16",
            UserWarning,
            stacklevel=3,
        )
    return found


def _of_module(model: nn.Module) -> Named[Readable]:
    reshard(model)
    named = canonical_parameters(model)
    quantised = {name for name, parameter in named.items() if _is_quantised(parameter)}
    unsaved = getattr(unwrapped(model), "_keys_to_ignore_on_save", None) or ()
    buffers = named.buffers | {name for name in map(named.called, unsaved) if name is not None}
    kept = {name: p.detach() for name, p in named.items() if name not in quantised and name not in buffers}
    return Named(kept, named.aliases, buffers, quantised)


def _is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter does not hold one number per weight (bitsandbytes, torchao)."""
    return not is_floating(tensor) or (is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor))


def _of_mapping(tensors: Mapping[str, Any]) -> Named[Any]:
    named = tensors if isinstance(tensors, Named) else _tied_by_memory(tensors)
    integers = {name for name, tensor in named.items() if not is_floating(tensor)}
    quantised = {name for name in integers if "weight" in name.rpartition(".")[2]} - named.buffers
    stems = tuple(name.removesuffix(name.rpartition(".")[2]) for name in quantised)
    beside = {name for name in named if stems and name.startswith(stems) and _OF_QUANTISED.search(name)} - quantised
    buffers = named.buffers | {name for name in named if BUFFERS.search(name)} | (integers - quantised) | beside
    kept = {name: tensor for name, tensor in named.items() if name not in buffers and name not in quantised}
    return Named(kept, named.aliases, buffers, quantised | named.quantised, tied_by_memory=named.tied_by_memory)


def _tied_by_memory(tensors: Mapping[str, Any]) -> Named[Any]:
    """Like `canonical_tensors` of a mapping, but tensors that share their memory are tied, as in a state dict."""
    if not isinstance(tensors, Mapping):
        return canonical_tensors(tensors)  # raises the error
    tensors = {name: t for name, t in tensors.items() if not str(name).endswith("_extra_state")}  # of no parameter
    for name, tensor in tensors.items():
        if not isinstance(getattr(tensor, "dtype", None), torch.dtype):
            inside = f"; if it is the state dict, pass that alone: ...[{name!r}]" if isinstance(tensor, Mapping) else ""
            raise TypeError(
                f"expected a mapping from names to tensors, got a {type(tensor).__name__} for {name!r}{inside}"
            )
    bare = bare_names(tensors, [name for name, tensor in tensors.items() if is_floating(tensor)])
    seen: dict[tuple[Any, ...], Any] = {}
    named = canonical_group(((name, seen.setdefault(_place(t), t)) for name, t in tensors.items()), bare)
    named.tied_by_memory = True
    return named


def _place(tensor: Any) -> tuple[Any, ...]:
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if dense and tensor.numel() and tensor.device.type != "meta":
        return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
    return (id(tensor),)


def side_by_side(one: Named[Readable], other: Named[Readable]) -> tuple[Named[Readable], Named[Readable]]:
    """Both sides under common names. What one side knows of buffers, ties and wrapping modules applies to the other.

    A tensor that one side has under an alias of the other gets the canonical name. If one side ties two names and the
    other has two tensors, the second one is dropped if both have the same bits. Otherwise both are parameters on both
    sides.

    Warns:
        UserWarning: equal tensors stay two parameters, because only shared memory ties them on the other side.
    """
    one = _renamed(one, other)
    other = _renamed(other, one)
    return _untied(one, other), _untied(other, one)


def _renamed(side: Named[Readable], by: Named[Readable]) -> Named[Readable]:
    """One side under the names of the other, without the other's buffers and without copies of its tied tensors."""
    kept = {name: tensor for name, tensor in side.items() if name not in by.buffers or name in by}
    aliases, clones = dict(side.aliases), []
    for name in [name for name in kept if name not in by]:
        canonical = by.called(name)
        if canonical is None:  # a wrapped part of a model, which mappings and files do not show
            canonical = by.called(_WRAPPED_PART.sub("", name).removeprefix("."))
            if canonical is None or canonical in kept:
                continue
        if canonical not in kept:
            kept[canonical] = kept.pop(name)
            aliases = {o: canonical if c == name else c for o, c in aliases.items()} | {name: canonical}
        elif same_bits(kept[name], kept[canonical]):
            if by.tied_by_memory:
                clones.append((name, canonical))
            else:
                del kept[name]
                aliases[name] = canonical
    if clones:
        name, canonical = clones[0]
        warnings.warn(
            f"{name!r} equals {canonical!r} bit for bit, and both are one tensor on the other side ({len(clones)} such "
            "pairs): they look like copies of tied weights, but count as two parameters. Pass the module instead of "
            "its state dict, or leave one out (pool=)",
            UserWarning,
            stacklevel=4,
        )
    return Named(kept, aliases, side.buffers, side.quantised, side.tied_by_memory)


def _untied(side: Named[Readable], by: Named[Readable]) -> Named[Readable]:
    """One side, with a tied tensor under both names if the other side has two tensors."""
    twins = {o: side[c] for o, c in side.aliases.items() if o in by and c in by}
    return Named({**side, **twins}, side.aliases, side.buffers, side.quantised, side.tied_by_memory)


def same_bits(one: Readable, other: Readable) -> bool:
    """Whether two tensors have the same dtype, shape and bits; if they are sharded, on all ranks."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if sharded := [tensor for tensor in (one, other) if is_sharded(tensor)]:
        cut = Cut.of(sharded[0], "a tensor")
        return everywhere(sharded[0], same_bits(own_block(one, cut), own_block(other, cut)))
    pairs = pairs_of_pieces(one, other)
    return all(torch.equal(*(piece.contiguous().view(torch.uint8) for piece in pair)) for pair in pairs)


def own_block(tensor: Readable, cut: Cut) -> Tensor:
    """This rank's block of a tensor that is sharded or whole, in memory or in a file.

    Raises:
        ValueError: it is sharded in another way.
    """
    if is_sharded(tensor):
        if Cut.of(tensor, "a tensor") != cut:
            raise ValueError(
                f"a tensor of shape {list(cut.shape)} is sharded in two ways; shard both models in the same way"
            )
        return local(tensor).detach()
    if isinstance(tensor, Tensor):
        return cut.taken_from(tensor)
    if cut.by_rows:
        return read_piece(tensor, *cut.entries).view(cut.sizes)
    return cut.taken_from(read_piece(tensor, 0, tensor.numel()).view(cut.shape))


def check_sides(
    one: Iterable[str], other: Iterable[str], allow_missing: Missing, *, what: str, sides: tuple[str, str]
) -> dict[str, int]:
    """Side -> number of names that are on this side only.

    Args:
        one: the names of the first side.
        other: the names of the second side.
        allow_missing: names that can be on one side only.
        what: the caller, for messages.
        sides: what to call the sides in messages.

    Raises:
        ValueError: the sides share no name, or a name is on one side only and `allow_missing` does not cover it.
    """
    one, other = list(one), list(other)
    here, there = set(one), set(other)
    if not here & there:
        name = next(iter(other), "")
        raise ValueError(f"{what}: the models share no parameter; {name!r} is closest to {closest(name, one)}")
    alone = [[name for name in one if name not in there], [name for name in other if name not in here]]
    if allow_missing is not True:
        given = [] if allow_missing is False else allow_missing
        patterns = [given] if isinstance(given, str) else list(given)
        unexpected = [[name for name in names if not matches(name, patterns)] for names in alone]
        phrases = [
            f"{len(names)} of {len(side_names)} parameters of the {side} are not in the other, e.g. {names[0]!r} "
            f"(closest there: {closest(names[0], others, 2)})"
            for names, side_names, others, side in zip(unexpected, (one, other), (other, one), sides, strict=True)
            if names
        ]
        if phrases:
            raise ValueError(
                f"{what}: {'; '.join(phrases)}. Pass two versions of one model, or a pool= that leaves these out; "
                "allow_missing= takes True or regular expressions for names that can be on one side only"
            )
    return {f"only in {side}": len(names) for side, names in zip(sides, alone, strict=True) if names}
