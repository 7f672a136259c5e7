"""CUDA C++ through `nvcc -ptx`: divergent threads, barriers, votes, shuffles, atomics, mathematical functions."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.ptx.executor import AccessError, HangError, Stats, parse, run

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

SOURCE = r"""
__constant__ int weights[5] = {3, -1, 4, 1, -5};
__device__ unsigned int total;

extern "C" __global__ void collatz(const int* x, int* steps, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int count = 0;
  for (long long v = x[i]; v != 1; ++count) {
    if (v % 2) v = 3 * v + 1; else v /= 2;
    if (count == 200) break;
  }
  steps[i] = count;
}

extern "C" __global__ void histogram(const int* x, unsigned int* out, int n) {
  __shared__ unsigned int bins[16];
  extern __shared__ int values[];
  int t = threadIdx.x;
  if (t < 16) bins[t] = 0;
  values[t] = t < n ? x[t] : -1;
  __syncthreads();
  int v = values[blockDim.x - 1 - t];
  if (v >= 0) {
    if (v & 1) atomicAdd(&bins[v & 15], 1u); else atomicAdd(&bins[v & 15], 2u);
  }
  __syncthreads();
  if (t < 16) out[t] = bins[t];
}

extern "C" __global__ void warp(const int* x, unsigned int* out) {
  int t = threadIdx.x, v = x[t];
  unsigned int lane = t & 31, ballot = __ballot_sync(~0u, v > 0), active = 0;
  if (v & 1) active = __activemask(); else active = __ballot_sync(__activemask(), v & 2);
  int up = __shfl_up_sync(~0u, v, 3), down = __shfl_down_sync(~0u, v, 5, 16);
  int other = __shfl_xor_sync(~0u, v, 9), third = __shfl_sync(~0u, v, (lane * 7) & 31);
  unsigned int* o = out + 10 * t;
  o[0] = ballot; o[1] = active; o[2] = up; o[3] = down; o[4] = other; o[5] = third;
  o[6] = __any_sync(~0u, v == 5) * 2 + __all_sync(~0u, v < 100);
  o[7] = __match_any_sync(~0u, v & 3);
  o[8] = __reduce_add_sync(~0u, v);
  o[9] = __syncthreads_count(v > 0) * 100 + __syncthreads_or(v == 5) * 10 + __syncthreads_and(v < 100);
}

extern "C" __global__ void scan(const float* x, float* out) {
  __shared__ float sums[32];
  int t = threadIdx.x, lane = t % 32, w = t / 32;
  float v = x[t];
  for (int d = 1; d < 32; d *= 2) { float u = __shfl_up_sync(~0u, v, d); if (lane >= d) v += u; }
  if (lane == 31) sums[w] = v;
  __syncthreads();
  if (w == 0) {
    float s = lane < blockDim.x / 32 ? sums[lane] : 0;
    for (int d = 1; d < 32; d *= 2) { float u = __shfl_up_sync(~0u, s, d); if (lane >= d) s += u; }
    sums[lane] = s;
  }
  __syncthreads();
  out[t] = v + (w ? sums[w - 1] : 0.f);
}

extern "C" __global__ void integers(const int* x, const int* y, int* out) {
  int i = threadIdx.x, a = x[i], b = y[i];
  unsigned int u = a;
  int* o = out + 12 * i;
  o[0] = b ? a / b : 7; o[1] = b ? a % b : 7; o[2] = __popc(a); o[3] = __clz(a); o[4] = __ffs(a); o[5] = __brev(a);
  o[6] = __mulhi(a, b); o[7] = __funnelshift_l(a, b, 11); o[8] = __byte_perm(a, b, 0x3715);
  o[9] = (int)(((long long)a * b) >> 7); o[10] = (int)((unsigned long long)u * u % 1000003ull);
  o[11] = min(max(a, -1000), 1000) + abs(b) + (a << (b & 31)) + (a >> 3) + (int)(u >> 5);
}

extern "C" __global__ void floats(const float* x, float* out, double* wide) {
  int i = threadIdx.x;
  float v = x[i];
  float* o = out + 12 * i;
  o[0] = expf(v); o[1] = logf(fabsf(v) + 1); o[2] = sinf(v); o[3] = tanhf(v);
  o[4] = rsqrtf(fabsf(v) + 1); o[5] = v / 3.f;
  o[6] = floorf(v) + rintf(v) + truncf(v) + ceilf(v); o[7] = powf(fabsf(v), 1.3f);
  o[8] = fminf(v, 0.5f) + fmaxf(v, -0.5f);
  o[9] = __float2int_rn(v) + (float)(unsigned char)(int)fabsf(v); o[10] = fmaf(v, v, -v); o[11] = erff(v);
  wide[i] = exp((double)v) / 3.0 + sqrt(fabs((double)v));
}

