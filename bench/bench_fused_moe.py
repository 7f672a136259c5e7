"""The routed experts of a layer: the kernels of a GPU by model, or the CPU's native operator with its statistics.

python bench/bench_fused_moe.py --model qwen3-30b-a3b,deepseek-v3 --tokens 1,16,256,4096 [--experts 64] [--repeats 20]

`moe_forward` against torch expert by expert, what transformers offers, and vLLM where it is installed. `% of floor` is
the share that the bytes and flops of cprune_kernels/cost.py need at the least. Medians by CUDA events, uniform routing,
bf16; rows go to results/fused_moe.csv. Without a GPU a sixteenth of H, I and E is run on the CPU, which shows that the
bench works, no more.

python bench/bench_fused_moe.py [--tokens 4096] [--repeats 7]

On the CPU, `moe_observe` against torch's linears, expert by expert. `linears only` is the matrix products of the
second, on inputs gathered beforehand: what the library's kernels reach. GFLOP/s counts 6 T K H I, wall time; repeats
alternate between the three; medians. Uniform routing.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import save_rows
from timing import FORWARD, MODELS, here, microseconds, names, save_csv
from torch import Tensor
from torch.nn import functional as F

from cprune_kernels import backend
from cprune_kernels.cost import floor
from cprune_kernels.fused_moe import MoEObservation, moe_forward, moe_forward_reference, moe_observe
from cprune_kernels.load import load_of
from cprune_kernels.picker import MoEShape, arch_of

SHAPES = {"bench model": (64, 8, 1024, 512), "OLMoE": (64, 8, 2048, 1024)}  # E, K, H, I


@dataclass(frozen=True)
class Layer:
    hidden: Tensor  # [T, H]
    index: Tensor  # [T, K]
    gates: Tensor  # [T, K]
    gate_up: Tensor  # [E, 2 I, H]
    down: Tensor  # [E, H, I]


def random_layer(tokens: int, experts: int, top_k: int, hidden: int, inner: int, device: str = "cpu") -> Layer:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0.0, std, generator=generator)

    gates, index = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k)
    return Layer(
        normal(tokens, hidden),
        index,
        gates.softmax(-1),
        normal(experts, 2 * inner, hidden, std=hidden**-0.5),
        normal(experts, hidden, inner, std=inner**-0.5),
    )


def mlp(layer: Layer, expert: int, x: Tensor) -> Tensor:
    gate, up = F.linear(x, layer.gate_up[expert]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down[expert])


def by_expert(layer: Layer) -> MoEObservation:
    """The same numbers with torch operations, statistics from the outputs in bf16."""
    experts, width = layer.down.shape[:2]
    out, norms = torch.zeros(layer.hidden.shape), torch.zeros(layer.index.shape)
    high, low, sums = torch.full((experts,), -torch.inf), torch.full((experts,), torch.inf), torch.zeros(experts, width)
    pairs = torch.argsort(layer.index.flatten(), stable=True)
    counts = torch.bincount(layer.index.flatten(), minlength=experts).tolist()
    for expert, pair in enumerate(pairs.split(counts)):
        if not len(pair):
            continue
        token, slot = pair // layer.index.shape[1], pair % layer.index.shape[1]
        y = mlp(layer, expert, layer.hidden[token]).float()
        norms[token, slot] = torch.linalg.vector_norm(y, dim=1)
        low[expert], high[expert] = y.aminmax()
        sums[expert] = y.sum(0)
        out.index_add_(0, token, y.mul_(layer.gates[token, slot].unsqueeze(1)))
    return MoEObservation(out, norms, high, low, sums)


def linears(layer: Layer) -> Callable[[], None]:
    inputs = [layer.hidden[(layer.index == e).nonzero()[:, 0]] for e in range(len(layer.down))]
    inner = [x.new_ones(len(x), layer.down.shape[2]) for x in inputs]

    def run() -> None:
        for expert, (x, h) in enumerate(zip(inputs, inner, strict=True)):
            F.linear(x, layer.gate_up[expert]), F.linear(h, layer.down[expert])

    return run


def check(got: MoEObservation, expected: MoEObservation) -> None:
    """No timing of a kernel that is wrong: the two differ by the rounding of bf16 alone."""
    for name, value in expected._asdict().items():
        seen = value.isfinite()  # not the extremes of an expert without tokens
        error = (getattr(got, name) - value)[seen].abs().max() / value[seen].abs().max()
        assert error < 2.0**-5, (name, float(error))


def combined_by_expert(layer: Layer) -> Tensor:
    """The layer in torch operations, expert by expert; an expert's rows are found without the host."""
    out = torch.zeros(layer.hidden.shape, device=layer.hidden.device)
    for expert in range(len(layer.down)):
        token, slot = (layer.index == expert).nonzero(as_tuple=True)
        y = mlp(layer, expert, layer.hidden[token]).float()
        out.index_add_(0, token, y.mul_(layer.gates[token, slot].unsqueeze(1)))
    return out.to(layer.hidden.dtype)


