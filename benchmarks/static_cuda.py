"""What nvcc makes of the CUDA kernels, counted without a GPU: `python benchmarks/static_cuda.py`.

Compiles `csrc/cuda/masked_adamw.cu` for sm_90 and counts registers, spills, shared memory, load widths and, in the
innermost loops that take square roots, the instructions per active entry. These are upper bounds: they count every
branch of the loop, those for master, anchor, rounding and the slow paths of division and root included, of which one
launch takes a few. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from pathlib import Path

import triton

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "static" / "cuda.csv"
FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "-arch=sm_90",
    "-cubin",
]
STORAGE = {"f": "float32", "8BFloat16": "bfloat16", "7Float16": "float16", "S2_": "own"}
KERNELS = {
    "update_kernel": "masked_adamw_",
    "update_coded_kernel": "masked_adamw_ 8-bit",
    "sum_squares_kernel": "masked_sum_squares",
    "pack_kernel": "masked_pack_",
}
BATCH = {"update_kernel": 4, "update_coded_kernel": 2, "sum_squares_kernel": 4, "pack_kernel": 4}  # entries a thread


def variant_of(mangled: str) -> tuple[str, str]:
    """(kernel, "parameter dtype, gradient dtype") of a mangled name."""
    kernel = next(name for name in sorted(KERNELS, key=len, reverse=True) if name in mangled)
    types = re.search(r"kernelI(.*?)EEv", mangled)[1]
    found = re.findall(r"8BFloat16|7Float16|S\d_|(?<![0-9A-Za-z])f|f(?=f|Lb|$)", types.replace("NS_", " "))
    names = ["own" if item.startswith("S") else STORAGE[item] for item in found]
    gradient = "packed" if "Lb1E" in types + "E" else names[-1]
    return kernel, names[0] if kernel == "pack_kernel" else f"{names[0]}, {gradient}"


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of the loops that contain no other."""
    spans = []
    for address, text in code:
        branch = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for address, text in code if first <= address <= last] for first, last in sorted(inner)]


def rows() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        source = ROOT / "csrc" / "cuda" / "masked_adamw.cu"
        subprocess.run(["nvcc", *FLAGS, "-o", str(cubin), str(source)], check=True)
        tool = triton.knobs.nvidia.cuobjdump.path
        sass, usage = (
            subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "--dump-resource-usage")
        )
    resources = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
    found: list[dict[str, object]] = []
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split()[0]
        code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", part)]
        opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code]
        kernel, types = variant_of(name)
        counts = []
        for loop in loops(code):
            if sum("MUFU" in text for text in loop) >= BATCH[kernel]:
                slow = sum(1 for text in loop if "CALL" in text)
                counts.append((len(loop) - slow) / BATCH[kernel])
        registers, shared = (int(re.search(rf"{what}:(\d+)", resources[name])[1]) for what in ("REG", "SHARED"))
        row = {
            "kernel": KERNELS[kernel],
            "types": types,
            "target": "sm_90",
            "registers": registers,
            "shared_bytes": shared,
            "spills": sum(code.startswith(("LDL", "STL")) for code in opcodes),
            "instructions": len(opcodes),
            "loads_128": sum(bool(re.match(r"LDG?\.", c)) and "128" in c for c in opcodes),
            "loads": sum(bool(re.match(r"LDG?\.", c)) for c in opcodes),
            "loop_instructions_per_entry": " ".join(f"{count:.1f}" for count in counts),
        }
        found.append(row)
    return sorted(found, key=lambda row: (str(row["kernel"]), str(row["types"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    table = rows()
    fields = list(dict.fromkeys(key for row in table for key in row))
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"{output}: {len(table)} rows")


if __name__ == "__main__":
    main()