extern "C" __global__ void choose(const int* x, int* out) {
  int i = threadIdx.x, local[8], sum = 0;
  for (int j = 0; j < 8; ++j) local[j] = i * j + x[i];
  switch (x[i]) {
    case 0: sum = i * 3; break;
    case 1: sum = local[i & 7]; break;
    case 2: sum = weights[i % 5]; break;
    case 3: for (int j = 0; j <= i % 8; ++j) sum += local[j]; break;
    case 4: sum = -i; break;
    case 5: sum = i ^ 77; break;
    default: sum = -1;
  }
  out[i] = sum;
}

extern "C" __global__ void atomics(int* o, unsigned long long* wide, float* f, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&o[0], i); atomicMax(&o[1], i * 7 % 101); atomicMin(&o[2], -i); atomicOr(&o[3], 1 << (i & 31));
  atomicAnd(&o[4], ~(1 << (i & 7))); atomicXor(&o[5], i); atomicInc((unsigned int*)&o[6], 9);
  int old = atomicCAS(&o[7], 0, i + 1);
  if (old == 0) o[8] = i;
  o[9 + atomicAdd(&total, 1u)] = 1;
  atomicAdd(&wide[0], 1ull << 33); atomicAdd(&f[0], 0.5f); atomicMax(&wide[1], (unsigned long long)i << 40);
}

extern "C" __global__ void transpose(const float* x, float* out, int rows, int columns) {
  __shared__ float tile[8][9];
  int c = blockIdx.x * 8 + threadIdx.x, r = blockIdx.y * 8 + threadIdx.y;
  if (r < rows && c < columns) tile[threadIdx.y][threadIdx.x] = x[r * columns + c];
  __syncthreads();
  c = blockIdx.x * 8 + threadIdx.y; r = blockIdx.y * 8 + threadIdx.x;
  if (r < rows && c < columns) out[c * rows + r] = tile[threadIdx.x][threadIdx.y];
}

extern "C" __global__ void missing_barrier(int* out) {
  if (threadIdx.x < 64) { __syncthreads(); out[0] = 1; }
  else { asm volatile("bar.sync 1, 128;"); out[1] = 1; }
}

