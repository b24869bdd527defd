"""The emulator sees what it is there to see: small programs with one fault each, and arithmetic against numpy."""

import numpy as np
import pytest
import torch
from helpers import emulated_device as device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test builds the emulator

HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 data, .param .u64 counter) {
.reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .b64 %d<40>; .reg .f32 %f<20>; .reg .f64 %g<20>;
.shared .align 16 .b8 sh[1024];
ld.param.u64 %d0, [data]; ld.param.u64 %d9, [counter];
mov.u32 %r0, %tid.x; mov.u32 %r2, sh; shl.b32 %r1, %r0, 2; add.s32 %r3, %r2, %r1;
mul.wide.u32 %d1, %r0, 4; add.s64 %d2, %d0, %d1;
"""
# data, counter: %d0, %d9; the thread's own entry of data: %d2; its number, of shared memory its entry: %r0, %r3
ENTRIES = 256


def _outcome(body: str, data: torch.Tensor, threads: int, blocks: int) -> tuple[list[str], bool, torch.Tensor]:
    """(reports, whether the launch ended early, the data) of a program that is HEAD and this body."""
    counter = torch.zeros(4, dtype=torch.int32)
    data = data.clone()
    kernel = device.only_kernel(device.load(f"{HEAD}{body}\nret;\n}}\n"))
    failed = False
    try:
        device.launch(kernel, (blocks, 1, 1), (threads, 1, 1), 0, [data.data_ptr(), counter.data_ptr()])
    except RuntimeError:
        failed = True
    found = list(device.reports())
    device.clear()
    return found, failed, data


def outcome(gpu, body, data=None, threads=64, blocks=1, **settings):
    data = torch.zeros(ENTRIES, dtype=torch.int32) if data is None else data
    return gpu.run(_outcome, body, data, threads, blocks, **settings)


SCHEDULES = [{"random": 0}, *({"random": 1, "seed": seed, "burst": burst} for seed, burst in ((1, 1), (2, 5), (3, 40)))]

STORE = "st.shared.u32 [%r3], %r0;"
LOAD = "xor.b32 %r5, %r1, {}; add.s32 %r6, %r2, %r5; ld.shared.u32 %r7, [%r6]; st.global.u32 [%d2], %r7;"
OTHER_WARP, OTHER_LANE = LOAD.format(128), LOAD.format(4)
SHUFFLE = "shfl.sync.bfly.b32 %r9|%p1, %r0, 1, 31, -1;"
FIRST_LEAVES = "setp.eq.s32 %p1, %r0, 0; @%p1 bra A;"

RIGHT = {
    "an exchange with a barrier": STORE + "bar.sync 0;" + OTHER_WARP,
    "an exchange in a warp": STORE + "bar.warp.sync -1;" + OTHER_LANE,
    "atomics of several blocks": "atom.global.add.u32 %r5, [%d0], 1;",
    "the last entry": "st.global.u32 [%d2+768], 1;",
}
FAULTS = {
    "no barrier": (STORE + OTHER_WARP, "race in shared memory"),
    "no barrier in a warp": (STORE + OTHER_LANE, "race in shared memory"),
    "a warp's barrier between warps": (STORE + "bar.warp.sync -1;" + OTHER_WARP, "race in shared memory"),
    "a shuffle for a barrier": (STORE + SHUFFLE + OTHER_LANE, "race in shared memory"),
    "overwritten while read": (STORE + "bar.sync 0;" + OTHER_WARP + STORE, "race in shared memory"),
    "two writers": ("st.shared.u32 [%r2], %r0;", "race in shared memory"),
    "not initialised": ("ld.shared.u32 %r5, [%r3];", "uninitialised shared memory"),
    "an atomic and a store": ("atom.global.add.u32 %r5, [%d0], 1; st.global.u32 [%d0], 3;", "race in global memory"),
    "beyond the end": ("st.global.u32 [%d2+1024], %r0;", "out of bounds"),
    "before the start": ("st.global.u32 [%d2-256], %r0;", "out of bounds"),
    "a vector across the end": ("ld.global.v4.u32 {%r4,%r5,%r6,%r7}, [%d0+1016];", "out of bounds"),
    "no address": ("mov.u64 %d5, 0; ld.global.u32 %r5, [%d5];", "out of bounds"),
    "beyond shared memory": ("st.shared.u32 [%r3+1000], %r0;", "out of bounds of shared memory"),
    "a misaligned vector": ("ld.global.v4.u32 {%r4,%r5,%r6,%r7}, [%d0+8];", "misaligned"),
    "a constant that changes": ("st.global.u32 [%d2], %r0; ld.global.nc.u32 %r5, [%d2];", "constant load of memory"),
    "a barrier for each branch": (
        FIRST_LEAVES + "bar.sync 0; bra B;\nA:\n bar.sync 0;\nB:\n",
        "threads of a warp at different barriers",
    ),
    "a shuffle for each branch": (FIRST_LEAVES + SHUFFLE + "bra B;\nA:\n" + SHUFFLE + "\nB:\n", "deadlock"),
    "exit before a barrier": (FIRST_LEAVES + "bar.sync 0;\nA:\n", "barrier after other threads have left"),
    "a lane outside its mask": ("bar.warp.sync 1;", "a collective leaves the lane out that runs it"),
    "a division by zero": ("mov.u32 %r5, 0; div.u32 %r6, %r0, %r5;", "division by zero"),
    "a trap": ("trap;", "trap"),
}
ENDING = ("out of bounds", "misaligned", "deadlock", "a collective", "division", "trap")


@pytest.mark.parametrize("body", RIGHT.values(), ids=RIGHT)
def test_right_programs_are_left_alone(gpu, body):
    for schedule in SCHEDULES:
        reports, failed, _ = outcome(gpu, body, **schedule)
        assert (reports, failed) == ([], False)


@pytest.mark.parametrize(("body", "report"), FAULTS.values(), ids=FAULTS)
def test_faults_are_found(gpu, body, report):
    for schedule in SCHEDULES:
        reports, failed, _ = outcome(gpu, body, **schedule)
        assert any(found.startswith(report) for found in reports), (schedule, reports)
        assert failed == report.startswith(ENDING)


# --- between blocks: the last block to come works on what all have written ---


def last_block(
    write="st.global.u32 [%d4], %r7;",
    barrier="bar.sync 0;",
    release="fence.acq_rel.gpu;",
    count="atom.global.inc.u32 %r9, [%d9], %r8;",
    acquire="fence.acq_rel.gpu;",
    join="bar.sync 0;",
    gate="@%p3 bra DONE;",
    then="",
    everyone="",
) -> str:
    """Every thread writes an entry, thread 0 counts its block, the last block reads the entries of the next."""
    return f"""
    mov.u32 %r5, %ctaid.x; mov.u32 %r6, %nctaid.x; mov.u32 %r4, %ntid.x; sub.s32 %r8, %r6, 1;
    mad.lo.s32 %r7, %r5, %r4, %r0; mul.wide.u32 %d3, %r7, 4; add.s64 %d4, %d0, %d3;
    {write} {everyone} {barrier}
    setp.ne.s32 %p1, %r0, 0; @%p1 bra JOIN;
    {release} {count} {acquire}
    setp.eq.s32 %p2, %r9, %r8; selp.b32 %r10, 1, 0, %p2; st.shared.u32 [%r2], %r10;
JOIN:
    {join}
    ld.shared.u32 %r11, [%r2]; setp.eq.s32 %p3, %r11, 0; {gate}
    add.s32 %r12, %r5, 1; rem.u32 %r12, %r12, %r6; mad.lo.s32 %r12, %r12, %r4, %r0;
    mul.wide.u32 %d5, %r12, 4; add.s64 %d6, %d0, %d5; ld.global.u32 %r13, [%d6];
    {then}
DONE:
    """


PLAIN_COUNT = "ld.global.u32 %r9, [%d9]; add.s32 %r14, %r9, 1; st.global.u32 [%d9], %r14;"
ORDERED_COUNT = "atom.acq_rel.gpu.global.inc.u32 %r9, [%d9], %r8;"
ADD_TO_ONE = "red.global.add.u32 [%d2], 1;"  # every block to the same entries
ORDERED = {
    "fences": {},
    "membar": {"release": "membar.gl;", "acquire": "membar.gl;"},
    "the atomic itself": {"release": "", "count": ORDERED_COUNT, "acquire": ""},
    "acquired by all": {"acquire": "", "count": ORDERED_COUNT, "release": "membar.gl;"},
    "device-wide": {"release": "membar.sys;", "count": "atom.global.sys.inc.u32 %r9, [%d9], %r8;"},
    "released in a warp": {"barrier": "bar.warp.sync -1;", "threads": 32},
    "by every thread": {"everyone": "membar.gl;", "release": "", "acquire": "", "gate": "@%p3 bra DONE; membar.gl;"},
    "sequentially by one": {"everyone": "fence.sc.gpu;", "release": "", "acquire": "fence.sc.gpu;"},
    "the counter is set back": {"then": "@!%p1 st.global.u32 [%d9], 0;"},
    "the last block writes": {"then": "st.global.u32 [%d6], 0;"},
    "atomics on the way": {"write": ADD_TO_ONE, "then": "ld.global.u32 %r15, [%d2]; st.global.u32 [%d2], 0;"},
}
UNORDERED = {
    "no fence before": {"release": ""},
    "no fence after": {"acquire": ""},
    "no fence": {"release": "", "acquire": ""},
    "a fence of the block before": {"release": "fence.acq_rel.cta;"},
    "a fence of the block after": {"acquire": "membar.cta;"},
    "a counter of the block": {"count": "atom.global.cta.inc.u32 %r9, [%d9], %r8;"},
    "a counter that is not atomic": {"count": PLAIN_COUNT},
    "others have not written yet": {"barrier": ""},
    "others do not wait": {"join": ""},
    "not the last": {"gate": ""},
    "fences of others than who counts": {"everyone": "fence.acq_rel.gpu;", "release": ""},
    "fences without one order": {"everyone": "membar.gl;", "release": ""},
    "others look before they fence": {"everyone": "membar.gl;", "release": "", "acquire": "", "then": "membar.gl;"},
    "others do not fence": {
        "everyone": "setp.ne.s32 %p1, %r0, 0; @%p1 membar.gl;",
        "release": "",
        "acquire": "membar.gl;",
    },
    "written after the fence": {"write": "", "release": "fence.acq_rel.gpu; st.global.u32 [%d4], %r7;"},
    "atomics without a fence": {"write": ADD_TO_ONE, "then": "ld.global.u32 %r15, [%d2];", "release": ""},
    "set back by each": {"gate": "@!%p1 st.global.u32 [%d9], %r7; @%p3 bra DONE;"},
    "an acquire that counts nothing": {"count": "mov.u32 %r9, 2; ld.acquire.gpu.global.u32 %r14, [%d9];"},
}


@pytest.mark.parametrize("parts", ORDERED.values(), ids=ORDERED)
def test_what_a_last_block_reads_is_ordered(gpu, parts):
    threads = parts.get("threads", 64)
    body = last_block(**{name: part for name, part in parts.items() if name != "threads"})
    for schedule in SCHEDULES:
        reports, failed, _ = outcome(gpu, body, threads=threads, blocks=3, **schedule)
        assert (reports, failed) == ([], False), schedule


@pytest.mark.parametrize("parts", UNORDERED.values(), ids=UNORDERED)
def test_faults_of_a_last_block_are_found(gpu, parts):
    for schedule in SCHEDULES:
        reports, failed, _ = outcome(gpu, last_block(**parts), blocks=3, **schedule)
        assert any(found.startswith("race between blocks") for found in reports), schedule
        assert not failed


def test_order_is_handed_on(gpu):
    """From block 0 through block 1 to block 2, each by a flag; not where block 1 does not acquire."""
    body = """
    mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 0; setp.eq.s32 %p2, %r5, 1;
    @!%p1 bra LATER; st.global.u32 [%d0], 7; st.release.gpu.global.u32 [%d9], 1; bra DONE;
LATER: @!%p2 bra LAST;
WAIT: {acquire} %r6, [%d9]; setp.eq.s32 %p3, %r6, 0; @%p3 bra WAIT;
    st.release.gpu.global.u32 [%d9+4], 1; bra DONE;
LAST: ld.acquire.gpu.global.u32 %r6, [%d9+4]; setp.eq.s32 %p3, %r6, 0; @%p3 bra LAST;
    ld.global.u32 %r7, [%d0]; st.global.u32 [%d0+4], %r7;
DONE:
    """
    for load, found in (("ld.acquire.gpu.global.u32", []), ("ld.relaxed.gpu.global.u32", ["race between blocks"])):
        for schedule in SCHEDULES:
            reports, failed, data = outcome(gpu, body.format(acquire=load), threads=1, blocks=3, **schedule)
            assert ([report.split(" | ")[0] for report in reports], failed, int(data[1])) == (found, False, 7)


def test_blocks_race(gpu):
    reports, _, _ = outcome(gpu, "mov.u32 %r5, %ctaid.x; st.global.u32 [%d2], %r5;", blocks=3)
    assert reports[0].startswith("race between blocks")


def test_an_unknown_instruction_is_an_error(gpu):
    for body, message in (
        ("frobnicate.b32 %r5, %r0;", "unknown instruction"),
        ("add.rubbish.s32 %r5, %r0, 1;", "modifier .rubbish"),
        ("mov.u32 %r5, %nosuch;", "operand"),
        ("add.bf16 %h1, %h2, %h3;", "type of"),
    ):
        with pytest.raises(RuntimeError, match=message):
            outcome(gpu, body)


def test_functions_are_called(gpu):
    """Each call on registers of its own, with labels of its own."""
    function = """
    .func (.param .b32 result) smaller(.param .b32 x, .param .b32 y) {
    .reg .pred %p<2>; .reg .b32 %r<3>;
    ld.param.b32 %r0, [x]; ld.param.b32 %r1, [y]; setp.le.s32 %p0, %r0, %r1; @!%p0 bra OTHER;
    st.param.b32 [result], %r0; ret;
OTHER:
    st.param.b32 [result], %r1; ret;
    }
    """
    call = """{{ .param .b32 a; .param .b32 b; .param .b32 c; st.param.b32 [a], {}; st.param.b32 [b], {};
    call.uni (c), smaller, (a, b); ld.param.b32 {}, [c]; }}"""
    body = call.format("%r0", "9", "%r20") + call.format("4", "%r20", "%r21") + "mad.lo.s32 %r22, %r20, 100, %r21;"
    body += "st.global.u32 [%d2], %r22; ret; }" + function + ".visible .entry other() { "
    reports, failed, found = outcome(gpu, body, threads=32)
    assert (reports, failed) == ([], False)
    assert found[:32].tolist() == [100 * min(i, 9) + min(i, 9, 4) for i in range(32)]


# --- arithmetic ---

EDGES = [
    0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000, 0x00800000, 0x33000000, 0x33000001,
    0x477FEFFF, 0x477FF000, 0x387FC000, 0x38800000, 0x7F7FFFFF,
]  # fmt: skip
rng = np.random.default_rng(0)
BITS = np.concatenate([np.array(EDGES, np.uint32), rng.integers(0, 2**32, ENTRIES - len(EDGES), np.uint32)])
BITS[200:] = rng.standard_normal(ENTRIES - 200).astype(np.float32).view(np.uint32)
FLOATS, SIGNED, LANES = BITS.view(np.float32), BITS.view(np.int32), np.arange(ENTRIES)
NAN = 0x7FFFFFFF


def _bits(floats: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(floats), NAN, floats.astype(np.float32).view(np.uint32))


def _halves(bits: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(FLOATS), 0x7FFF, bits)


with np.errstate(all="ignore"):
    _truncated = np.clip(np.trunc(np.nan_to_num(FLOATS.astype(np.float64))), -(2.0**31), 2.0**31 - 1).astype(np.int64)
    # program -> what it leaves in %r11, from the bits in %r10, as a float in %f1
    ARITHMETIC = {
        "sqrt.rn.f32 %f2, %f1; mov.b32 %r11, %f2": _bits(np.sqrt(FLOATS)),
        "div.rn.f32 %f2, 0f40400000, %f1; mov.b32 %r11, %f2": _bits(np.float32(3) / FLOATS),
        "sub.rn.f32 %f2, 0f3F800000, %f1; mov.b32 %r11, %f2": _bits(np.float32(1) - FLOATS),
        "mul.rn.f32 %f2, %f1, %f1; mov.b32 %r11, %f2": _bits(FLOATS * FLOATS),
        "cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r11, %h1": _halves(FLOATS.astype(np.float16).view(np.uint16)),
        "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r11, %h1": _halves(
            torch.from_numpy(FLOATS.copy()).bfloat16().view(torch.uint16).numpy()
        ),
        "cvt.u16.u32 %h1, %r10; cvt.f32.f16 %f2, %h1; mov.b32 %r11, %f2": _bits(
            (BITS & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)
        ),
        "cvt.rzi.s32.f32 %r11, %f1": _truncated,
        "abs.f16x2 %r11, %r10": BITS & 0x7FFF7FFF,
        "neg.bf16x2 %r11, %r10": BITS ^ 0x80008000,
        "cvt.u16.u32 %h1, %r10; abs.bf16 %h2, %h1; cvt.u32.u16 %r11, %h2": BITS & 0x7FFF,
        "abs.s32 %r11, %r10": np.abs(SIGNED.astype(np.int64)),
        "cvt.f64.f32 %g1, %f1; cvt.rzi.f64.f64 %g1, %g1; cvt.rn.f32.f64 %f2, %g1; mov.b32 %r11, %f2": _bits(
            np.trunc(FLOATS)
        ),
        "cvt.f64.f32 %g1, %f1; sqrt.rn.f64 %g1, %g1; cvt.rn.f32.f64 %f2, %g1; mov.b32 %r11, %f2": _bits(
            np.sqrt(FLOATS.astype(np.float64)).astype(np.float32)
        ),
        "popc.b32 %r11, %r10": np.array([int(x).bit_count() for x in BITS]),
        "clz.b32 %r11, %r10": np.array([32 - int(x).bit_length() for x in BITS]),
        "bfind.u32 %r11, %r10": np.array([int(x).bit_length() - 1 for x in BITS]),
        "bfind.shiftamt.u32 %r11, %r10": np.array([32 - int(x).bit_length() if x else -1 for x in BITS]),
        "brev.b32 %r11, %r10": np.array([int(f"{x:032b}"[::-1], 2) for x in BITS]),
        "shr.s32 %r11, %r10, 5": SIGNED >> 5,
        "shr.u32 %r11, %r10, 33": 0 * BITS,
        "bfe.u32 %r11, %r10, 7, 9": BITS >> 7 & 511,
        "bfe.s32 %r11, %r10, 2, 1": -(SIGNED.astype(np.int64) >> 2 & 1),
        "bfe.s32 %r11, %r10, 25, 12": SIGNED >> 25,
        "cvt.f64.f32 %g1, %f1; max.f64 %g1, %g1, 0d3FF0000000000000; cvt.rn.f32.f64 %f2, %g1; mov.b32 %r11, %f2": _bits(
            np.fmax(FLOATS, np.float32(1))
        ),
        "bfi.b32 %r11, %r10, 0x12345678, 8, 4": (0x12345678 & ~0xF00) | (BITS & 15) << 8,
        "prmt.b32 %r11, %r10, 0xAABBCCDD, 0x7410": (BITS & 0xFFFF) | 0xAADD0000,
        "max.s32 %r11, %r10, -5": np.maximum(SIGNED, -5),
        "div.u32 %r11, %r10, 7": BITS // 7,
        "mul.hi.u32 %r11, %r10, %r10": BITS.astype(np.uint64) ** 2 >> np.uint64(32),
        "shfl.sync.up.b32 %r11|%p1, %r10, 3, 0, -1": np.where(LANES % 32 >= 3, np.roll(BITS, 3), BITS),
        "shfl.sync.down.b32 %r11|%p1, %r10, 3, 31, -1": np.where(LANES % 32 < 29, np.roll(BITS, -3), BITS),
        "shfl.sync.bfly.b32 %r11, %r10, 5, 31, -1": BITS[LANES ^ 5],
        "shfl.sync.idx.b32 %r11, %r10, 9, 31, -1": BITS[LANES // 32 * 32 + 9],
        "redux.sync.max.s32 %r11, %r10, -1": np.repeat(SIGNED.reshape(-1, 32).max(1), 32),
        "redux.sync.add.s32 %r11, %r10, -1": np.repeat(BITS.astype(np.uint64).reshape(-1, 32).sum(1), 32),
        "setp.lt.f32 %p1, %f1, 0f3F800000; selp.b32 %r11, 1, 0, %p1": FLOATS < 1,
        "setp.ltu.f32 %p1, %f1, 0f3F800000; selp.b32 %r11, 1, 0, %p1": ~(FLOATS >= 1),
        "setp.eq.u32 %p1, %r0, 9; vote.sync.ballot.b32 %r11, %p1, -1": np.where(LANES < 32, 1 << 9, 0),
    }


def test_approximate_roots_are_off_within_the_manual(gpu):
    """By up to a part of 2^-23, up and down."""
    body = "ld.global.u32 %r10, [%d2]; mov.b32 %f1, %r10; sqrt.approx.ftz.f32 %f2, %f1; st.global.f32 [%d2], %f2;"
    values = torch.linspace(0.01, 100, ENTRIES, dtype=torch.float32)
    _, _, found = outcome(gpu, body, values.view(torch.int32), threads=ENTRIES)
    error = found.view(torch.float32).double() / values.double().sqrt() - 1
    assert error.abs().max() <= 2.0**-23 and error.min() < -(2.0**-24) and error.max() > 2.0**-24


@pytest.mark.parametrize(("program", "wanted"), ARITHMETIC.items(), ids=[p.split()[0] for p in ARITHMETIC])
def test_arithmetic_of_numpy(gpu, program, wanted):
    body = f"ld.global.u32 %r10, [%d2]; mov.b32 %f1, %r10; {program}; st.global.u32 [%d2], %r11;"
    reports, failed, found = outcome(gpu, body, torch.from_numpy(BITS.view(np.int32).copy()), threads=ENTRIES)
    assert (reports, failed) == ([], False)
    assert (found.numpy().view(np.uint32) == (wanted.astype(np.int64) & 0xFFFFFFFF)).all()
