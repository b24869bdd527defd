"""Runs all CPU benchmarks, each in a separate process, and writes tables and plots: `make bench`.

Options go to the benchmarks of the operations, e.g. `make bench ARGS="--models encoder --rounds 7"`; see `bench_*.py
--help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import report
from harness import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS / "cpu", help="where CSV files, tables and plots go")
    args, options = parser.parse_known_args()
    for benchmark in sorted(Path(__file__).parent.glob("bench_*.py")):
        if benchmark.stem == "bench_sharded":  # counts only
            continue
        out = args.folder / f"{benchmark.stem.removeprefix('bench_')}.csv"
        of_operation = options if benchmark.stem != "bench_train_step" else []
        subprocess.run([sys.executable, benchmark, "--out", out, *of_operation], check=True)
    print(report.write(args.folder))


if __name__ == "__main__":
    main()
