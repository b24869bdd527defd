"""What the Triton compiler makes of the kernels, counted without a GPU: `python benchmarks/static_triton.py`.

Writes a row for every kernel, variant and target to benchmarks/results/static/triton.csv. Instructions are counted in
SASS (NVIDIA); a row for AMD says that the kernel compiles and how many registers it takes. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported

import triton
import triton.language as tl
from ltp_sparse.kernels import digests, masked_adamw, masked_copy, topk_delta
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results" / "static" / "triton.csv"
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def _types(text: str) -> dict[str, str]:
    return dict(item.split(":") for item in text.split())


_UPDATE = _types(
    "prepared_ptr:*i64 exp_avg_ptr:*fp32 exp_avg_sq_ptr:*fp32 scale_ptr:*fp32 master_ptr:*fp32 tile_ptr:*i64 "
    "group_ptr:*i64 rank_ptr:*i16 position_ptr:*i16 coefficient_ptr:*fp64 clip_ptr:*fp64 anchor_ptr:*fp32"
)
_SQUARES = _types(
    "prepared_ptr:*i64 master_ptr:*fp32 tile_ptr:*i64 group_ptr:*i64 rank_ptr:*i16 position_ptr:*i16 anchor_ptr:*fp32 "
    "sum_ptr:*fp64 first_tile:i32 tiles:i32 max_norm_bits:i64 arrived_ptr:*i32 grad_norm_ptr:*fp64 clip_ptr:*fp64"
)
_PACK = _types(
    "address_ptr:*i64 single_address:i64 out_ptr:*fp32 tile_ptr:*i64 group_ptr:*i64 rank_ptr:*i16 position_ptr:*i16"
)
_COPY = _types("address_ptr:*i64 slot_ptr:*i8 tile_ptr:*i64 group_ptr:*i64 rank_ptr:*i16 position_ptr:*i16")
_PREPARE = _types(
    "address_ptr:*i64 coefficient_ptr:*fp64 prepared_ptr:*i64 n_params:i32 hyper_ptr:*fp64 param_group_ptr:*i64 "
    "number_ptr:*i64 has_grad_ptr:*fp64 step_ptr:*fp64 found_inf_ptr:*fp32 grad_scale_ptr:*fp32 "
    "pull_factor_ptr:*fp64 seed:i64"
)
_BAND = _types(
    "row_ptr:*i64 n_tiles:i32 low_ptr:*i64 high_ptr:*i64 words_ptr:*i32 above_ptr:*i64 inside_ptr:*i64 take_ptr:*i64 "
    "key_ptr:*i32 position_ptr:*i16 capacity:i32 offset_ptr:*i64 cursor_ptr:*i64 nonfinite_ptr:*i64 "
    "inside_words_ptr:*i32 before_ptr:*i16"
)
_SAMPLE = _types("row_ptr:*i64 kind:i32 tensor_ptr:*i64 run_ptr:*i64 n_runs:i32 key_ptr:*i32")
_HISTOGRAM = _types(
    "key_ptr:*i32 offset_ptr:*i64 inside_ptr:*i64 group_ptr:*i64 low_ptr:*i64 high_ptr:*i64 shift_ptr:*i64 "
    "histogram_ptr:*i64 bins:i32"
)
_TAKE = _types(
    "key_ptr:*i32 position_ptr:*i16 offset_ptr:*i64 inside_ptr:*i64 group_ptr:*i64 cut_ptr:*i64 words_ptr:*i32 "
    "tile_word_ptr:*i64"
)


class Variant(NamedTuple):
    """A specialisation of a kernel, as its launcher makes it.

    Attributes:
        loops: entries per thread of each loop over entries
        work: instructions that such loops have, and no other
    """

    kernel: str
    variant: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    loops: dict[str, int]
    work: tuple[str, ...] = ("MUFU", "F2F", "SHFL", "REDUX")


def variants() -> Iterator[Variant]:
    """Of each kernel the most used variant first."""
    warps, block = masked_adamw._NUM_WARPS, masked_adamw._BLOCK
    share = block // (32 * warps)
    f32, bf16, f16 = tl.float32, tl.bfloat16, tl.float16
    every = {"full": 2 * share, "bitmap": share, "list16": share}
    coded = {"active": masked_adamw._STATE_BLOCK.value // (32 * warps)}
    for variant, param, grad, modes, loops in (
        ("plain", f32, f32, "", every),
        ("anchor", f32, f32, "HAS_ANCHOR", every),
        ("packed", f32, f32, "PACKED", every),
        ("clip", f32, f32, "HAS_CLIP", every),
        ("8bit", f32, f32, "CODED", coded),
        ("bfloat16 stochastic", bf16, bf16, "STOCHASTIC", every),
        ("bfloat16 master", bf16, bf16, "HAS_MASTER", every),
        ("bfloat16 8bit stochastic", bf16, bf16, "CODED STOCHASTIC", coded),
        ("float16 master packed", f16, f32, "HAS_MASTER PACKED", every),
    ):
        flags = ("PACKED", "CODED", "HAS_MASTER", "HAS_ANCHOR", "HAS_CLIP", "STOCHASTIC")
        constants = {"PARAM": param, "GRAD": grad, **{flag: flag in modes.split() for flag in flags}, "BLOCK": block}
        types = _UPDATE | ({"exp_avg_ptr": "*i8", "exp_avg_sq_ptr": "*u8"} if "CODED" in modes else {})
        yield Variant("masked_adamw_", variant, masked_adamw._masked_adamw_kernel, types, constants, warps, loops)
    loops = {"bitmap": share, "list16": share}
    for variant, param, anchor, total in (
        ("plain", f32, False, False),
        ("anchor", f32, True, False),
        ("bfloat16", bf16, False, False),
        ("total", f32, False, True),
    ):
        constants = {
            "PARAM": param,
            "GRAD": param,
            "PACKED": False,
            "HAS_MASTER": False,
            "HAS_ANCHOR": anchor,
            "TOTAL": total,
            "BLOCK": block,
        }
        function = masked_adamw._masked_sum_squares_kernel
        yield Variant("masked_sum_squares", variant, function, _SQUARES, constants, warps, loops)
    scalars = ("HAS_FOUND_INF", "HAS_GRAD_SCALE", "HAS_PULL_FACTOR")
    for variant, step, there in (("step", True, False), ("scaler", True, True), ("coefficients", False, False)):
        constants = {"IS_STEP": step, "COUNTS": step, **dict.fromkeys(scalars, there)}
        constants["BLOCK"] = masked_adamw._PREPARED_AT_ONCE
        function, few = masked_adamw._prepare_kernel, masked_adamw._PREPARED_AT_ONCE // 32
        yield Variant("prepare_step", variant, function, _PREPARE, constants, few, {})
    for variant, grad, accumulate in (("plain", f32, False), ("accumulate", f32, True), ("bfloat16", bf16, False)):
        constants = {"GRAD": grad, "SINGLE": False, "ACCUMULATE": accumulate, "BLOCK": block}
        function = masked_adamw._masked_pack_kernel
        yield Variant("masked_pack_", variant, function, _PACK, constants, warps, loops, ("STG",))
    for variant, item in (("bytes", "i8"), ("16 bits", "i16"), ("32 bits", "i32"), ("64 bits", "i64")):
        for kernel, reads, writes in (
            ("masked_gather_", True, False),
            ("masked_scatter_", False, True),
            ("masked_swap_", True, True),
        ):
            constants = {"READS": reads, "WRITES": writes, "BLOCK": block}
            types = _COPY | {"slot_ptr": f"*{item}"}
            function = masked_copy._masked_copy_kernel
            yield Variant(kernel, variant, function, types, constants, warps, loops, ("STG",))
    warps, rows = topk_delta._NUM_WARPS, topk_delta._ROWS
    for variant, initial, tuned, take, aligned in (
        ("float32", tl.float32, tl.float32, False, True),
        ("bfloat16", tl.bfloat16, tl.bfloat16, False, True),
        ("float16", tl.float16, tl.float16, False, True),
        ("bfloat16 to float32", tl.bfloat16, tl.float32, False, True),
        ("scores", None, tl.float32, False, True),
        ("take", tl.float32, tl.float32, True, True),
        ("unaligned", tl.float32, tl.float32, False, False),
    ):
        constants = {"INITIAL": initial, "TUNED": tuned, "ALIGNED": aligned, "HAS_TAKE": take, "ROWS": rows}
        function, loops = topk_delta._delta_band_kernel, {"mark": rows // warps}
        yield Variant("delta_band", variant, function, _BAND, constants, warps, loops)
    warps = topk_delta._SAMPLE_WARPS
    for variant, initial, tuned in (
        ("float32", f32, f32),
        ("bfloat16", bf16, bf16),
        ("bfloat16 to float32", bf16, f32),
        ("scores", None, f32),
    ):
        constants = {"INITIAL": initial, "TUNED": tuned}
        yield Variant("sample_keys", variant, topk_delta._sample_keys_kernel, _SAMPLE, constants, warps, {})
    warps = topk_delta._CANDIDATE_WARPS
    share = topk_delta._CANDIDATES.value // (32 * warps)
    for kernel, function, types, loops in (
        ("candidate_histogram", topk_delta._candidate_histogram_kernel, _HISTOGRAM, {}),
        ("take_above", topk_delta._take_above_kernel, _TAKE | _types("taken_ptr:*i64 ties_ptr:*i64"), {}),
        ("take_ties", topk_delta._take_ties_kernel, _TAKE | _types("take_ptr:*i64"), {"ties": share}),
    ):
        yield Variant(kernel, "plain", function, types, {}, warps, loops)
    warps, blocks = digests._NUM_WARPS, digests._BLOCKS
    loops = {"words": blocks * digests._WORDS.value // (32 * warps)}  # words of 64 bits
    types = _types("row_ptr:*i64 secret_ptr:*i64 out_ptr:*i64")
    yield Variant("tile_digests", "plain", digests._tile_digests_kernel, types, {"BLOCKS": blocks}, warps, loops)


def compiled(v: Variant, target: GPUTarget) -> Any:
    types = {**v.types, **dict.fromkeys(v.constants, "constexpr")}
    pointers = [i for i, name in enumerate(v.function.arg_names) if types[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=v.function, signature=types, constexprs=v.constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": v.num_warps, "enable_fp_fusion": False})


def disassembled(cubin: bytes) -> tuple[list[str], dict[str, int], int]:
    """(instructions, position of every label among them, registers)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in (
                [triton.knobs.nvidia.nvdisasm.path, "-c"],
                [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"],
            )
        )
    instructions: list[str] = []
    labels = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels, int(re.search(r"REG:(\d+)", usage)[1])