extern "C" __global__ void out_of_bounds(const int* x, int* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }
"""


@pytest.fixture(scope="module", params=[80, 90])
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("nvcc")
    (folder / "kernels.cu").write_text(SOURCE)
    command = ["nvcc", "-ptx", f"-arch=sm_{request.param}", "kernels.cu", "-o", "kernels.ptx"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "kernels.ptx").read_text()


def launch(
    ptx: str, name: str, grid: tuple[int, ...], threads: int | tuple[int, ...], *args: object, shared: int = 0
) -> Stats:
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in args]
    return run(parse(ptx, name), grid, values, shared_bytes=shared, memory=arrays, threads=threads)  # type: ignore[arg-type]


def integers(count: int, low: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, count).astype(np.int32)


def test_loops_of_different_lengths(ptx: str) -> None:
    x = integers(300, 1, 5000)
    steps = np.full(300, -1, np.int32)
    launch(ptx, "collatz", (3,), 128, x, steps, 300)
    for start, count in zip(x.tolist(), steps, strict=True):
        expected = 0
        while start != 1 and expected < 200:
            start, expected = (3 * start + 1 if start % 2 else start // 2), expected + 1
        assert count == expected


def test_shared_histogram(ptx: str) -> None:
    x = integers(100, 0, 40)
    out = np.zeros(16, np.uint32)
    launch(ptx, "histogram", (1,), 128, x, out, 100, shared=4 * 128)
    expected = np.zeros(16, np.uint32)
    for v in x:
        expected[v & 15] += 1 if v & 1 else 2
    assert np.array_equal(out, expected)


def bits(flags: np.ndarray) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def test_warp_functions(ptx: str) -> None:
    x = integers(96, -20, 20)
    out = np.zeros((96, 10), np.uint32)
    launch(ptx, "warp", (1,), 96, x, out)
    signed = out.view(np.int32)
    for t in range(96):
        warp, lane, v = x[t // 32 * 32 : t // 32 * 32 + 32], t % 32, x[t]
        assert out[t, 0] == bits(warp > 0)
        assert out[t, 1] == (bits(warp & 1) if v & 1 else bits((warp & 1 == 0) & (warp & 2 != 0)))
        assert signed[t, 2] == (warp[lane - 3] if lane >= 3 else v)
        assert signed[t, 3] == (warp[lane + 5] if lane % 16 + 5 < 16 else v)
        assert signed[t, 4] == warp[lane ^ 9] and signed[t, 5] == warp[lane * 7 % 32]
        assert out[t, 6] == 2 * (warp == 5).any() + 1
        assert out[t, 7] == bits(warp & 3 == v & 3)
        assert signed[t, 8] == warp.sum()
        assert out[t, 9] == 100 * (x > 0).sum() + 10 * (x == 5).any() + 1


def test_block_scan(ptx: str) -> None:
    x = np.random.default_rng(0).integers(-8, 8, 256).astype(np.float32)
    out = np.empty_like(x)
    launch(ptx, "scan", (1,), 256, x, out)
    assert np.array_equal(out, np.cumsum(x))


def test_integer_arithmetic(ptx: str) -> None:
    x = np.r_[integers(120, -(2**31), 2**31 - 1), [0, 1, -1, -(2**31), 2**31 - 1, 16, 5, -7]].astype(np.int32)
    y = np.r_[integers(60, -(2**31), 2**31 - 1, 1), integers(60, -9, 9, 2), [0, 3, 5, 7, -3, 1, -2, 2]].astype(np.int32)
    out = np.zeros((128, 12), np.int32)
    launch(ptx, "integers", (1,), 128, x, y, out)
    for a, b, got in zip(x.tolist(), y.tolist(), out, strict=True):
        assert got.tolist() == [wrapped(v) for v in reference(a, b)], (a, b)


def wrapped(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def reference(a: int, b: int) -> list[int]:
    ua, ub = a % 2**32, b % 2**32
    quotient = (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else 7
    source = [ua >> 8 * i & 255 for i in range(4)] + [ub >> 8 * i & 255 for i in range(4)]
    return [
        quotient,
        a - quotient * b if b else 7,
        ua.bit_count(),
        32 - ua.bit_length(),
        (ua & -ua).bit_length(),
        int(f"{ua:032b}"[::-1], 2),
        a * b >> 32,
        ((ub << 32 | ua) << 11) >> 32,
        source[5] | source[1] << 8 | source[7] << 16 | source[3] << 24,
        a * b >> 7,
        ua * ua % 1000003,
        min(max(a, -1000), 1000) + abs(b) + (a << (ub & 31)) + (a >> 3) + (ua >> 5),
    ]


def test_float_functions(ptx: str) -> None:
    x = np.r_[np.random.default_rng(0).normal(0, 3, 60), [0.0, 0.5, -2.5, 1e-6]].astype(np.float32)
    out, wide = np.empty((64, 12), np.float32), np.empty(64)
    launch(ptx, "floats", (1,), 64, x, out, wide)
    v = x.astype(np.float64)
    erf = np.vectorize(math.erf)(v)
    expected = [
        np.exp(v),
        np.log(np.abs(v) + 1),
        np.sin(v),
        np.tanh(v),
        1 / np.sqrt(np.abs(v) + 1),
        v / 3,
        np.floor(v) + np.rint(v) + np.trunc(v) + np.ceil(v),
        np.abs(v) ** np.float32(1.3),
        np.minimum(v, 0.5) + np.maximum(v, -0.5),
        np.rint(v) + np.floor(np.abs(v)),
        v * v - v,
        erf,
    ]
    # CUDA documents at most 8 units in the last place for these functions; the sums add two roundings.
    assert np.allclose(out, np.stack(expected, axis=1), rtol=10 * 2.0**-23, atol=2.0**-22)
    assert np.allclose(wide, np.exp(v) / 3 + np.sqrt(np.abs(v)), rtol=4 * 2.0**-52)


def test_switch_and_local_memory(ptx: str) -> None:
    x, out = integers(64, 0, 8), np.zeros(64, np.int32)
    launch(ptx, "choose", (1,), 64, x, out)
    weights = [3, -1, 4, 1, -5]
    for i, (v, got) in enumerate(zip(x.tolist(), out, strict=True)):
        cases = [i * 3, i * (i & 7) + v, weights[i % 5], sum(i * j + v for j in range(i % 8 + 1)), -i, i ^ 77, -1, -1]
        assert got == cases[v]


def test_atomics(ptx: str) -> None:
    o, wide, f = np.zeros(209, np.int32), np.zeros(2, np.uint64), np.zeros(1, np.float32)
    o[4] = 0xFFF
    launch(ptx, "atomics", (2,), 100, o, wide, f, 0)
    i = np.arange(200)
    assert o[:9].tolist() == [i.sum(), 100, -199, -1, 0xF00, np.bitwise_xor.reduce(i), 0, 1, 0]
    assert o[9:].all() and wide.tolist() == [200 << 33, 199 << 40] and f[0] == 100


def test_blocks_of_two_dimensions(ptx: str) -> None:
    x = np.arange(13 * 20, dtype=np.float32).reshape(13, 20)
    out = np.zeros((20, 13), np.float32)
    stats = launch(ptx, "transpose", (3, 2), (8, 8), x, out, 13, 20)
    assert np.array_equal(out, x.T)
    assert (
        stats.distinct_read == (x.nbytes, 0)
        and stats.distinct_written == (0, out.nbytes)
        and stats.read_bytes == x.nbytes
    )


def test_a_barrier_that_cannot_complete_hangs(ptx: str) -> None:
    with pytest.raises(HangError, match="bar.sync 1"):
        launch(ptx, "missing_barrier", (1,), 128, np.zeros(2, np.int32))


def test_one_element_too_far_is_an_error(ptx: str) -> None:
    with pytest.raises(AccessError, match="thread 31 .*ld.global"):
        launch(ptx, "out_of_bounds", (1,), 32, np.zeros(32, np.int32), np.zeros(32, np.int32))
