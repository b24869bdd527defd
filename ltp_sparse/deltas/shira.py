"""SHiRA adapters of PEFT (sparse high-rank adapters): reads them into a `SparseDelta` and writes them.

For each linear layer, `adapter_model.safetensors` has "base_model.model.LAYER.shira_indices", int32 [2, k] rows and
columns, and "...shira_weight", float32 [k] differences, which PEFT adds to the weight. In every layer
k = r * (rows + columns), with r from `adapter_config.json`. A head in `modules_to_save` is stored whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ltp_sparse.deltas.delta import SparseDelta, base_fingerprint
from ltp_sparse.deltas.entries import gather
from ltp_sparse.tickets.index_set import IndexSet
from ltp_sparse.tickets.ticket import Ticket
from ltp_sparse.weights.checkpoints import open_checkpoint, read_piece
from ltp_sparse.weights.files import atomic_folder
from ltp_sparse.weights.names import canonical_parameters, match_names
from ltp_sparse.weights.reading import FileFormatError, Place, read_json, reader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_INDICES, _DIFFERENCES = ".shira_indices", ".shira_weight"


@reader("SHiRA")
def read_shira(folder: str | os.PathLike[str], model: nn.Module) -> SparseDelta:
    """Reads a SHiRA adapter.

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves it.
        model: the base model at its initial weights, not wrapped by PEFT and without deltas. The adapter has
            differences only; values and originals of the delta are computed from these weights.

    Returns:
        The delta, whose values have the bits of PEFT's merged weights. Whole tensors of the adapter become its `dense`.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the adapter is damaged, of another kind, or made for another model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "the configuration of a SHiRA adapter", ["peft_type"])
    if config["peft_type"] != "SHIRA":
        raise FileFormatError(folder / CONFIG, f"expected an adapter of the type SHIRA, got {config['peft_type']!r}")
    path = folder / WEIGHTS
    stored = {name: read_piece(t, 0, t.numel()).view(t.shape) for name, t in open_checkpoint(path).items()}
    sparse = {name for name in stored if name.endswith((_INDICES, _DIFFERENCES))}
    layers = sorted({name.removesuffix(_INDICES).removesuffix(_DIFFERENCES) for name in sparse})
    parameters = canonical_parameters(model)
    names = {layer: f"{layer.removeprefix(_PREFIX)}.weight" for layer in layers}
    dense = {name.removeprefix(_PREFIX): tensor.clone() for name, tensor in stored.items() if name not in sparse}
    try:
        match_names([*names.values(), *dense], parameters, what="read_shira", where="the model")
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    for name, tensor in dense.items():
        if tensor.shape != parameters[name].shape:
            found = f"{list(tensor.shape)}, in the model {list(parameters[name].shape)}"
            raise FileFormatError(path, f"has shape {found}", repr(name))
    sets, originals, values = {}, {}, {}
    for layer, alias in names.items():
        name = parameters.called(alias) or alias
        shape = parameters[name].shape
        indices, differences = _entries(stored, layer, shape, Place(path, repr(alias)))
        sets[name] = IndexSet.from_indices(indices, shape.numel()).compact()
        originals[name] = gather(parameters[name], sets[name]).cpu()
        values[name] = (originals[name].float() + differences).to(originals[name].dtype)
    shapes = {name: parameters[name].shape for name in sets}
    facts = {"method": "shira", "source": folder.name}
    return SparseDelta(Ticket(sets, shapes, facts, base_fingerprint(model, sets)), values, originals, dense, facts)


def _entries(stored: Mapping[str, Tensor], layer: str, shape: torch.Size, place: Place) -> tuple[Tensor, Tensor]:
    """(flat indices, ascending; their float32 differences). Like PEFT, adds up the differences of repeated indices."""
    indices, differences = stored.get(layer + _INDICES), stored.get(layer + _DIFFERENCES)
    if indices is None or differences is None:
        raise place.error("expected its shira_indices and shira_weight, but one is missing")
    k = differences.numel()
    if indices.dtype not in (torch.int32, torch.int64, torch.float32) or not differences.is_floating_point():
        raise place.error(f"expected int32 indices and float differences, got {indices.dtype}, {differences.dtype}")
    if len(shape) != 2 or indices.shape != (2, k) or differences.dim() != 1:
        found = f"{list(indices.shape)} indices and {list(differences.shape)} differences"
        raise place.error(f"expected [2, k] indices and [k] differences of a matrix, got {found} of {list(shape)}")
    rows, columns = indices.to(torch.int64)
    if k and not (0 <= rows.min() and rows.max() < shape[0] and 0 <= columns.min() and columns.max() < shape[1]):
        raise place.error(f"an index is outside {list(shape)}; the adapter is of another model, or damaged")
    flat, places = (rows * shape[1] + columns).unique(return_inverse=True)
    return flat, torch.zeros(len(flat), dtype=torch.float32, device="cpu").index_add_(0, places, differences.float())