def alternatives(layer: Layer) -> dict[str, Callable[[], Tensor]]:
    """What else computes the layer here."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    count, hidden, inner = layer.down.shape
    with torch.device("meta"):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=count, hidden_size=hidden, moe_intermediate_size=inner))
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(layer.gate_up), torch.nn.Parameter(layer.down)
    given = experts, layer.hidden, layer.index, layer.gates.to(layer.hidden.dtype)
    ways: dict[str, Callable[[], Tensor]] = {"torch by expert": lambda: combined_by_expert(layer)}
    ways["transformers grouped_mm"] = lambda: ALL_EXPERTS_FUNCTIONS["grouped_mm"](*given)
    if layer.index.numel() <= 128:  # gathers the weights of every pair
        ways["transformers batched_mm"] = lambda: ALL_EXPERTS_FUNCTIONS["batched_mm"](*given)
    if layer.hidden.is_cuda and importlib.util.find_spec("vllm"):
        from vllm.model_executor.layers.fused_moe import fused_experts

        gates, index = layer.gates.float(), layer.index.int()
        ways["vLLM"] = lambda: fused_experts(layer.hidden, layer.gate_up, layer.down, gates, index)
    return ways


def close(got: Tensor, expected: Tensor) -> bool:
    """Equal but for the roundings of bf16: of the gates, activations, outputs and sums."""
    return bool((got.float() - expected.float()).abs().max() <= 2.0**-5 * expected.float().abs().max())


def model_row(model: str, experts: int | None, tokens: int, repeats: int) -> dict[str, object]:
    cuda = torch.cuda.is_available()
    known = MODELS[model]
    count, top_k, hidden, inner = known.experts, known.top_k, known.hidden, known.inner
    if not cuda:
        count, hidden, inner = max(4, count // 16), hidden // 16, inner // 16
        top_k = min(top_k, count)
    count = count if experts is None else min(count, max(experts, top_k))
    layer = random_layer(tokens, count, top_k, hidden, inner, "cuda" if cuda else "cpu")
    device = layer.hidden.device
    tensors = layer.hidden, layer.index, layer.gates, layer.gate_up, layer.down
    expected = moe_forward_reference(*tensors)
    if not close(moe_forward(*tensors), expected):
        raise SystemExit(f"moe_forward is wrong for {model} with {tokens} tokens; nothing was timed")
    ours = microseconds(lambda: moe_forward(*tensors), repeats, device)
    others = {
        way: microseconds(run, repeats, device) for way, run in alternatives(layer).items() if close(run(), expected)
    }
    best = min(others, key=others.__getitem__)
    row: dict[str, object] = {"model": model, "E": count, "T": tokens, "us": round(ours, 2)}
    flops = 6 * tokens * top_k * hidden * inner
    row["TFLOP/s"] = round(flops / ours / 1e6, 3)
    touched = torch.bincount(layer.index.flatten(), minlength=count)
    rows = 2 * tokens * top_k * (hidden + inner) + 2 * tokens * hidden
    moved = 2 * (int((touched > 0).sum()) * 3 * hidden * inner + rows)
    row["GB/s"] = round(moved / ours / 1e3, 3)
    row["% of floor"] = ""
    if cuda:
        arch, shape = arch_of(device), MoEShape(count, top_k, hidden, inner, torch.bfloat16)
        least = floor(shape, tokens, arch, load_of(touched.tolist()))
        row["% of floor"] = round(100 * least.seconds * 1e6 / ours, 2)
    row["x best alternative"], row["best alternative"] = round(others[best] / ours, 2), best
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(FORWARD) if torch.cuda.is_available() else "")
    parser.add_argument("--tokens", default="")
    parser.add_argument("--experts", type=int, help="of each layer: fewer than the model has, as after pruning")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    models = names(parser, "--model", args.model, FORWARD)
    tokens = [int(count) for count in (args.tokens or ("1,16,256,4096" if models else "4096")).split(",")]
    if not models:
        for count in tokens:
            observe_rows(count, args.repeats)
        return
    here("small layers on the CPU")
    save_csv("fused_moe", [model_row(model, args.experts, count, args.repeats) for model in models for count in tokens])


def observe_rows(tokens: int, repeats: int) -> None:
    rows = []
    for name, (experts, top_k, hidden, inner) in SHAPES.items():
        layer = random_layer(tokens, experts, top_k, hidden, inner)
        tensors = (layer.hidden, layer.index, layer.gates, layer.gate_up, layer.down)
        check(moe_observe(*tensors), by_expert(layer))
        ways: dict[str, Callable[[], object]] = {
            f"moe_observe ({backend()})": lambda tensors=tensors: moe_observe(*tensors),
            "torch by expert": lambda layer=layer: by_expert(layer),
            "linears only": linears(layer),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if repeat:  # the first compiles and warms
                    seconds[way].append(time.perf_counter() - start)
        flop = 6 * tokens * top_k * hidden * inner
        first = statistics.median(next(iter(seconds.values())))
        for way, taken in seconds.items():
            median = statistics.median(taken)
            rows.append(
                {
                    "shape": name,
                    "E, K, H, I": f"{experts}, {top_k}, {hidden}, {inner}",
                    "T": tokens,
                    "threads": torch.get_num_threads(),
                    "what": way,
                    "ms": median * 1e3,
                    "GFLOP/s": flop / median / 1e9,
                    "x native": median / first,
                }
            )
    save_rows("fused_moe", rows)


if __name__ == "__main__":
    main()
