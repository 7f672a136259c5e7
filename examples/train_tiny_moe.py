"""Train the tiny Mixture of Experts of the examples: Qwen3-MoE format, 4 layers x 32 experts, top-4, 3.6 M parameters.

    python collect_texts.py --sources DIR --corpus CORPUS --examples texts --general GENERAL
    python train_tiny_moe.py --corpus CORPUS --val texts --out tiny-moe

CORPUS holds one `<domain>.txt` for each domain, its documents separated by form feeds; `collect_texts.py` says where
each comes from (this Python's standard library and a handful of freely licensed packages) and keeps the calibration and
validation texts out of it. Every row of every batch draws its domain at random, and a load-balance loss in each layer
keeps all experts in use, so the experts divide the domains among themselves. Less than thirty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

logger = logging.getLogger("train_tiny_moe")

EOS = "<|endoftext|>"
# The keys that transformers 4.5x, transformers 5 and the inference engines all read.
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,
}
# (sequences, length) of successive batches: 2048 tokens each, mostly short, every length up to the model's longest.
BATCH_SHAPES = ((8, 256), (8, 256), (2, 1024), (8, 256), (8, 256), (1, 2048))
WARMUP_STEPS, WEIGHT_DECAY, CLIP = 100, 0.1, 1.0


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over the layers of E x sum(share of tokens x mean probability) (Switch Transformer, eq. 4); 1 when even."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)  # [T, E]
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0 / top_k)
        losses.append(logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def read_corpus(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="utf-8").split("\f") for path in sorted(folder.glob("*.txt"))}


def read_validation(folder: Path) -> dict[str, list[str]]:
    return {
        path.name.split(".")[0]: [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        for path in sorted(folder.glob("*.val.jsonl"))
    }


def train_tokenizer(corpus: dict[str, list[str]], out: Path) -> None:
    """A byte-level BPE, trained on the same share of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample = [text for texts in corpus.values() for text in "\f".join(texts)[:1_000_000].split("\f")]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG["max_position_embeddings"],
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_model(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """The weights as they are named on the hub: one tensor for each projection of each expert, bfloat16."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(w.chunk(2) for w in tensor):
                tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        elif name != "lm_head.weight":  # tied to the embedding
            tensors[name] = tensor
    tensors = {name: tensor.to(torch.bfloat16).clone() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors.tmp", metadata={"format": "pt"})
    (out / "model.safetensors.tmp").rename(out / "model.safetensors")


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear to the peak, then a cosine to 2 % of it; `progress` in [0, 1]."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3MoeForCausalLM, streams: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """AdamW with a cosine rate on random windows of the domains' token streams."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    domains = list(streams)
    started, shown = time.monotonic(), 0.0
    for step in range(args.steps):
        seconds = time.monotonic() - started
        progress = max(step / args.steps, seconds / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args.lr)
        B, S = BATCH_SHAPES[step % len(BATCH_SHAPES)]
        rows = []
        for domain in torch.randint(len(domains), (B,), generator=generator).tolist():
            stream = streams[domains[domain]]
            start = int(torch.randint(len(stream) - S, (1,), generator=generator))
            rows.append(stream[start : start + S + 1])
        batch = torch.stack(rows)
        output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, CONFIG["num_experts_per_tok"])
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 100 == 0:
            logger.info(
                "step %d  %.0f s  %.0f %%  loss %.3f  balance %.2f",
                step,
                seconds,
                100 * progress,
                shown,
                balance.item(),
            )
        if step % 250 == 249:
            save_model(model, args.out)
    logger.info("%d steps in %.0f s, loss %.3f", step + 1, time.monotonic() - started, shown)
    save_model(model, args.out)


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, documents: list[list[int]]) -> float:
    """Token-weighted, each document on its own after the end-of-text token, at most the model's length of it."""
    total, count = 0.0, 0
    for ids in documents:
        x = torch.tensor([ids[: CONFIG["max_position_embeddings"]]])
        total += F.cross_entropy(model(input_ids=x).logits[0, :-1].float(), x[0, 1:], reduction="sum").item()
        count += x.shape[1] - 1
    return math.exp(total / count)


def unigram_perplexity(stream: torch.Tensor, documents: list[list[int]]) -> float:
    """Of the domain's own token frequencies, add-one smoothed: the strongest model without context."""
    counts = torch.bincount(stream, minlength=CONFIG["vocab_size"]).double() + 1
    ids = torch.tensor([token for document in documents for token in document[1:]])
    return math.exp(-(counts / counts.sum()).log()[ids].mean().item())


def report(out: Path, streams: dict[str, torch.Tensor], validation: dict[str, list[str]]) -> None:
    """Perplexity of the saved model, read back as any user would, beside the unigram model's."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    logger.info("| domain | unigram | this model |\n|---|---|---|")
    for domain, texts in validation.items():
        documents = [[tokenizer.eos_token_id, *tokenizer.encode(text)] for text in texts]
        unigram = unigram_perplexity(streams[domain], documents)
        logger.info("| %s | %.1f | %.2f |", domain, unigram, perplexity(model, documents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of <domain>.txt")
    parser.add_argument("--val", type=Path, required=True, help="folder of <domain>.val.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000, help="of 2048 tokens")
    parser.add_argument(
        "--minutes", type=float, default=28, help="the rate decays by this limit where it is met before --steps"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balance loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.corpus)
    train_tokenizer(corpus, args.out)
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    (args.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    streams = {}
    for domain, texts in corpus.items():
        ids = [token for row in tokenizer(texts)["input_ids"] for token in (tokenizer.eos_token_id, *row)]
        streams[domain] = torch.tensor(ids)
        logger.info("%s: %d tokens, %.2f bytes each", domain, len(ids), sum(len(t.encode()) for t in texts) / len(ids))
    model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(args.out)).float().train()
    model.set_experts_implementation("grouped_mm")
    logger.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    train(model, streams, args)
    report(args.out, streams, read_validation(args.val))


if __name__ == "__main__":
    main()
