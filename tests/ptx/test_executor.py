"""The executor on hand-written PTX: what each family of instructions computes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.executor import AccessError, ExecutionError, HangError, RaceError, Stats, TensorMap, parse, run

REGISTERS = """
    .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<20>; .reg .f32 %f<20>; .reg .f64 %g<9>;
"""


def module(body: str, params: str = ".param .u64 out, .param .u64 in", extra: str = "") -> str:
    head = f".version 8.7\n.target sm_90a\n.address_size 64\n{extra}\n.visible .entry test({params})\n{{\n"
    return head + REGISTERS + body + "\nret;\n}\n"


def launch(text: str, *arrays: np.ndarray | TensorMap, threads: int = 32, shared: int = 4096, grid: int = 1) -> Stats:
    args = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arrays]
    memory = [a for a in arrays if isinstance(a, np.ndarray)]
    return run(parse(text), (grid,), args, shared_bytes=shared, memory=memory, threads=threads)


def computed(operation: str, *inputs: np.ndarray, result: type = np.uint32, threads: int | None = None) -> np.ndarray:
    """One `operation` on registers of 32 bits: inputs in %r1, %r2, %r3 (also for floats), the result in %r0."""
    count = threads or len(inputs[0])
    packed = np.stack([np.ascontiguousarray(i).view(np.uint32) for i in inputs], axis=1).copy()
    out = np.zeros(count, result)
    loads = "\n".join(f"ld.global.b32 %r{i + 1}, [%d2+{4 * i}];" for i in range(len(inputs)))
    body = f"""
    ld.param.u64 %d0, [out]; ld.param.u64 %d1, [in];
    mov.u32 %r30, %tid.x;
    mad.wide.u32 %d2, %r30, {4 * len(inputs)}, %d1;
    mad.wide.u32 %d3, %r30, 4, %d0;
    {loads}
    {operation}
    st.global.b32 [%d3], %r0;"""
    launch(module(body), out, packed, threads=count)
    return out


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


SPECIAL = floats(0.0, -0.0, 1.5, -2.5, 3.5, 1e-40, 3e38, np.inf, -np.inf, np.nan, 0.1, -0.7, 65519.0, 65520.0, 2.0**-25)


def bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal numbers of equal sign; any NaN equals any other."""
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a[a == a]), np.signbit(b[b == b]))


@pytest.mark.parametrize("sign, kind", [("u", np.uint32), ("s", np.int32)])
def test_division_by_zero_is_no_error(sign: str, kind: type) -> None:
    above, below = np.array([7, 9, 40], kind), np.array([2, 0, 5], kind)
    got = computed(f"div.{sign}32 %r0, %r1, %r2;", above, below, result=kind)
    assert got[0] == 3 and got[2] == 8


@pytest.mark.parametrize(
    "operation, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_to_integers(operation: str, function: np.ufunc) -> None:
    got = computed(f"cvt.{operation}.s32.f32 %r0, %r1;", SPECIAL, result=np.int32)
    wide = np.nan_to_num(function(SPECIAL.astype(np.float64)), nan=0.0)
    assert np.array_equal(got, np.clip(wide, -(2**31), 2**31 - 1).astype(np.int64))
    unsigned = computed(f"cvt.{operation}.u32.f32 %r0, %r1;", SPECIAL)
    assert np.array_equal(unsigned, np.clip(wide, 0, 2**32 - 1).astype(np.int64))
    same = computed(f"cvt.{operation}.f32.f32 %r0, %r1;", SPECIAL, result=np.float32)
    assert bits_equal(same, function(SPECIAL))


def test_narrow_floats() -> None:
    import torch

    to = "{{ cvt.rn.{0}.f32 %h1, %r1; cvt.f32.{0} %r0, %h1; }}"
    random = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint64).astype(np.uint32).view(np.float32)
    for values in (SPECIAL, random):
        for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
            expected = torch.from_numpy(values.copy()).to(dtype).float().numpy()
            assert bits_equal(computed(to.format(name), values, result=np.float32), expected)
    pair = computed("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", floats(1.0, 2.0), floats(3.0, 4.0))
    assert pair.tolist() == [0x3F804040, 0x40004080]
    truncated = computed("cvt.rz.bf16.f32 %h1, %r1; cvt.f32.bf16 %r0, %h1;", SPECIAL, result=np.float32)
    assert bits_equal(truncated, (SPECIAL.view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32))
    clipped = computed("cvt.rn.relu.f16.f32 %h1, %r1; cvt.f32.f16 %r0, %h1;", floats(-1, 2), result=np.float32)
    assert clipped.tolist() == [0, 2]


