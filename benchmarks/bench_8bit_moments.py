"""Do 8-bit moments follow float32's? Runs of 10,000 steps in which gradients shrink, stop, grow, or differ in a block.

Every pattern of gradients is a parameter, and all optimizers see the same gradients in one process: torch.optim.AdamW,
`MaskedAdamW` with float32 and with 8-bit states, and torchao's AdamW8bit if installed. The rows are the mean of sqrt(v)
and the movement of the weights in the last 200 steps, both relative to torch.optim.AdamW. Nothing is timed.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import RESULTS, Row, value_row, write_csv
from torch import Tensor, nn

import ltp_sparse as ls
from ltp_sparse.backends.quantization import dequantize_tiles
from ltp_sparse.tickets.tile_table import STATE_BLOCK

ENTRIES = 4096  # torchao keeps smaller parameters in float32
TAIL = 200
OPTIONS = {"lr": 1e-3, "weight_decay": 0.0}
EXACT = "torch AdamW"


def beside(large: int) -> Tensor:
    """Mask of the entries that stay large: this many in every block."""
    return torch.arange(ENTRIES) % STATE_BLOCK < large


def shrunk(step: int) -> float:
    return 1.0 if step < 100 else 0.01


PATTERNS: dict[str, tuple[Callable[[int], float], int]] = {
    "constant": (lambda step: 1.0, 0),
    "100 times smaller after 100 steps": (shrunk, 0),
    "shrinking to a 100th over 9,000 steps": (lambda step: max(0.01, 1 - step / 9000), 0),
    "stopped after 1,000 steps": (lambda step: float(step < 1000), 0),
    "100 times larger after 1,000 steps": (lambda step: 0.01 if step < 1000 else 1.0, 0),
    "up and down every 500 steps": (lambda step: 1.0 if step // 500 % 2 else 0.03, 0),
    "100 times smaller beside one that stays": (shrunk, 1),
    "100 times smaller beside 128 that stay": (shrunk, 128),
    "always 1,000 times smaller than one": (lambda step: 1e-3, 1),
}
"""Name -> (size of the gradients at a step, number of entries in a block that keep the size 1)."""


def ours(states: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        named = {str(i): param for i, param in enumerate(params)}
        return ls.MaskedAdamW(named, ls.Ticket.full(named), states=states, **OPTIONS)

    return make


def torchao(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **OPTIONS)


PROVIDERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    EXACT: lambda params: torch.optim.AdamW(params, **OPTIONS),
    "MaskedAdamW": ours("float32"),
    "MaskedAdamW, 8-bit states": ours("8bit"),
    "torchao AdamW8bit": torchao,
}


def mean_root(state: dict[str, Tensor], counted: Tensor) -> float:
    second = state["exp_avg_sq"]
    if "scales" in state:
        second = dequantize_tiles(state["exp_avg"], second, state["scales"], [ENTRIES])[1]
    elif hasattr(second, "dequantize"):
        second = second.dequantize()
    return float(second[counted].sqrt().double().mean())


def measure(steps: int) -> list[Row]:
    names = [name for name in PROVIDERS if name != "torchao AdamW8bit" or find_spec("torchao")]
    params = {name: [nn.Parameter(torch.ones(ENTRIES)) for _ in PATTERNS] for name in names}
    optimizers = {name: PROVIDERS[name](params[name]) for name in names}
    masks = [beside(large) for _, large in PATTERNS.values()]
    generator = torch.Generator().manual_seed(0)
    before: dict[str, list[Tensor]] = {}
    for step in range(steps):
        if step == steps - TAIL:
            before = {name: [param.detach().clone() for param in own] for name, own in params.items()}
        noise = torch.randn(ENTRIES, generator=generator)
        grads = [torch.where(mask, noise, size(step) * noise)
                 for mask, (size, _) in zip(masks, PATTERNS.values(), strict=True)]  # fmt: skip
        for name in names:
            for param, grad in zip(params[name], grads, strict=True):
                param.grad = grad
            optimizers[name].step()
    rows = []
    for i, (pattern, mask) in enumerate(zip(PATTERNS, masks, strict=True)):
        print(pattern)
        found = {}
        for name in names:
            param = params[name][i]
            moved = (param.detach() - before[name][i])[~mask].abs().double().mean()
            found[name] = mean_root(optimizers[name].state[param], ~mask), float(moved)
        for name in names:
            for metric, value, exact in zip(("sqrt(v)", "movement"), found[name], found[EXACT], strict=True):
                ratio = 1.0 if value == exact else value / exact if exact else float("inf")
                op = f"8-bit moments: {pattern}"
                rows.append(value_row(op, name, ENTRIES, ENTRIES, metric, f"of {EXACT}'s", ratio))
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "8bit_moments.csv", help="CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_csv(args.out, measure(args.steps))


if __name__ == "__main__":
    main()
