"""Measures the fastest backend for each operation, and writes the table that `auto` reads.

    python benchmarks/choose_backends.py                  # measures on this CPU
    python benchmarks/choose_backends.py --from FOLDER    # uses measurements of `make gpu`

Only the section of the device is replaced, in `ltp_sparse/backends/backend_choice.json` or in another file (--out).
Nothing is timed before the backends give the same bits.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu.rows import latest, read
from harness import Provider, WrongResult, environment, interleaved

import ltp_sparse as ls
from ltp_sparse import backends
from ltp_sparse.ops import masked_swap_
from ltp_sparse.testing import random_weights, tuned_weights, update_problem, xlmr_shapes
from ltp_sparse.weights.files import check_writable

TABLE = (
    Path(__file__).parents[1] / "ltp_sparse" / "backends" / backends.CHOICES.name
)  # of this checkout, also if the package is installed elsewhere
DENSITIES = (0.0005, 0.01, 0.05, 0.2, 0.5, 0.75, 1.0)
PRECISIONS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {},
    torch.bfloat16: {"stochastic": True},
    torch.float16: {"master": True},
}
SHAPES = xlmr_shapes(layers=1, embeddings=False)  # 7 million entries: a small model, larger than the caches

Choice = tuple[str, str, float, Mapping[str, float | None]]
"""Operation, dtype, density, backend -> milliseconds."""


def update_provider(name: str, dtype: torch.dtype, density: float) -> tuple[Provider, list[torch.Tensor]]:
    """A backend's step, and all tensors that it writes."""
    problem = update_problem(SHAPES, density=density, dtype=dtype, **PRECISIONS[dtype])
    return Provider(name, under(name, problem.step), lambda: None), problem.tensors()


def selection_provider(name: str, dtype: torch.dtype, density: float) -> tuple[Provider, list[torch.Tensor]]:
    """A backend's selection, and its bitmaps."""
    initial = {key: tensor.to(dtype) for key, tensor in random_weights(SHAPES).items()}
    before, after = list(initial.values()), list(tuned_weights(initial).values())
    k = int(density * sum(tensor.numel() for tensor in after))
    select = under(name, lambda: ls.topk_delta(before, after, k))
    sets, _ = select()
    return Provider(name, select, lambda: None), [index_set.bitmap() for index_set in sets]


def copy_provider(name: str, dtype: torch.dtype, density: float) -> tuple[Provider, list[torch.Tensor]]:
    """A backend's swap, as scatter and gather in one, and all tensors that it writes."""
    problem = update_problem(SHAPES, density=density, dtype=dtype)
    slots = torch.zeros(problem.table.k, dtype=dtype)
    swap = under(name, lambda: masked_swap_(problem.params, slots, problem.table))
    return Provider(name, swap, lambda: None), [*problem.params, slots]


def under(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def run_under() -> Any:
        ls.use_backend(name)
        try:
            return run()
        finally:
            ls.use_backend(None)

    return run_under


def measured(densities: Iterable[float], rounds: int) -> list[Choice]:
    """A row per operation, dtype and density, of all backends that serve CPU tensors."""
    names = [name for name in ("compiled", "reference") if ls.available_backends()[name] == "ok"]
    makers = {"masked_adamw_": update_provider, "topk_delta": selection_provider, "masked_copy": copy_provider}
    rows: list[Choice] = []
    for op in backends.OPERATIONS:
        for dtype in PRECISIONS:
            for density in densities:
                made = [makers[op](name, dtype, density) for name in names]
                for provider, _ in made:
                    provider.run()
                for provider, outcome in made[1:]:
                    if not all(map(torch.equal, outcome, made[0][1])):
                        raise WrongResult(f"{op}, {dtype}, {density}: {provider.name} and {names[0]} differ")
                seconds = interleaved([provider for provider, _ in made], rounds)
                ms = {name: 1e3 * min(times) for name, times in seconds.items()}  # other processes only add time
                rows.append(choice(op, str(dtype).removeprefix("torch."), density, ms))
    return rows


def choice(op: str, dtype: str, density: float, ms: dict[str, float]) -> Choice:
    """A row, the fastest backend first."""
    found = {name: float(f"{ms[name]:.4g}") for name in sorted(ms, key=ms.__getitem__)}
    print(
        f"  {op:<15}{dtype:<10}{density:<8g}" + ", ".join(f"{name} {t:g} ms" for name, t in found.items()), flush=True
    )
    return op, dtype, density, found


def taken_from(folder: Path) -> list[Choice]:
    """Rows from the results of `make gpu` for the largest model: replayed steps on random masks, selections."""
    cells: dict[tuple[str, str, float], dict[str, tuple[int, float]]] = {}
    operations = {
        ("step", "uniform", "graph"): ("masked_adamw_", r"MaskedAdamW \((\w+)\)"),
        ("selection", "normal", "eager"): ("topk_delta", r"topk_delta \((\w+)\)"),
    }
    for row in latest(read(folder / "rows.csv")):
        op, pattern = operations.get((row["op"], row["kind"], row["mode"]), ("", "never"))
        if row["p50_ms"] and (found := re.fullmatch(pattern, row["provider"])):
            cell = cells.setdefault((op, row["precision"], float(row["density"])), {})
            cell[found[1]] = max(cell.get(found[1], (0, 0.0)), (int(row["n"]), float(row["p50_ms"])))
    dtypes = [str(dtype).removeprefix("torch.") for dtype in PRECISIONS]
    rows = [
        choice(op, dtype, density, {name: time for name, (_, time) in cell.items()})
        for (op, dtype, density), cell in sorted(cells.items())
        if dtype in dtypes
    ]
    # nothing to measure: no other backend has kernels for copies
    return rows + [("masked_copy", dtype, 1.0, {"triton": None}) for dtype in dtypes]


def write(path: Path, device_type: str, source: str, rows: list[Choice]) -> None:
    """Replaces the section of a kind of device.

    Raises:
        SystemExit: an operation has no row.
    """
    if missing := {*backends.OPERATIONS} - {op for op, *_ in rows}:
        raise SystemExit(f"{path} is unchanged: there are no measurements of {', '.join(sorted(missing))}")
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[device_type] = {"measured": True, "source": source, "rows": rows}
    path.write_text(dumps(sections))
    print(f"wrote {path}")


def dumps(sections: dict[str, dict[str, Any]]) -> str:
    """JSON with one row per line."""
    parts = []
    for device_type, section in sections.items():
        lines = ",\n".join(f"      {json.dumps(row)}" for row in section["rows"])
        heads = "".join(f"    {json.dumps(key)}: {json.dumps(section[key])},\n" for key in ("measured", "source"))
        parts.append(f'  {json.dumps(device_type)}: {{\n{heads}    "rows": [\n{lines}\n    ]\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, help="results of `make gpu`")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    check_writable(args.out)
    if args.folder:
        facts = json.loads((args.folder / "environment.json").read_text())
        source = f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}: make gpu"
        write(args.out, facts["device_type"], source, taken_from(args.folder))
    else:
        where = environment()
        source = f"{where['device']}, {where['versions']}, commit {where['commit']}, {where['time'][:10]}"
        rows = measured(args.densities, args.rounds)
        write(args.out, "cpu", f"{source}: benchmarks/choose_backends.py, best of {args.rounds} rounds", rows)


if __name__ == "__main__":
    main()