def test_integers_to_narrow_and_wide() -> None:
    x = np.array([0, 1, -1, 127, 128, -129, 40000, -40000, 2**31 - 1, -(2**31), 16777217], np.int32)
    assert np.array_equal(computed("cvt.s32.s8 %r0, %r1;", x, result=np.int32), x.astype(np.int8))
    assert np.array_equal(computed("cvt.sat.s8.s32 %r0, %r1;", x, result=np.int32), np.clip(x, -128, 127))
    assert np.array_equal(computed("cvt.sat.u16.s32 %h1, %r1; cvt.u32.u16 %r0, %h1;", x), np.clip(x, 0, 65535))
    assert np.array_equal(computed("cvt.rn.f32.s32 %r0, %r1;", x, result=np.float32), x.astype(np.float32))
    towards_zero = computed("cvt.rz.f32.s32 %r0, %r1;", x, result=np.float32).astype(np.int64)
    assert (np.abs(towards_zero) <= np.abs(x.astype(np.int64))).all() and towards_zero[-1] == 16777216
    assert np.array_equal(
        computed("cvt.s64.s32 %d5, %r1; shr.s64 %d5, %d5, 4; cvt.u32.u64 %r0, %d5;", x, result=np.int32), x >> 4
    )


def test_minimum_maximum_and_saturation() -> None:
    a, b = np.repeat(SPECIAL, len(SPECIAL)), np.tile(SPECIAL, len(SPECIAL))
    for name, number, propagating in (("min", np.fmin, np.minimum), ("max", np.fmax, np.maximum)):
        got = computed(f"{name}.f32 %r0, %r1, %r2;", a, b, result=np.float32)
        zeros = (a == 0) & (b == 0)
        assert np.array_equal(got, number(a, b), equal_nan=True)
        either, both = np.signbit(a) | np.signbit(b), np.signbit(a) & np.signbit(b)
        assert np.array_equal(np.signbit(got[zeros]), (either if name == "min" else both)[zeros])
        got = computed(f"{name}.NaN.f32 %r0, %r1, %r2;", a, b, result=np.float32)
        assert np.array_equal(got, propagating(a, b), equal_nan=True)
    saturated = computed("add.sat.f32 %r0, %r1, %r2;", a, b, result=np.float32)
    assert ((saturated >= 0) & (saturated <= 1)).all()
    flushed = computed("mul.ftz.f32 %r0, %r1, %r2;", floats(1e-30, 1e-40, 2), floats(1e-10, 1e20, 3), result=np.float32)
    assert flushed.tolist() == [0, 0, 6]


@pytest.mark.parametrize("name", ["lt", "leu", "equ", "ne", "neu", "num", "nan"])
def test_comparisons_with_nan(name: str) -> None:
    a, b = np.repeat(SPECIAL, len(SPECIAL)), np.tile(SPECIAL, len(SPECIAL))
    nan = np.isnan(a) | np.isnan(b)
    expected = {
        "lt": (a < b) & ~nan,
        "leu": (a <= b) | nan,
        "equ": (a == b) | nan,
        "ne": (a != b) & ~nan,
        "neu": (a != b) | nan,
        "num": ~nan,
        "nan": nan,
    }[name]
    got = computed(f"setp.{name}.f32 %p1|%p2, %r1, %r2; selp.b32 %r0, 1, 0, %p1; @%p2 or.b32 %r0, %r0, 2;", a, b)
    assert np.array_equal(got, np.where(expected, 1, 2))


