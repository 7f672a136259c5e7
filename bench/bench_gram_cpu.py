"""The Gram of a layer's experts on a CPU against reading them once and against torch's product.

python bench/bench_gram_cpu.py [--experts 64] [--columns 6291456] [--dtypes bfloat16,float16,float32] [--repeats 9]

`x read` is the time of one read of x (a sum over its words) over ours, `x torch` that of torch's float32 product of as
long windows of columns as ours sums in float32. `products ms` is what the E (E + 1) P flops of all pairs take at the
rate of a GEMM of torch (2048 cubed, in bf16 for bf16 and in float32 for the others), and `x read at floor` what
`x read` would be if ours took no more than that and the read, whichever is longer. All are timed in turn, in changing
order; medians. Nothing is timed unless a slice agrees with float64. Rows go to results/gram_cpu-I.json, for our
instructions I. By default the shape of an OLMoE layer.
"""

from __future__ import annotations

import argparse

import torch
from bench_pairwise import check, library_windows
from common import save_rows
from timing import medians

from cprune_kernels import backend
from cprune_kernels.pairwise import CHAIN, pairwise_gram

SECONDS = 20.0  # for the repeats of a row
SIDE = 2048  # of the GEMM


def row_of(experts: int, columns: int, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    x = torch.randn(experts, columns, dtype=dtype, generator=torch.Generator().manual_seed(0))
    part = x[:, :CHAIN].contiguous()
    tolerance = CHAIN * torch.finfo(torch.float32).eps / 8
    check(f"pairwise_gram in {dtype}", pairwise_gram(part), part.double() @ part.double().T, tolerance)
    words = x.view(torch.int64)
    square = torch.randn(SIDE, SIDE, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    ways = {"ours": lambda: pairwise_gram(x), "read": words.sum, "torch": lambda: library_windows(x)}
    times = medians(ways | {"GEMM": lambda: square @ square}, repeats, SECONDS)
    gemm = 2 * SIDE**3 / times.pop("GEMM")
    products = experts * (experts + 1) * columns / gemm
    row: dict[str, object] = {"E": experts, "P": columns, "dtype": str(dtype).removeprefix("torch.")}
    row |= {"x read": times["read"] / times["ours"], "x read at floor": min(1.0, times["read"] / products)}
    row |= {"x torch": times["torch"] / times["ours"]}
    row |= {f"{way} ms": seconds * 1e3 for way, seconds in times.items()}
    row |= {f"{way} GB/s": x.nbytes / times[way] / 1e9 for way in ("ours", "read")}
    row |= {"products ms": products * 1e3, "GEMM GFLOP/s": gemm / 1e9}
    return row | {"instructions": backend(), "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--columns", type=int, default=3 * 2048 * 1024, help="a multiple of 4")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    save_rows(f"gram_cpu-{backend()}", [row_of(args.experts, args.columns, dtype, args.repeats) for dtype in dtypes])


if __name__ == "__main__":
    main()
