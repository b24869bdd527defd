"""What nvcc makes of the CUDA kernels, counted without a GPU: `python benchmarks/static_cuda.py`.

Compiles the sources of `csrc/cuda` for sm_90 and sm_80 and counts registers, spills, shared memory, loads by width,
accesses of which the compiler does not know that they go to global memory, and instructions per entry:

* updates: along the path of a batch of entries, without the slow ones of division and root, per active entry, where
  entries come from a list and where they are read as vectors (tiles that are active as a whole). To the first come the
  instructions that list the entries: of a bitmap `LISTING` says. `in_flight` are the loads of a batch that are on the
  way when the first of them is waited for, out of all.
* selection: in the loop over the entries of a tile, along its path of vector loads, per entry.

`issue_floor_ms` is the time of these instructions at 277 million entries on an H200 (132 processors * 128 lanes *
1.755 GHz), `memory_floor_ms` that of the bytes at 4.3 TB/s, a copy's bandwidth there. Updates have two numbers each: a
fifth of the entries active, in bitmaps, and all. Nothing here was timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


WORK = {"update_kernel": "MUFU", "update_coded_kernel": "MUFU", "sum_squares_kernel": "F2F.F64", "pack_kernel": "STG"}
"""What the loops over batches do, and no other."""
SELECTION = {"histogram_kernel": "delta_histogram", "band_kernel": "delta_band"}
SMALL = {  # of parameters, of a few hundredths of the entries, or none where no deltas are equal
    "prepare_kernel": "prepare_step",
    "sample_upper_kernel": "sample_upper",
    "sample_lower_kernel": "sample_lower",
    "take_last_kernel": "take_last",
    "candidate_histogram_kernel": "candidate_histogram",
    "take_above_kernel": "take_above",
    "take_ties_kernel": "take_ties",
}
NAMES = {**UPDATES, **SELECTION, **SMALL}
OPTIONS = ("master", "anchor", "stochastic")
DYNAMIC_SHARED = {"histogram_kernel": 4 * 32_768, "candidate_histogram_kernel": 4 * 2048}  # bytes the launch adds
SHARE = 32  # entries of a thread in a round of the band pass
ENTRIES = 277_414_656
LANES_PER_MS = 132 * 128 * 1.755e6
BYTES_PER_MS = 4.3e9

Code = list[tuple[int, str]]
"""(address, instruction)"""


class Variant(NamedTuple):
    """What a kernel was compiled for; see `Variant` of csrc/cuda. Selection has types alone."""

    kernel: str
    types: list[str]
    flags: list[bool]

    @property
    def name(self) -> str:
        if self.kernel in SELECTION or self.kernel in SMALL:
            if not self.types:
                return ""
            first, second = self.types
            return f"{second} alone" if first == "none" else f"{first}, {first if second == 'own' else second}"
        if self.kernel == "pack_kernel":
            return self.types[0] + ", added" * self.flags[0]
        param, grad = self.types
        packed, *options = self.flags
        names = [param, "packed" if packed else param if grad == "own" else grad]
        return ", ".join(names + [name for name, on in zip(OPTIONS, options, strict=True) if on])


def batch_of(variant: Variant) -> dict[str, int]:
    """Entries of a thread that are on the way together, from lists and in vectors."""
    if variant.kernel == "update_coded_kernel":
        return {"list": 8, "full": 8}
    more = variant.kernel == "pack_kernel" or (variant.kernel == "sum_squares_kernel" and not variant.flags[2])
    return {"list": 4, "full": 8 if more else 4}


def variant_of(mangled: str) -> Variant:
    kernel = next(name for name in sorted(NAMES, key=len, reverse=True) if name in mangled)
    template = re.search(r"kernelI(.*?)EEv", mangled)
    types = template[1] if template else ""
    found = re.findall(
        r"8BFloat16|7Float16|5Zeros|S\d_|(?<![0-9A-Za-z])f|(?<=VariantI)f|f(?=f|Lb|NS|$)|(?<=E)f",
        types.replace("NS_", " ").replace("7Variant", " Variant"),
    )
    named = ["own" if item.startswith("S") else STORAGE[item] for item in found]
    return Variant(kernel, named, [bit == "1" for bit in re.findall(r"Lb([01])E", types + "E")])


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


def opcode_of(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def is_global(text: str) -> bool:
    return bool(re.search(r"\b(LDG|STG)\.", text))


def is_wide(text: str) -> bool:
    return bool(re.search(r"\b(LDG|STG)\S*\.(64|128)", text))


def of_entries(text: str) -> bool:
    """Whether it reads or writes entries, or where they are."""
    return is_global(text) or "LDS" in text


def path_of(code: Code, span: tuple[int, int], vectors: bool) -> list[str]:
    """The instructions of one turn of a loop over batches: without slow paths, and the way of vectors, or of lists.

    A branch over a call leads past a slow path. Where a branch chooses between accesses, those of vectors are fewer.
    """
    at, last = span
    texts = dict(code)
    step = code[1][0] - code[0][0]
    found = []
    while at <= last:
        text = texts[at]
        found.append(text)
        at += step
        branch = re.search(r"\bBRA\S*\s+(?:\S+,\s*)*0x([0-9a-f]+)", text)
        if not branch or not at <= (target := int(branch[1], 16)) <= last:
            continue
        skipped = [(address, t) for address, t in code if at <= address < target]
        if (
            not text.startswith("@")
            or any("CALL" in t for _, t in skipped)
            and not any(is_global(t) for _, t in skipped)
        ):
            at = target
            continue
        accesses = sum(of_entries(t) for _, t in skipped)
        end = re.match(r"BRA\S*\s+0x([0-9a-f]+)", skipped[-1][1]) if skipped else None
        if end and target < int(end[1], 16) <= last:  # one way or the other
            others = sum(of_entries(t) for address, t in code if target <= address < int(end[1], 16))
            if (accesses or others) and (accesses < others) != vectors:
                at = target
        elif vectors and accesses and not any(is_wide(t) for _, t in skipped):  # nothing is left where vectors are
            at = target
    return found


def registers_of(text: str) -> tuple[set[int], set[int]]:
    """(written, read) registers of an instruction, good enough for loads and what waits for them."""
    opcode, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    named = [[int(n) for n in re.findall(r"(?<!U)\bR(\d+)", part)] for part in operands.split(",")]
    if "LDG" in opcode:
        width = 4 if "128" in opcode else 2 if ".64" in opcode else 1
        return {named[0][0] + i for i in range(width)}, set()
    return set(), {n for part in named for n in part}


def in_flight(path: list[str]) -> tuple[int, int]:
    """(loads on the way when the first of them is waited for, all loads) of a path, those of a thread of a batch."""
    pending: set[int] = set()
    loads, first = 0, None
    for text in path:
        written, read = registers_of(text)
        if first is None and pending & read:
            first = loads
        loads += bool(written)
        pending |= written
    return loads if first is None else first, loads


def batches(variant: Variant, code: Code) -> dict[str, list[str]]:
    """The paths of a batch, by "list" and "full"."""
    work = WORK[variant.kernel]
    spans = [span for span in loops(code) if any(work in t for t in inside(code, span))]
    spans = [s for s in spans if sum(map(is_global, inside(code, s))) > 1]  # not those over sums
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    if len(inner) == 1:
        return {"list": path_of(code, inner[0], False), "full": path_of(code, inner[0], True)}
    wide = [any(re.search(r"LDG\S*\.(64|128)", t) for t in inside(code, span)) for span in inner]
    return {kind: path_of(code, inner[wide.index(kind == "full")], False) for kind in ("list", "full")}


def per_entry(variant: Variant, code: Code) -> str:
    """Instructions per entry of a selection; not counted for the small passes."""
    kernel, types, _ = variant
    if kernel in SMALL:
        return ""
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


WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "none": 0}


def bytes_per_entry(variant: Variant) -> float:
    """Memory traffic of a selection pass."""
    pair = [variant.types[0] if item == "own" else item for item in variant.types]
    return sum(WIDTHS[item] for item in pair) + (1 / 8 if variant.kernel == "band_kernel" else 0)


def bytes_per_parameter(variant: Variant, density: float) -> float:
    """Memory traffic of an update at random active entries, in sectors of 32 bytes: the floor of its time."""

    def touched(width: int) -> float:
        return width * (1 - (1 - density) ** (32 // width))

    index = 0 if density == 1 else 1 / 8 + 1 / 32
    if variant.kernel == "pack_kernel":
        return touched(WIDTHS[variant.types[0]]) + (8 if variant.flags[0] else 4) * density + index
    param, grad = (variant.types[0] if item == "own" else item for item in variant.types)
    packed, master, anchor, _ = variant.flags
    gradient = (4 * density if packed else touched(WIDTHS[grad])) + anchor * 4 * density + index
    value = 4 * density if master else touched(WIDTHS[param])
    if variant.kernel == "sum_squares_kernel":
        return gradient + anchor * value
    moments = 16 if variant.kernel == "update_kernel" else 4 + 16 / 256
    return gradient + value + moments * density + touched(WIDTHS[param]) + master * 4 * density


def listing(code: Code, density: float) -> float:
    """Instructions per active entry that list those of a bitmap: a warp waits for the fullest of its words."""

    def bits_of(around: tuple[int, int]) -> list[tuple[int, int]]:
        within = [s for s in loops(code) if around[0] <= s[0] and s[1] <= around[1] and s != around]
        return [s for s in within if any("STS" in t for t in inside(code, s))]

    words = [s for s in loops(code) if any("POPC" in t for t in inside(code, s)) and bits_of(s)]
    if not words:  # entries are read by rank
        return 0.0
    around = words[0]
    bits = bits_of(around)
    per_bit = sum(len(inside(code, span)) for span in bits) / len(bits)
    per_word = len(inside(code, around)) / len(bits) - per_bit
    chances = [math.comb(32, k) * density**k * (1 - density) ** (32 - k) for k in range(33)]
    below = list(itertools.accumulate(chances))
    fullest = sum(1 - min(1.0, p) ** 32 for p in below[:-1])
    return (per_word + per_bit * fullest) / (32 * density)


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
        opcodes = [opcode_of(text) for _, text in code]
        loads = [opcode for opcode in opcodes if re.match(r"LDG?\.", opcode)]
        variant = variant_of(name)
        registers, shared = (int(re.search(rf"{what}:(\d+)", resources[name])[1]) for what in ("REG", "SHARED"))
        yield {
            "kernel": NAMES[variant.kernel],
            "types": variant.name,
            "target": target,
            "registers": registers,
            "shared_bytes": shared + DYNAMIC_SHARED.get(variant.kernel, 0),
            "spills": sum(code.startswith(("LDL", "STL")) for code in opcodes),
            "instructions": len(opcodes),
            "loads_128": sum("128" in opcode for opcode in loads),
            "loads_64": sum("64" in opcode for opcode in loads),
            "loads": len(loads),
            "generic": sum(bool(re.match(r"(LD|ST|ATOM)(\.|$)", opcode)) for opcode in opcodes),
            **(of_update(variant, code) if variant.kernel in UPDATES else of_selection(variant, code)),
        }


def of_update(variant: Variant, code: Code) -> dict[str, str]:
    found = {}
    paths = batches(variant, code)
    counts = {kind: len(path) / batch_of(variant)[kind] for kind, path in paths.items()}
    densities = {"list": 0.2, "full": 1.0}
    for kind, path in paths.items():
        flying, loads = in_flight(path)
        found[f"{kind}_in_flight"] = f"{flying}/{loads}"
    found["instructions_per_entry"] = " ".join(f"{counts[kind]:.1f}" for kind in densities)
    counts["list"] += listing(code, densities["list"])
    lanes = [counts[kind] * density * ENTRIES / LANES_PER_MS for kind, density in densities.items()]
    moved = [bytes_per_parameter(variant, density) * ENTRIES / BYTES_PER_MS for density in densities.values()]
    found["issue_floor_ms"] = " ".join(f"{ms:.2f}" for ms in lanes)
    found["memory_floor_ms"] = " ".join(f"{ms:.2f}" for ms in moved)
    return found


def of_selection(variant: Variant, code: Code) -> dict[str, str]:
    found = {"list_in_flight": "", "full_in_flight": "", "instructions_per_entry": per_entry(variant, code)}
    count = found["instructions_per_entry"]
    found["issue_floor_ms"] = f"{float(count) * ENTRIES / LANES_PER_MS:.2f}" if count else ""
    moved = bytes_per_entry(variant) * ENTRIES / BYTES_PER_MS if count else 0
    found["memory_floor_ms"] = f"{moved:.2f}" if count else ""
    return found


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
    for row in table:
        if row["target"] == TARGETS[0] and row["memory_floor_ms"]:
            counts = f"{row['instructions_per_entry']:>11} instructions, {row['issue_floor_ms']:>9} ms"
            print(f"{row['kernel']:<20}{row['types']:<40}{counts} beside {row['memory_floor_ms']:>9} ms of memory")
    print(f"{output}: {len(table)} rows")


if __name__ == "__main__":
    main()