def test_bit_fields_and_funnels() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    signed = x.view(np.int32)
    assert np.array_equal(computed("bfe.u32 %r0, %r1, 5, 9;", x), x >> 5 & 511)
    assert np.array_equal(computed("bfe.s32 %r0, %r1, 23, 9;", x, result=np.int32), signed >> 23)
    assert np.array_equal(computed("bfe.s32 %r0, %r1, 28, 9;", x, result=np.int32), signed >> 28)
    assert np.array_equal(computed("bfi.b32 %r0, %r1, %r2, 8, 4;", x, ~x), (~x & ~np.uint32(0xF00)) | ((x & 15) << 8))
    assert np.array_equal(computed("shl.b32 %r0, %r1, 40;", x), np.zeros(64))
    assert np.array_equal(computed("mov.u32 %r5, 40; shr.s32 %r0, %r1, %r5;", x, result=np.int32), signed >> 31)
    assert np.array_equal(computed("shf.r.wrap.b32 %r0, %r1, %r2, 36;", x, ~x), (x >> 4) | (~x << np.uint32(28)))
    assert np.array_equal(computed("lop3.b32 %r0, %r1, %r2, %r3, 0x96;", x, ~x, x << 1), x ^ ~x ^ (x << 1))
    assert np.array_equal(computed("prmt.b32 %r0, %r1, 0, 0x0123;", x), x.byteswap())
    assert np.array_equal(computed("bfind.u32 %r0, %r1;", x), np.floor(np.log2(x.astype(float))))
    carried = computed("add.cc.u32 %r5, %r1, %r2; addc.u32 %r0, 0, 0;", x, x[::-1])
    assert np.array_equal(carried, (x.astype(np.uint64) + x[::-1]) >> 32)


def test_packed_halves() -> None:
    a = np.array([[1.0, 2.5], [-3.0, 0.1]], np.float16)
    got = computed("fma.rn.f16x2 %r0, %r1, %r1, %r1;", a.view(np.uint32).reshape(-1)).view(np.float16).reshape(2, 2)
    assert np.array_equal(got, (a.astype(np.float64) ** 2 + a).astype(np.float16))


