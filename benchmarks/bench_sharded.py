"""What a rank of FSDP2 holds and exchanges, counted, with no timings: `python benchmarks/bench_sharded.py`.

A small decoder trains on processes of this machine, by a ticket, by torch's AdamW, by LoRA (peft) and by QLoRA (peft
and bitsandbytes). A row has the bytes of the rank that holds most:

* weights, gradients, states: held between backward and step. States include the index of a ticket. Weights include the
  scales of quantized ones, which are not parameters, so that FSDP2 does not shard them.
* predicted: the sum of these by `ltp-sparse memory`.
* all_gather: parameters that are gathered in a step, for forward and backward.
* reduce_scatter: gradients that a rank contributes, for other ranks and for itself.
* all_reduce: all other reductions.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from sources import RESULTS
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import ltp_sparse as ls
from ltp_sparse.cli.memory_of_decoders import adapted_layers, sharded_table

OUT = RESULTS / "static" / "sharded.csv"
DENSITIES = (0.01, 0.05, 0.2)
CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=896,
)  # fmt: skip
_COLLECTIVES = {
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.allreduce_": ("all_reduce", 0),
}
"""Operator -> its column, and the position of the argument that is as large as the data of all ranks together."""


class Exchanged(TorchDispatchMode):
    """Counts the bytes of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = ".".join(str(func).split(".")[:2])
        if name.startswith("c10d.") and name not in _COLLECTIVES:
            raise RuntimeError(f"the benchmark does not count {name}")
        if name in _COLLECTIVES:
            column, at = _COLLECTIVES[name]
            tensors = [args[at]] if isinstance(args[at], Tensor) else args[at]
            self.bytes[column] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def decoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(dtype)


def sharded(model: nn.Module, layers: Iterable[nn.Module], mesh: Any) -> nn.Module:
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    return model


def ticket(model: nn.Module, density: float) -> ls.Ticket:
    return ls.Ticket.random({name: p.shape for name, p in ls.canonical_parameters(model).items()}, density=density)


def adamw(mesh: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    model = decoder(dtype)
    sharded(model, model.model.layers, mesh)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def by_ticket(mesh: Any, density: float, compressed: bool) -> tuple[nn.Module, Any]:
    model = decoder(torch.bfloat16)
    active = ticket(model, density)
    sharded(model, model.model.layers, mesh)
    if compressed:
        ls.compress_gradients(model, active)
    return model, ls.MaskedAdamW(model, active, gradients="packed", master=True)


def lora(mesh: Any, quantized: bool) -> tuple[nn.Module, Any]:
    from peft import LoraConfig, get_peft_model

    model = decoder(torch.bfloat16)
    if quantized:
        quantize(model)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    sharded(model, model.base_model.model.model.layers, mesh)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def quantize(model: Any) -> None:
    """Replaces the layers that get adapters by 4-bit ones, stored in the dtype of the other weights, as FSDP2 needs."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"quant_type": "nf4", "quant_storage": torch.bfloat16}
    layers = adapted_layers(model)
    for name, layer in list(model.named_modules()):
        if any(layer is one for one in layers):
            found = Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, **options)
            found.weight = Params4bit(layer.weight.data, requires_grad=False, module=found, **options)
            model.set_submodule(name, found.to("cpu"))  # which quantizes
    model.is_loaded_in_4bit = True  # as transformers does; peft looks for it


Way = Callable[[Any], tuple[nn.Module, Any]]
"""Mesh -> a sharded model and its optimizer."""


def ways() -> dict[str, Way]:
    """Name of a row -> its way to train. The names are those of `ltp-sparse memory`, where it has that way."""
    found: dict[str, Way] = {}
    for density in DENSITIES:
        name = f"ticket {100 * density:.4g} %, packed, float32 states, master"
        found[name] = partial(by_ticket, density=density, compressed=False)
        found[f"{name}, compressed"] = partial(by_ticket, density=density, compressed=True)
    found["AdamW, all float32"] = partial(adamw, dtype=torch.float32)
    found["AdamW, all bfloat16"] = partial(adamw, dtype=torch.bfloat16)
    found["LoRA, rank 16, bfloat16 weights"] = partial(lora, quantized=False)
    found["QLoRA, rank 16, nf4 weights"] = partial(lora, quantized=True)
    return found


def count(way: Way, mesh: Any) -> dict[str, int]:
    """The bytes that this rank holds and exchanges in the second step. Later steps are like it."""
    model, optimizer = way(mesh)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(mesh.get_rank()))
    for _ in range(2):
        with Exchanged() as exchanged:
            model(input_ids=ids, labels=ids).loss.backward()
            gradients = gradient_bytes(model, optimizer)
            optimizer.step()
        optimizer.zero_grad()
    weights = sum(local_bytes(parameter) for parameter in model.parameters()) + scale_bytes(model)
    found = {"weights": weights, "gradients": gradients, "states": state_bytes(optimizer)}
    columns = [column for column, _ in _COLLECTIVES.values()]
    return found | {column: exchanged.bytes[column] for column in columns}


def local_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this rank, including the padding that FSDP2 allocates on the last ranks."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.untyped_storage().nbytes()


def scale_bytes(model: nn.Module) -> int:
    """Bytes of scales and tables that bitsandbytes keeps beside quantized weights."""
    quantized = [state for module in model.modules() if (state := getattr(module, "quant_state", None)) is not None]
    tensors = [t for state in quantized for t in state.as_dict().values() if isinstance(t, Tensor)]
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}  # layers share tables
    return sum(places.values())


def gradient_bytes(model: nn.Module, optimizer: Any) -> int:
    if isinstance(optimizer, ls.MaskedAdamW):
        return sum(launch.packed.buffer.nbytes for launch in optimizer._launches if launch.packed is not None)
    places = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            storage = parameter.grad.to_local().untyped_storage()  # a group of FSDP2 shares one
            places[storage.data_ptr()] = storage.nbytes()
    return sum(places.values())


def state_bytes(optimizer: Any) -> int:
    if isinstance(optimizer, ls.MaskedAdamW):
        return optimizer.state_bytes()
    tensors = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def run_rank(rank: int, ranks: int, names: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    mesh = init_device_mesh("cpu", (ranks,))
    found = {name: count(ways()[name], mesh) for name in names}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def predictions(ranks: int) -> dict[str, int]:
    table = sharded_table(
        CONFIG, densities=DENSITIES, ranks=ranks, states=("float32",), gradients="packed", master=True, dtype="bfloat16"
    )
    return {name: report.held for name, report in table.items()}


def rows(ranks: int, names: Iterable[str] | None = None) -> list[dict[str, object]]:
    """The rows for this number of ranks, of all ways to train or of the named ones."""
    names = list(ways() if names is None else names)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(ranks, names, Path(folder)), nprocs=ranks)
        counted = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    predicted, found = predictions(ranks), []
    for name in names:
        most = max((of_rank[name] for of_rank in counted), key=held)
        rest = {column: most[column] for column in most if column not in ("weights", "gradients", "states")}
        known = predicted[name.removesuffix(", compressed")]
        parts = {column: most[column] for column in ("weights", "gradients", "states")}
        found.append({"way": name, "ranks": ranks, **parts, "held": held(most), "predicted": known, **rest})
    return found


def held(row: Any) -> int:
    return row["weights"] + row["gradients"] + row["states"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes (default: 2 4)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    options = parser.parse_args()
    table = [row for ranks in options.ranks for row in rows(ranks)]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
