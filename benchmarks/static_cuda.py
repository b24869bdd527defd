"""What nvcc makes of the CUDA kernels, counted without a GPU: `python benchmarks/static_cuda.py`.

Compiles the sources of `csrc/cuda` for sm_90 and sm_80 and counts registers, spills, shared memory, loads by width, and
instructions per entry:

* updates: in the innermost loops that take square roots, per active entry. Upper bounds: they count every branch of the
  loop, those for master, anchor, rounding and the slow paths of division and root included, of which one launch takes a
  few.
* selection: in the loop over the entries of a tile, along its path of vector loads, per entry.

`issue_floor_ms` is the time of these instructions at 277 million entries on an H200 (132 processors * 128 lanes *
1.755 GHz; for updates at a density of 1), `memory_floor_ms` that of the bytes of a selection pass at 4.3 TB/s, a copy's
bandwidth there. Nothing here was timed.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "static" / "cuda.csv"
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-Xptxas=-v", "-cubin"]
TARGETS = ("sm_90", "sm_80")
STORAGE = {"f": "float32", "8BFloat16": "bfloat16", "7Float16": "float16", "5Zeros": "none", "S2_": "own"}
UPDATES = {
    "update_kernel": "masked_adamw_",
    "update_coded_kernel": "masked_adamw_ 8-bit",
    "sum_squares_kernel": "masked_sum_squares",
    "pack_kernel": "masked_pack_",
}
BATCH = {"update_kernel": 4, "update_coded_kernel": 2, "sum_squares_kernel": 4, "pack_kernel": 4}  # entries a thread
SELECTION = {"histogram_kernel": "delta_histogram", "band_kernel": "delta_band"}
SMALL = {  # of a few hundredths of the entries, or none where no deltas are equal
    "sample_upper_kernel": "sample_upper",
    "sample_lower_kernel": "sample_lower",
    "take_last_kernel": "take_last",
    "candidate_histogram_kernel": "candidate_histogram",
    "take_above_kernel": "take_above",
    "take_ties_kernel": "take_ties",
}
NAMES = {**UPDATES, **SELECTION, **SMALL}
DYNAMIC_SHARED = {"histogram_kernel": 4 * 32_768, "candidate_histogram_kernel": 4 * 2048}  # bytes the launch adds
SHARE = 32  # entries of a thread in a round of the band pass
ENTRIES = 277_414_656
LANES_PER_MS = 132 * 128 * 1.755e6
BYTES_PER_MS = 4.3e9

Code = list[tuple[int, str]]
"""(address, instruction)"""


def variant_of(mangled: str) -> tuple[str, list[str], bool]:
    """(kernel, its storage types, whether gradients are packed) of a mangled name."""
    kernel = next(name for name in sorted(NAMES, key=len, reverse=True) if name in mangled)
    template = re.search(r"kernelI(.*?)EEv", mangled)
    types = template[1] if template else ""
    found = re.findall(
        r"8BFloat16|7Float16|5Zeros|S\d_|(?<![0-9A-Za-z])f|f(?=f|Lb|NS|$)|(?<=E)f", types.replace("NS_", " ")
    )
    return kernel, ["own" if item.startswith("S") else STORAGE[item] for item in found], "Lb1E" in types + "E"


def loops(code: Code) -> list[tuple[int, int]]:
    """(first, last) address of every loop, the innermost ones first."""
    spans = []
    for address, text in code:
        branch = re.search(r"\bBRA\S*\s+(?:\S+,\s*)*0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    return sorted(spans, key=lambda span: span[1] - span[0])


def inside(code: Code, span: tuple[int, int]) -> list[str]:
    return [text for address, text in code if span[0] <= address <= span[1]]


def innermost(code: Code) -> list[list[str]]:
    spans = loops(code)
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [inside(code, span) for span in sorted(inner)]


def vector_loads(texts: list[str]) -> int:
    """Loads of entries: read-only, 8 or 16 bytes."""
    return sum(bool(re.search(r"\bLDG\S*\.(64|128)\.CONSTANT", text)) for text in texts)


def per_entry(kernel: str, types: list[str], code: Code) -> str:
    """Instructions per entry; not counted for the small passes."""
    if kernel in SMALL:
        return ""
    if kernel in UPDATES:
        counts = []
        for loop in innermost(code):
            if sum("MUFU" in text for text in loop) >= BATCH[kernel]:
                slow = sum(1 for text in loop if "CALL" in text)
                counts.append(f"{(len(loop) - slow) / BATCH[kernel]:.1f}")
        return " ".join(counts)
    pair = [types[0] if item == "own" else item for item in types]
    vector = 4 if "float32" in pair else 8
    arrays = 1 if "none" in pair else 2
    spans = loops(code)
    # the smallest loop that loads vectors; in the band pass, the one around it that exchanges words within the warp
    entries = next(span for span in spans if vector_loads(inside(code, span)))
    if kernel == "histogram_kernel":
        return f"{len(inside(code, entries)) / (vector_loads(inside(code, entries)) / arrays * vector):.1f}"
    around = next(span for span in spans if span[0] <= entries[0] and any("SHFL.BFLY" in t for t in inside(code, span)))
    nested = [inside(code, s) for s in spans if around[0] <= s[0] and s[1] <= around[1] and s != around]
    per_load = vector / arrays
    straight = per_load * (vector_loads(inside(code, around)) - sum(map(vector_loads, nested)))  # entries outside loops
    count = len(inside(code, around))
    for loop in nested:
        loads = vector_loads(loop)
        trips = (SHARE - straight) / (loads * per_load) if loads else 0  # without vectors: the ends of tiles
        count += (trips - 1) * len(loop)
    return f"{count / SHARE:.1f}"


def bytes_per_entry(kernel: str, types: list[str]) -> float:
    """Memory traffic of a selection pass."""
    widths = {"float32": 4, "bfloat16": 2, "float16": 2, "none": 0}
    pair = [types[0] if item == "own" else item for item in types]
    return sum(widths[item] for item in pair) + (1 / 8 if kernel == "band_kernel" else 0)


def name_of(kernel: str, types: list[str], packed: bool) -> str:
    if not types:
        return ""
    if kernel in SELECTION or kernel in SMALL:
        first, second = types
        return f"{second} alone" if first == "none" else f"{first}, {first if second == 'own' else second}"
    return types[0] if kernel == "pack_kernel" else f"{types[0]}, {'packed' if packed else types[-1]}"


def compiled(source: Path, target: str, cubin: Path) -> str:
    """Makes a cubin; what ptxas says of registers and spills."""
    command = ["nvcc", *FLAGS, f"-arch={target}", "-o", str(cubin), str(source)]
    return subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr


def kernels(cubin: Path, target: str) -> Iterator[dict[str, object]]:
    tool = triton.knobs.nvidia.cuobjdump.path
    sass, usage = (
        subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "--dump-resource-usage")
    )
    resources = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split()[0]
        code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", part)]
        opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code]
        loads = [opcode for opcode in opcodes if re.match(r"LDG?\.", opcode)]
        kernel, types, packed = variant_of(name)
        registers, shared = (int(re.search(rf"{what}:(\d+)", resources[name])[1]) for what in ("REG", "SHARED"))
        found = per_entry(kernel, types, code)
        floor = max((float(count) * ENTRIES / LANES_PER_MS for count in found.split()), default=None)
        moved = bytes_per_entry(kernel, types) * ENTRIES / BYTES_PER_MS if kernel in SELECTION else None
        yield {
            "kernel": NAMES[kernel],
            "types": name_of(kernel, types, packed),
            "target": target,
            "registers": registers,
            "shared_bytes": shared + DYNAMIC_SHARED.get(kernel, 0),
            "spills": sum(code.startswith(("LDL", "STL")) for code in opcodes),
            "instructions": len(opcodes),
            "loads_128": sum("128" in opcode for opcode in loads),
            "loads_64": sum("64" in opcode for opcode in loads),
            "loads": len(loads),
            "loop_instructions_per_entry": found,
            "issue_floor_ms": "" if floor is None else f"{floor:.2f}",
            "memory_floor_ms": "" if moved is None else f"{moved:.2f}",
        }


def rows() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for target in TARGETS:
                compiled(source, target, cubin)
                found += kernels(cubin, target)
    return sorted(found, key=lambda row: tuple(str(row[key]) for key in ("kernel", "types", "target")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    table = rows()
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"{output}: {len(table)} rows")


if __name__ == "__main__":
    main()
