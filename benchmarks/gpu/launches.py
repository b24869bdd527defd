"""Records the launches of one selection and one step: kernels, gaps between them, and waits of the host.

With --watched, each runs once with the profiler on, for Nsight Compute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import device as devices
import rows
import selection
import step
import updates
from sources import code

import ltp_sparse as ls


def scenes(model: str, device: devices.Device) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Name -> function that prepares it and returns what to run."""

    @lru_cache(maxsize=1)
    def made(op: Any, *cell: Any) -> Any:
        return op.Problem(op.Cell(model, *cell), device)

    def stepping(density: float, precision: str, **options: Any) -> Callable[[], Callable[[], Any]]:
        return lambda: made(step, density, precision).optimizer(**options).step

    def packed() -> Callable[[], Any]:
        problem = made(step, 0.2, "float32")

        def optimizer_of(module: Any) -> ls.MaskedAdamW:
            return ls.MaskedAdamW(module, problem.ticket, **updates.OPTIONS, gradients="packed")

        return updates.compacted(problem, "packed", optimizer_of).run

    def selecting(make: Callable[..., Any], precision: str) -> Callable[[], Callable[[], Any]]:
        return lambda: make(made(selection, 0.2, precision), ls.backends.chosen()).run

    return {
        "step, float32, 20 %": stepping(0.2, "float32"),
        "step, float32, 20 %, clipped": stepping(0.2, "float32", max_grad_norm=1.0),
        "step, float32, 20 %, packed gradients": packed,
        "topk_delta, float32, 20 %": selecting(selection.topk_delta, "float32"),
        "select, float32, 20 %": selecting(selection.select, "float32"),
        "topk_delta, bfloat16, 20 %": selecting(selection.topk_delta, "bfloat16"),
        "step, bfloat16, 20 %": stepping(0.2, "bfloat16"),
        "step, bfloat16, 8-bit states, 20 %": stepping(0.2, "bfloat16-8bit"),
        "step, float32, 1 %": stepping(0.01, "float32"),
        "step, float32, all entries": stepping(1.0, "float32"),
    }


def record(path: Path, scene: str, launches: list[devices.Launch]) -> None:
    """Writes a row for each launch, and prints their number, span and busy share."""
    end = busy = 0.0
    for number, launch in enumerate(launches):
        row = {"scene": scene, "backend": ls.backends.chosen(), "code": code(), "number": number, "name": launch.name}
        gap = max(0.0, launch.start - end) if end and not launch.wait else None
        row |= {"wait": launch.wait, "start_us": launch.start - launches[0].start, "us": launch.us, "gap_us": gap}
        rows.append(path, rows.LAUNCHES, row)
        if not launch.wait:
            end, busy = max(end, launch.start + launch.us), busy + launch.us
    waits = sum(launch.wait for launch in launches)
    span = end - launches[0].start if launches else 0.0
    print(
        f"  {scene:<40}{len(launches) - waits:>5} launches{waits:>4} waits{span:>10.1f} us, "
        f"{busy / span if span else 0:.0%} of it busy", flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("compiled", "triton"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="base")
    parser.add_argument("--watched", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    device = devices.named(args.device)
    ls.use_backend(args.backend)
    failed = 0
    for scene, ready in scenes(args.model, device).items():
        try:
            run = ready()
            for _ in range(2):
                run()
            if args.watched:
                device.watched(scene, run)
            else:
                record(args.folder / rows.LAUNCHES_CSV, scene, device.launches(run))
        except Exception as error:
            print(f"  {scene}: {type(error).__name__}: {error}", flush=True)
            device.synchronize()
            failed += 1
    sys.exit(f"{failed} scenes failed" if failed else 0)


if __name__ == "__main__":
    main()
