"""Names of tensors, and ties. Only this module matches tensors by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ltp_sparse.weights.reading import closest

T = TypeVar("T")

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Names of the only child of a wrapping module: torch.compile, FSDP, activation checkpointing and offloading, Fabric.

No other module has such a name, so each is removed wherever it occurs between dots.
"""

LEADING = ("module.", "base_model.model.")
"""Prefixes of wrapped models (DDP, peft). They are removed only if all names have them, as a model can use them too."""


def strip_wrappers(name: str) -> str:
    """A single name without the parts that wrapping modules add."""
    return bare_names([name])[name]


def bare_names(names: Iterable[str], deciding: Iterable[str] | None = None) -> dict[str, str]:
    """Name -> the name without the parts that wrapping modules add. The one rule for modules, mappings and files.

    Parts in `WRAPPERS` are removed wherever they occur, prefixes in `LEADING` if all names begin with them, in any
    nesting. So "module.weight" next to "bias" is a child called "module".

    Args:
        names: all names of one model.
        deciding: the weights among them. Only these must share a prefix and stay distinct, because wrapping modules
            name their buffers freely. Default: all.

    Raises:
        ValueError: two names are equal afterwards.
    """
    names = list(names)
    if others := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"expected names of tensors, got the key {others[0]!r}")
    bare = {name: _unwrapped_name(name) for name in names}
    judges = list(bare if deciding is None else deciding) or list(bare)
    while prefix := next((w for w in LEADING if judges and all(bare[n].startswith(w) for n in judges)), None):
        bare = {name: rest.removeprefix(prefix) for name, rest in bare.items()}
    check_distinct((name, bare[name]) for name in judges)
    return bare


