"""What a version of the weights costs: bytes and time of publishing a step to a store and of following it.

All providers see the same training in one process: MaskedAdamW on bfloat16 weights with masters, on a ticket and on
all weights. Gradients are the same in every step, so that every master moves by the whole learning rate: the largest
steps that AdamW takes, and the most weights that change. Every round publishes and follows one step with each provider,
and compares the followed weights bit for bit. Peers write safetensors, without digests: changed entries as int32
indices and values, as the weight synchronisation of RL trainers does, and the whole model. Files lie in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from harness import MODELS, Row, WrongResult, argument_parser, parse, write_csv
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse.testing import random_weights

DIFF = "changed entries, int32 + values"
WARMUP = 2  # steps, the first of which publish anchors
MEMORY = Path("/dev/shm")

Weights = Mapping[str, Tensor]


class Sync:
    """Ours."""

    def __init__(self, folder: Path, model: Weights, served: Weights, ticket: ls.Ticket | None) -> None:
        self.publisher = ls.sync.Publisher(model, ticket, folder, anchor_every=1000)
        self.follower = ls.sync.Follower(served, folder)

    def publish(self) -> int:
        return self.publisher.publish().nbytes

    def follow(self) -> None:
        self.follower.follow()


class Diff:
    """Every entry compared with a copy of the last version."""

    def __init__(self, folder: Path, model: Weights, served: Weights) -> None:
        self.path, self.model, self.served = folder / "diff.safetensors", model, served
        self.last = {name: tensor.detach().clone() for name, tensor in model.items()}

    def publish(self) -> int:
        tensors = {}
        for name, tensor in self.model.items():
            now, last = tensor.detach().view(-1), self.last[name].view(-1)
            indices = (now.view(torch.int16) != last.view(torch.int16)).nonzero().view(-1)
            tensors |= {f"{name}.indices": indices.int(), f"{name}.values": now[indices]}
            last[indices] = tensors[f"{name}.values"]
        save_file(tensors, self.path)
        return self.path.stat().st_size

    def follow(self) -> None:
        tensors = load_file(self.path)
        for name, tensor in self.served.items():
            tensor.view(-1)[tensors[f"{name}.indices"].long()] = tensors[f"{name}.values"]


class Whole:
    """The model, every time."""

    def __init__(self, folder: Path, model: Weights, served: Weights) -> None:
        self.path, self.model, self.served = folder / "whole.safetensors", model, served

    def publish(self) -> int:
        save_file({name: tensor.detach() for name, tensor in self.model.items()}, self.path)
        return self.path.stat().st_size

    def follow(self) -> None:
        for name, tensor in load_file(self.path).items():
            self.served[name].copy_(tensor)


def measure(model_name: str, density: float, lr: float, rounds: int) -> list[Row]:
    """The rows of one training; density 1: of all weights, published without a ticket."""
    start = {name: tensor.bfloat16() for name, tensor in random_weights(MODELS[model_name]).items()}
    model = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    static = density < 1
    ticket = ls.Ticket.random(model, density=density, seed=1) if static else ls.Ticket.full(model)
    optimizer = ls.MaskedAdamW(model, ticket, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.values():
        parameter.grad = torch.empty_like(parameter).normal_(generator=generator)
    makers: dict[str, Callable[[Path, Weights, Weights], Sync | Diff | Whole]] = {
        f"ls.sync, {'a ticket' if static else 'without a ticket'}": lambda *a: Sync(*a, ticket if static else None),
        DIFF: Diff,
        "the whole model": Whole,
    }
    sizes: dict[str, list[float]] = {name: [] for name in makers}
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {name: [] for name in makers} for phase in ("publish", "follow")
    }
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        served = {name: {n: tensor.clone() for n, tensor in start.items()} for name in makers}
        providers = {name: make(Path(folder), model, served[name]) for name, make in makers.items()}
        for number in range(WARMUP + rounds):
            optimizer.step()
            for name in np.roll(list(providers), number):
                begin = time.perf_counter()
                nbytes = providers[name].publish()
                between = time.perf_counter()
                providers[name].follow()
                end = time.perf_counter()
                if not all(torch.equal(served[name][n], tensor) for n, tensor in model.items()):
                    raise WrongResult(name)
                if number >= WARMUP:
                    sizes[name].append(nbytes)
                    seconds["publish"][name].append(between - begin)
                    seconds["follow"][name].append(end - between)
    rows = [_row(lr, "size", "MB", name, sizes, 1e6, ticket) for name in makers]
    for phase, found in seconds.items():
        rows += [_row(lr, phase, "ms", name, found, 1e-3, ticket) for name in makers]
    return rows


def _row(
    lr: float, metric: str, unit: str, name: str, found: Mapping[str, list[float]], per: float, ticket: ls.Ticket
) -> Row:
    p20, p50, p80 = (float(value) / per for value in np.percentile(found[name], [20, 50, 80]))
    ratio = float(np.median(found[DIFF])) / per / p50
    print(f"  {ticket.density:<6.0%}{metric:<10}{name:<50}{p50:>12.3f} {unit}   {ratio:>7.2f} x", flush=True)
    return Row(
        f"sync of a step, lr {lr:g}", name, "bfloat16", ticket.n, ticket.k, metric, unit, p50, p20, p80, ratio=ratio
    )


def main() -> None:
    parser = argument_parser(__doc__, "sync.csv", [0.01, 0.05, 1.0], ["bfloat16"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-6, 1e-5], help="learning rates")
    parser.set_defaults(models=["decoder"], rounds=5)
    args = parse(parser)
    for model in args.models:
        for lr in args.lrs:
            for density in args.densities:
                write_csv(args.out, measure(model, density, lr, args.rounds))


if __name__ == "__main__":
    main()