def write_shira(delta: SparseDelta, folder: str | os.PathLike[str], *, base: str | None = None) -> int:
    """Writes a delta as a SHiRA adapter, which `peft.PeftModel.from_pretrained` loads.

    PEFT has one r for all layers. Layers with fewer active entries repeat their last entry with a difference of 0.

    Args:
        delta: a delta with originals and with entries in the weights of linear layers only.
        folder: the folder to write, new or empty.
        base: Hub name or folder of the base model, for the configuration.

    Returns:
        The number of entries for which no float32 difference gives the tuned bits when PEFT adds it. These differ in
        their last bits.

    Raises:
        ValueError: the delta has no originals, or has what a SHiRA adapter cannot hold: whole tensors, entries outside
            of matrices, or too many entries for PEFT.
        OSError: `folder` is not empty, or cannot be written.
    """
    names = delta.ticket.active_names
    shapes = {name: delta.ticket.shapes[name] for name in names}
    if not names or set(names) - set(delta.originals):
        raise ValueError("write_shira: expected a delta with active entries and their originals")
    if foreign := [*delta.dense, *(n for n in names if len(shapes[n]) != 2 or not n.endswith(".weight"))]:
        raise ValueError(
            f"write_shira: SHiRA adapters hold entries of the weights of linear layers only, not of {foreign[0]!r}; "
            "select in a pool of these, or save the delta itself"
        )
    rank = max(-(-delta.ticket.sets[name].k // sum(shapes[name])) for name in names)
    if full := [name for name in names if rank * sum(shapes[name]) > shapes[name].numel()]:
        most = max(names, key=lambda name: delta.ticket.sets[name].k / sum(shapes[name]))
        raise ValueError(
            f"write_shira: {most!r} needs r = {rank}, for which {full[0]!r} of shape {list(shapes[full[0]])} is too "
            "small in PEFT; select at a lower density, or leave one of them out of the pool"
        )
    tensors, inexact = {}, 0
    for name in names:
        differences, missed = _differences(delta.values[name], delta.originals[name])
        inexact += missed
        layer, rest = _PREFIX + name.removesuffix(".weight"), rank * sum(shapes[name]) - len(differences)
        flat = delta.ticket.indices(name)
        indices = torch.stack([flat // shapes[name][1], flat % shapes[name][1]]).to(torch.int32)
        tensors[layer + _INDICES] = torch.cat([indices, indices[:, -1:].expand(2, rest)], dim=1)
        tensors[layer + _DIFFERENCES] = nn.functional.pad(differences, (0, rest)).contiguous()
    config = {
        "peft_type": "SHIRA",
        "base_model_name_or_path": base,
        "r": rank,
        "mask_type": "random",
        "random_seed": 0,
        "target_modules": [name.removesuffix(".weight") for name in names],
        "inference_mode": True,
    }
    from safetensors.torch import save_file

    with atomic_folder(folder) as place:
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return inexact


def _differences(values: Tensor, originals: Tensor) -> tuple[Tensor, int]:
    """(float32 [k] differences to add to the originals, number of entries where the sum is not the value)."""
    wanted, start = values.float(), originals.float()
    found = wanted - start
    for towards in (-torch.inf, torch.inf):  # the rounded difference may miss by one place
        wrong = (start + found).to(values.dtype) != values
        nudged = torch.nextafter(found, torch.full_like(found, towards))
        better = wrong & ((start + nudged).to(values.dtype) == values)
        found = torch.where(better, nudged, found)
    return found, int(((start + found).to(values.dtype) != values).sum())