def _unwrapped_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_distinct(pairs: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError, with both names, if two of the (name, bare name) pairs have the same bare name."""
    first: dict[str, str] = {}
    for name, bare in pairs:
        if first.setdefault(bare, name) != name:
            raise ValueError(
                f"{first[bare]!r} and {name!r} are both called {bare!r} once the names of wrapping modules are "
                "removed; rename one"
            )


class Named(dict[str, T]):
    """Canonical name -> tensor, in canonical order. Aliases can be looked up as well.

    Args:
        tensors: canonical name -> tensor, in any order.
        aliases: other name -> canonical name, for ties and for names with wrapping modules. Those of absent tensors are
            left out.
        buffers: names of known buffers.
        quantised: names of tensors that do not hold one number per weight.
        tied_by_memory: whether ties were found by shared memory, and not declared.
    """

    def __init__(
        self,
        tensors: Mapping[str, T],
        aliases: Mapping[str, str] | None = None,
        buffers: Iterable[str] = (),
        quantised: Iterable[str] = (),
        tied_by_memory: bool = False,
    ) -> None:
        super().__init__((name, tensors[name]) for name in parameter_order(tensors))
        self.aliases = {other: name for other, name in (aliases or {}).items() if name in self and other not in self}
        self.buffers, self.quantised = frozenset(buffers), frozenset(quantised)
        self.tied_by_memory = tied_by_memory

    def __missing__(self, name: str) -> T:
        if name not in self.aliases:
            raise KeyError(name)
        return self[self.aliases[name]]

    def called(self, name: str) -> str | None:
        """The canonical name for a name or alias; None if it is unknown."""
        return name if name in self else self.aliases.get(name)


@lru_cache(1 << 16)  # names are sorted several times in every call that takes a model
def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """Sorts "layer.2" before "layer.10", and "layer.02" before "layer.2"."""
    parts = tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)
    return parts, name


def parameter_order(names: Iterable[str]) -> list[str]:
    """The canonical order of parameters: natural order of their names.

    Of equal entries a selection takes those of the earliest parameter. So this order must not depend on the order of
    modules in a model class, which differs between versions of transformers, or on the order of tensors in a file.
    """
    return sorted(names, key=natural_key)


@lru_cache(1 << 16)
def tie_key(name: str) -> tuple[Any, ...]:
    """Sort key for the names of one tied tensor: the smallest is the canonical one, in modules and in files.

    That is the name `save_pretrained` stores: inside the base model of an XLM-R, an embedding before a head, a shared
    embedding before that of the encoder or decoder, then the name with the fewest parts, in natural order.
    """
    parts = name.split(".")
    return (
        not in_base_model(name),
        "shared" not in parts,
        re.search("emb|wte", name) is None,
        "decoder" in parts,
        len(parts),
        natural_key(name),
    )


def _wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that a wrapping module wraps; None for any other module."""
    if child := next((name for name in WRAPPERS if isinstance(module._modules.get(name), nn.Module)), None):
        return child
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
        return "module"
    of_peft = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("peft.")}
    wraps = {"PeftModel": "base_model", "BaseTuner": "model", "BaseTunerLayer": "base_layer"}
    return next((child for name, child in wraps.items() if name in of_peft and child in module._modules), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all modules that wrap it: DDP, DataParallel, torch.compile, FSDP, checkpointing, peft."""
    while (child := _wrapped_child(model)) is not None:
        model = model._modules[child]  # type: ignore[assignment]
    return model


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _bare_names_in(model: nn.Module) -> dict[str, str]:
    """Name -> bare name of all parameters and buffers of a module, with all names of tied ones.

    The keys are already without `WRAPPERS`: checkpoint wrappers remove theirs from named_parameters(), but not from
    named_modules().
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wrapping = {_joined(path, child) for path, module in modules.items() if (child := _wrapped_child(module))}
    wrapping = {_unwrapped_name(path) for path in wrapping if path.rpartition(".")[2] not in WRAPPERS}
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    members = [*parameters, *(name for name, _ in model.named_buffers(remove_duplicate=False))]
    check_distinct((name, _unwrapped_name(name)) for name in parameters)
    parameters = list(map(_unwrapped_name, parameters))
    inner = {}
    for name in map(_unwrapped_name, members):
        parts = name.split(".")
        inner[name] = ".".join(p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in wrapping)
    check_distinct((name, inner[name]) for name in parameters)
    bare = bare_names(inner.values(), {inner[name] for name in parameters})
    return {name: bare[rest] for name, rest in inner.items()}


def canonical_group(
    members: Iterable[tuple[str, T]], bare: Mapping[str, str], tied_to: Collection[str] = ()
) -> Named[T]:
    """Each tensor once, under its canonical name, which is in `tied_to` only if there is no other."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, T] = {}
    for name, tensor in members:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    found: dict[str, T] = {}
    aliases: dict[str, str] = {}
    for key, known in names.items():
        canonical = bare[min(known, key=lambda name: (name in tied_to, tie_key(bare[name])))]
        found[canonical] = tensors[key]
        aliases |= {other: canonical for name in known for other in (name, bare[name])}
    return Named(found, aliases)


def canonical_parameters(model: nn.Module) -> Named[nn.Parameter]:
    """Canonical name -> parameter, in canonical order; a tied parameter appears once.

    A tied parameter has the name under which `save_pretrained` stores it ("roberta.embeddings.word_embeddings.weight",
    never "lm_head.decoder.weight"). The ties that transformers declares decide, then `tie_key`, and never the order in
    which a model class registers its modules.

    Raises:
        ValueError: two parameters have the same name without the names of wrapping modules.
    """
    tied_to = {
        _unwrapped_name(_joined(path, name))
        for path, module in model.named_modules(remove_duplicate=False)
        for name in getattr(module, "all_tied_weights_keys", None) or ()
    }
    bare = _bare_names_in(model)
    members = ((_unwrapped_name(name), p) for name, p in model.named_parameters(remove_duplicate=False))
    named = canonical_group(members, bare, tied_to)
    named.buffers = frozenset(bare[_unwrapped_name(name)] for name, _ in model.named_buffers(remove_duplicate=False))
    return named


def canonical_buffers(model: nn.Module) -> Named[Tensor]:
    """Canonical name -> buffer, in canonical order."""
    members = ((_unwrapped_name(name), b) for name, b in model.named_buffers(remove_duplicate=False))
    return canonical_group(members, _bare_names_in(model))


def homes_of(
    model: nn.Module | Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], str, str]]:
    """The places of tensors in a model: (mapping, key in it, name of the tensor). A tied tensor has several."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    modules = model.modules() if isinstance(model, nn.Module) else ()
    places = [held for module in modules for held in (module._parameters, module._buffers)]
    return [
        (held, key, names[id(tensor)])
        for held in ([model] if isinstance(model, Mapping) else places)
        for key, tensor in held.items()
        if id(tensor) in names
    ]


def is_floating(tensor: Any) -> bool:
    """Whether a tensor has floating-point or complex numbers. What is no tensor, e.g. a shape, counts as such."""
    dtype = getattr(tensor, "dtype", None)
    return not isinstance(dtype, torch.dtype) or dtype.is_floating_point or dtype.is_complex


def canonical_tensors(source: nn.Module | Mapping[str, Any]) -> Named[Any]:
    """Canonical name -> tensor of a module's parameters or of a mapping, in canonical order.

    Raises:
        ValueError: two names are equal without the names of wrapping modules.
        TypeError: it is neither.
    """
    if isinstance(source, nn.Module):
        named = canonical_parameters(source)
        return Named({name: parameter.detach() for name, parameter in named.items()}, named.aliases, named.buffers)
    if isinstance(source, Named):
        return source
    if not isinstance(source, Mapping):
        raise TypeError(f"expected a module or a mapping from names to tensors, got {type(source).__name__}")
    bare = bare_names(source, [name for name, tensor in source.items() if is_floating(tensor)])
    return Named({bare[name]: tensor for name, tensor in source.items()}, bare)


def match_names(wanted: Iterable[str], known: Iterable[str], *, what: str, where: str) -> list[str]:
    """Checks that names are known.

    Args:
        wanted: the names of a ticket.
        known: the names of a model, with aliases if it is `Named`.
        what: the caller, for messages.
        where: e.g. "the model", for messages.

    Returns:
        `wanted` as a list.

    Raises:
        ValueError: a name is unknown; the message lists the closest ones.
    """
    wanted = list(wanted)
    known = known if isinstance(known, Named) else Named(dict.fromkeys(known))
    missing = [name for name in wanted if known.called(name) is None]
    if missing:
        share = "no name" if len(missing) == len(wanted) else f"{len(missing)} of {len(wanted)} names"
        found = "is" if share == "no name" else "are not"
        if missing[0] in known.buffers:
            raise ValueError(
                f"{what}: {missing[0]!r} is a buffer in {where} and cannot train; leave buffers out of the ticket "
                "(ticket.restrict, or pool= in the selection)"
            )
        raise ValueError(
            f"{what}: {share} of the ticket {found} in {where}; {missing[0]!r} is missing, "
            f"closest there: {closest(missing[0], known)}. Check that it belongs to this architecture"
        )
    return wanted


def layer_of(name: str) -> str:
    """The layer of a parameter: "embeddings", "layer 0", "layer 1", ..., or "other" (heads)."""
    if match := re.search(r"\b(?:layers?|h|blocks?)\.(\d+)\.", name):
        return f"layer {match[1]}"
    return "embeddings" if "embed" in name else "other"


def module_of(name: str) -> str:
    """The kind of module of a parameter: "embeddings", "attention", "feed-forward", "LayerNorm" or "other"."""
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


def in_base_model(name: str) -> bool:
    """Whether a parameter belongs to the base model of an XLM-R, as opposed to a head on top of it."""
    return name.startswith("roberta.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the regular expressions is found in the name. Raises ValueError for one that is none."""
    try:
        return any(re.search(pattern, name) for pattern in patterns)
    except (re.error, TypeError) as error:
        raise ValueError(f"expected regular expressions for names, got {patterns!r} ({error})") from error