def innermost_loops(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) instruction of the loops that contain no other, in order."""
    loops = []
    for last, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA.*`\((\.L_\w+)\)", instruction)
        if branch and labels[branch[1]] < last:
            loops.append((labels[branch[1]], last))
    return sorted(a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops))


def executed(instructions: list[str], labels: dict[str, int], first: int, last: int) -> int:
    """Instructions first..last without the slow paths of division and root: the call, and the block it returns to."""
    ends = {i for i in range(first, last) if re.search(r"\b(BRA|CALL)\b", instructions[i])}
    starts = sorted({first, *(p for p in labels.values() if first < p <= last), *(i + 1 for i in ends)})
    count, skip = 0, False
    for start, stop in zip(starts, [*starts[1:], last + 1], strict=True):
        calls = "slowpath" in instructions[stop - 1]
        count += 0 if calls or skip else stop - start
        skip = calls
    return count


def counted(v: Variant, target: str) -> dict[str, Any]:
    """A row of the table."""
    result = compiled(v, TARGETS[target])
    facts: dict[str, Any] = {
        "kernel": v.kernel,
        "variant": v.variant,
        "target": target,
        "triton": triton.__version__,
        "num_warps": v.num_warps,
        "shared_bytes": result.metadata.shared,
    }
    if "amdgcn" in result.asm:
        for fact, name in (("registers", "vgpr_count"), ("spills", "vgpr_spill_count")):
            facts[fact] = int(re.search(rf"\.{name}:\s+(\d+)", result.asm["amdgcn"])[1])
        return facts

    instructions, labels, facts["registers"] = disassembled(result.asm["cubin"])
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in instructions]
    facts["spills"] = sum(code.startswith(("LDL", "STL")) for code in opcodes)
    facts["instructions"] = len(opcodes)
    facts["barriers"] = sum(code.startswith("BAR") for code in opcodes)
    facts["flushes_subnormals"] = len(re.findall(r"\b(?:add|sub)\S*\.ftz\b", result.asm["ptx"]))
    facts["cvt_rn"] = len(re.findall(r"\bcvt\.rn\.(?:bf16|f16)", result.asm["ptx"]))
    for kind in ("LDG", "STG"):
        for width in (128, 64, 32, 16):
            found = [c for c in opcodes if c.startswith(kind) and _width(c) == width]
            facts[f"{kind.lower()}_{width}"] = len(found)
    facts["generic"] = sum(bool(re.match(r"(LD|ST)(\.|$)", code)) for code in opcodes)
    facts["atom"] = sum(code.startswith("ATOM") for code in opcodes)  # waits for the old value, which RED does not
    facts["red"] = sum(code.startswith("RED") and not code.startswith("REDUX") for code in opcodes)
    loops = [
        loop
        for loop in innermost_loops(instructions, labels)
        if any(c.startswith(v.work) for c in opcodes[loop[0] : loop[1] + 1])
    ]
    per_entry = [
        f"{name} {executed(instructions, labels, *loop) / entries:.1f}"
        for (name, entries), loop in zip(v.loops.items(), loops, strict=True)
    ]
    facts["instructions_per_entry"] = ", ".join(per_entry)
    facts["loads_before_stores"] = ", ".join(
        f"{name} {_before_stores(opcodes[first : last + 1])}"
        for name, (first, last) in zip(v.loops, loops, strict=True)
    )
    return facts


def _before_stores(opcodes: list[str]) -> str:
    """Loads before the first store of a loop, out of all."""
    loads, stores = ([i for i, code in enumerate(opcodes) if code.startswith(kind)] for kind in ("LDG", "STG"))
    return f"{sum(i < min(stores, default=len(opcodes)) for i in loads)}/{len(loads)}"


def _width(opcode: str) -> int:
    """Bits of a global load or store."""
    modifiers = opcode.split(".")
    return next((bits for bits in (128, 64) if str(bits) in modifiers), 16 if "U16" in modifiers else 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    rows: list[dict[str, Any]] = []
    for v in variants():
        # every variant for the main target; the others get each kernel once
        once = all(row["kernel"] != v.kernel for row in rows)
        rows += [counted(v, target) for target in (TARGETS if once else ["sm_90"])]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