def test_threads_part_and_meet() -> None:
    body = """
    ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.u32 %r3, 0;
    LOOP: and.b32 %r4, %r3, 1; setp.eq.u32 %p1, %r4, 1; @%p1 bra ODD;
    add.u32 %r2, %r2, 1; bra NEXT;
    ODD: add.u32 %r2, %r2, 100;
    NEXT: add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %r1; @%p2 bra LOOP;
    vote.sync.ballot.b32 %r5, %p2, 0xFFFFFFFF;
    activemask.b32 %r6;
    mad.wide.u32 %d1, %r1, 12, %d0;
    st.global.u32 [%d1], %r2; st.global.u32 [%d1+4], %r5; st.global.u32 [%d1+8], %r6;"""
    out = np.zeros((64, 3), np.uint32)
    launch(module(body, ".param .u64 out"), out, threads=64)
    rounds = np.maximum(np.arange(64), 1)
    assert np.array_equal(out[:, 0], (rounds + 1) // 2 + 100 * (rounds // 2))
    assert (out[:, 1] == 0).all() and (out[:, 2] == 0xFFFFFFFF).all()


def test_jump_tables_and_exits() -> None:
    body = """
    ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; mad.wide.u32 %d1, %r1, 4, %d0;
    TABLE: .branchtargets A, B, C, B;
    brx.idx %r2, TABLE;
    A: st.global.u32 [%d1], 10; exit;
    B: st.global.u32 [%d1], 20; bra C;
    C: bar.sync 0; ld.global.u32 %r3, [%d1]; add.u32 %r3, %r3, 1; st.global.u32 [%d1], %r3;"""
    out = np.zeros(64, np.uint32)
    launch(module(body, ".param .u64 out"), out, threads=64)
    assert np.array_equal(out, np.tile([10, 21, 1, 21], 16))


def test_named_barriers_between_warps() -> None:
    body = """
    .shared .align 4 .b8 box[4];
    ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; mov.u32 %r2, box;
    @%p1 bra CONSUME;
    st.shared.u32 [%r2], 7; bar.arrive 3, 64; bra DONE;
    CONSUME: bar.sync 3, 64; ld.shared.u32 %r3, [box]; mad.wide.u32 %d1, %r1, 4, %d0; st.global.u32 [%d1], %r3;
    DONE: bar.sync 0;"""
    out = np.zeros(32, np.uint32)
    launch(module(body, ".param .u64 out"), out, threads=64)
    assert (out == 7).all()


def test_a_barrier_that_misses_threads_hangs() -> None:
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra X; bar.sync 1; X: bar.sync 0;"
    with pytest.raises(HangError, match="bar.sync 0.*bar.sync 1|bar.sync 1.*bar.sync 0"):
        launch(module(body, ""), threads=64)


def test_a_barrier_in_a_part_of_a_warp_is_refused() -> None:
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 bra X; bar.sync 0; bra Y; X: bar.sync 0; Y:"
    with pytest.raises(ExecutionError, match="part of the warp"):
        launch(module(body, ""))


def test_a_shuffle_waits_for_the_lanes_it_names() -> None:
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 bra X; shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;"
    body += "X: bar.sync 0;"
    with pytest.raises(HangError, match="shfl.sync"):
        launch(module(body, ""))


def test_an_endless_loop_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ptx.control.MOST_INSTRUCTIONS", 1000)
    with pytest.raises(HangError, match="in a loop"):
        launch(module("L: bra L;", ""))


def test_registers_must_be_written_first() -> None:
    with pytest.raises(AccessError, match="thread 0 reads %r2.*line 9: add"):
        launch(module("add.u32 %r1, %r2, 1;", ""))
    half = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 mov.u32 %r2, 5; add.u32 %r3, %r2, 1;"
    with pytest.raises(AccessError, match="thread 8 reads %r2"):
        launch(module(half, ""))


def test_global_memory_ends_where_its_arrays_end() -> None:
    x = np.zeros(33, np.uint32)
    body = "ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d0; {};"
    launch(module(body.format("st.global.u32 [%d1+4], %r1"), ".param .u64 out"), x)
    assert np.array_equal(x, [0, *range(32)])
    with pytest.raises(AccessError, match="thread 31 .*st.global.u32"):
        launch(module(body.format("st.global.u32 [%d1+8], %r1"), ".param .u64 out"), x)
    with pytest.raises(AccessError, match="thread 0 .*misaligned"):
        launch(module(body.format("ld.global.u32 %r2, [%d1+2]"), ".param .u64 out"), x)
    guarded = body.format("setp.lt.u32 %p1, %r1, 31; @%p1 ld.global.u32 %r2, [%d1+8]")
    launch(module(guarded, ".param .u64 out"), x)


def test_shared_memory_ends_and_starts_as_nan() -> None:
    x = np.zeros(32, np.float32)
    body = """ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d0; shl.b32 %r2, %r1, 2;
    ld.shared.f32 %f1, [%r2]; st.global.f32 [%d1], %f1;"""
    launch(module(body, ".param .u64 out"), x, shared=128)
    assert np.isnan(x).all()
    with pytest.raises(AccessError, match="thread 31 .*of the 124 bytes of shared memory"):
        launch(module(body, ".param .u64 out"), x, shared=124)


RACE = """
    ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d0;
    shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 256;
    st.shared.u32 [%r2], %r1; bar.sync 0; ld.shared.u32 %r4, [%r3]; st.global.u32 [%d1], %r4;
    bar.sync 0; st.shared.u32 [%r2], %r4;"""


@pytest.mark.parametrize("missing", ["none", "first", "second"])
def test_warps_need_a_barrier_to_share_memory(missing: str) -> None:
    out, barrier = np.zeros(128, np.uint32), "bar.sync 0;"
    head, middle, tail = RACE.split(barrier)
    first, second = ("" if missing == name else barrier for name in ("first", "second"))
    text = module(head + first + middle + second + tail, ".param .u64 out")
    if missing == "none":
        launch(text, out, threads=128)
        assert np.array_equal(out, np.arange(128) ^ 64)
        return
    place = {"first": "reads shared memory at 256", "second": "writes shared memory at 0"}[missing]
    with pytest.raises(RaceError, match=rf"thread 0 \(warp 0\) {place}, which warp 2 used"):
        launch(text, out, threads=128)
    launch(text.replace(".shared.u32", ".volatile.shared.u32"), out, threads=128)


def test_one_value_from_all_warps_is_no_race() -> None:
    body = "mov.u32 %r1, %tid.x; shr.u32 %r1, %r1, {}; st.shared.u32 [0], %r1;"
    launch(module(body.format(10), ""), threads=128)
    with pytest.raises(RaceError, match="thread 0 .*writes shared memory at 0"):
        launch(module(body.format(5), ""), threads=128)


def test_generic_addresses_find_their_memory() -> None:
    body = """
    .shared .align 8 .b8 box[256]; .local .align 8 .b8 own[8];
    ld.param.u64 %d0, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d0;
    mov.u64 %d2, box; cvta.shared.u64 %d2, %d2; mad.wide.u32 %d2, %r1, 4, %d2; st.u32 [%d2], %r1;
    mov.u64 %d3, own; cvta.local.u64 %d3, %d3; add.u32 %r2, %r1, 5; st.u32 [%d3+4], %r2;
    ld.u32 %r3, [%d2]; ld.u32 %r4, [%d3+4]; ld.local.u32 %r5, [own+4]; add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r5;
    cvta.to.shared.u64 %d4, %d2; ld.shared.u32 %r6, [%d4]; add.u32 %r3, %r3, %r6;
    st.u32 [%d1], %r3;"""
    out = np.zeros(32, np.uint32)
    launch(module(body, ".param .u64 out"), out)
    assert np.array_equal(out, 4 * np.arange(32) + 10)


def test_a_copy_lands_only_at_its_wait() -> None:
    body = """
    ld.param.u64 %d0, [out]; ld.param.u64 %d1, [in]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4;
    mad.wide.u32 %d2, %r1, 16, %d1; mad.wide.u32 %d3, %r1, 4, %d0;
    setp.lt.u32 %p1, %r1, 16; selp.b32 %r4, 16, 8, %p1;
    cp.async.cg.shared.global [%r2], [%d2], 16, %r4; cp.async.commit_group;
    cp.async.cg.shared.global [%r2+512], [%d2], 16; cp.async.commit_group;
    cp.async.wait_group {};
    ld.shared.f32 %f1, [%r2+12]; st.global.f32 [%d3], %f1;"""
    x, out = np.arange(128, dtype=np.float32).reshape(32, 4), np.zeros(32, np.float32)
    launch(module(body.format(1)), out, x)
    assert np.array_equal(out, np.where(np.arange(32) < 16, x[:, 3], 0))
    launch(module(body.format(2)), out, x)
    assert np.isnan(out).all()


TMA = """
    .shared .align 128 .b8 tile[512]; .shared .align 8 .b8 bar[8];
    ld.param.u64 %d0, [out]; mov.u64 %d1, map; cvta.param.u64 %d2, %d1;
    mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 0; mov.u32 %r2, tile; mov.u32 %r3, bar;
    mov.u32 %r4, -1; mov.u32 %r5, 2;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 256;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%d2, {%r4, %r5}], [%r3];
    W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra W;
    shl.b32 %r6, %r1, 3; add.u32 %r6, %r6, %r2; ld.shared.b64 %d4, [%r6];
    mad.wide.u32 %d5, %r1, 8, %d0; st.global.b64 [%d5], %d4;"""


def tma(text: str, swizzle: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Loads columns -1..7 and rows 2..9 of an array of 5 rows."""
    x, out = np.arange(1, 41, dtype=np.float32).reshape(5, 8), np.zeros((8, 8), np.float32)
    launch(module(text, ".param .u64 out, .param .align 64 .b8 map[128]"), out, TensorMap(x, (8, 8), swizzle))
    expected = np.zeros((8, 8), np.float32)
    expected[:3, 1:] = x[2:, :7]
    return out, expected


def test_a_tensor_copy_fills_with_zeros_outside() -> None:
    out, expected = tma(TMA)
    assert np.array_equal(out, expected)
    swizzled, _ = tma(TMA, swizzle=32)
    pieces = swizzled.reshape(16, 4)
    for piece in range(16):  # 32-byte swizzle: bit 7 of the address into bit 4
        assert np.array_equal(pieces[piece ^ (piece >> 3 & 1)], expected.reshape(16, 4)[piece])


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("expect_tx.shared::cta.b64 _, [%r3], 256", "expect_tx.shared::cta.b64 _, [%r3], 512", HangError),
        ("@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 256;", "", HangError),
        ("[%r3], 0; @!%p2", "[%r3], 0; @%p3", AccessError),
        ("@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;", "", ExecutionError),
        ("mbarrier.init.shared::cta.b64 [%r3], 1;", "mbarrier.init.shared::cta.b64 [%r3], 2;", HangError),
        ("mov.u32 %r2, tile;", "mov.u32 %r2, tile+16;", ExecutionError),
    ],
)
def test_barriers_of_tensor_copies(old: str, new: str, error: type[Exception]) -> None:
    if "tile+16" in new:
        new = "mov.u32 %r2, tile; add.u32 %r2, %r2, 16;"
    assert old in TMA
    with pytest.raises(error):
        tma(TMA.replace(old, new))


def test_a_tensor_copy_is_poison_before_its_wait() -> None:
    out, _ = tma(TMA.replace("W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra W;", ""))
    assert np.isnan(out).all()


def test_unknown_instructions_name_their_line() -> None:
    with pytest.raises(NotImplementedError, match="line 9: tcgen05.alloc"):
        launch(module("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", ""))


def test_parameters_by_value() -> None:
    text = module(
        "ld.param.u64 %d0, [out]; ld.param.f32 %f1, [a]; ld.param.s8 %r1, [b]; ld.param.v2.u32 {%r2, %r3}, [c+8];"
        "cvt.rzi.s32.f32 %r4, %f1; st.global.v4.u32 [%d0], {%r1, %r2, %r3, %r4};",
        ".param .u64 out, .param .f32 a, .param .u8 b, .param .align 8 .b8 c[16], .param .u64 x, .param .u64 y",
    )
    out = np.zeros(4, np.int32)
    args = [out.ctypes.data, -2.5, -3, np.arange(4, dtype=np.uint32).tobytes()]
    run(parse(text), (1,), args, shared_bytes=0, memory=[out], threads=1)
    assert out.tolist() == [-3, 2, 3, -2]
    with pytest.raises(ValueError, match="args must be 6 values"):
        run(parse(text), (1,), args[:3], shared_bytes=0, memory=[out], threads=1)
    with pytest.raises(ValueError, match="threads must be given"):
        run(parse(text), (1,), args, shared_bytes=0, memory=[out])
