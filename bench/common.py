"""What the benches share: a random checkpoint of a given shape, a measured subprocess, and rows on disk."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).resolve().parent / "results"
CPU_SHAPES = {  # E, K, H, I of layers that a CPU serves
    "OLMoE": (64, 8, 2048, 1024),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Qwen3-30B-A3B half": (64, 8, 2048, 768),
    "DeepSeek-V2-Lite": (64, 6, 2048, 1408),
    "Mixtral quarter": (8, 2, 2048, 7168),
}


@dataclass(frozen=True)
class Shape:
    """A random Qwen3-MoE."""

    layers: int = 12
    experts: int = 64
    top_k: int = 8
    hidden: int = 1024  # H
    intermediate: int = 512  # I, of an expert
    heads: int = 16
    kv_heads: int = 8
    vocab: int = 4096
    shards: int = 13


def write_random_qwen3_moe(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """A checkpoint in hub layout, bf16, one shard in memory at a time; reused where it is already there."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * std).bfloat16()

    h, i, head = shape.hidden, shape.intermediate, shape.hidden // shape.heads
    weight_map: dict[str, str] = {}
    total = 0

    def save(number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05d}-of-{shape.layers + 1:05d}.safetensors"
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.self_attn.q_proj.weight": normal(shape.heads * head, h),
            f"{prefix}.self_attn.k_proj.weight": normal(shape.kv_heads * head, h),
            f"{prefix}.self_attn.v_proj.weight": normal(shape.kv_heads * head, h),
            f"{prefix}.self_attn.o_proj.weight": normal(h, shape.heads * head),
            f"{prefix}.self_attn.q_norm.weight": torch.ones(head).bfloat16(),
            f"{prefix}.self_attn.k_norm.weight": torch.ones(head).bfloat16(),
            f"{prefix}.input_layernorm.weight": torch.ones(h).bfloat16(),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(h).bfloat16(),
            f"{prefix}.mlp.gate.weight": normal(shape.experts, h, std=0.05),
        }
        for expert in range(shape.experts):
            for name, size in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i))):
                tensors[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = normal(*size)
        save(layer + 1, tensors)
    save(
        shape.layers + 1,
        {
            "model.embed_tokens.weight": normal(shape.vocab, h, std=1.0),
            "model.norm.weight": torch.ones(h).bfloat16(),
            "lm_head.weight": normal(shape.vocab, h),
        },
    )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": h,
        "intermediate_size": 3 * h,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "moe_intermediate_size": i,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
    }
    tokenizer = ROOT / "examples" / "tiny-moe"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: marks the checkpoint as whole
    return folder


@dataclass(frozen=True)
class Measured:
    """A subprocess that ended well."""

    seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str | os.PathLike[str]]) -> Measured:
    """Run a command with this interpreter's environment; wall seconds and peak resident set.

    What others have left to be written to disk is written before, so that it is nobody's seconds.
    """
    os.sync()
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{output[-4000:]}")
    return Measured(seconds, usage.ru_maxrss * 1024, output)


def python(*arguments: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    return [sys.executable, *arguments]


def machine() -> dict[str, str]:
    """Where and when rows were measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    return {
        "date": date.today().isoformat(),
        "cpu": f"{model}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
    }


def save_rows(name: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Keep the rows of a bench, with the machine and the date, in results/NAME.json, and print them as a table."""
    rows = [dict(row) for row in rows]
    keep_rows(name, rows)
    print_rows(rows)


def keep_rows(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    ROWS.mkdir(exist_ok=True)
    (ROWS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *([_cell(row.get(key, "")) for key in columns] for row in rows)]
    widths = [max(len(line[place]) for line in table) for place in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
