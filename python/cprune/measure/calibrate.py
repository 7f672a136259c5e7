"""One pass of the calibration text through the model, layer by layer: checkpoint + sequences -> ExpertStats per layer.

Routing is the model's own, read where it calls its experts; only routed (token, expert) pairs are computed. The one
exception is a bounded sample of tokens and of sequence means on which every expert of the layer is evaluated, for the
similarities of outputs and for the published algorithm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from cprune import hf
from cprune.checkpoint import Checkpoint, MoELayer
from cprune.checkpoint.scan import all_finite, check_finite
from cprune.config import PruneConfig
from cprune.errors import CpruneError
from cprune.measure.packing import Sequences
from cprune.measure.similarity import unit_signatures, weight_grams
from cprune.stats import ExpertStats
from cprune.stream import Batch, StreamedModel, counted, embed_all, resolve_dtype
from cprune_kernels.fused_moe import MoEObservation
from cprune_kernels.pairwise import pairwise_cka, pairwise_gram
from cprune_kernels.stats import ExpertSums, expert_statistics

log = logging.getLogger(__name__)

TURNING_ROWS = 256  # hidden states compared at a time, so that they stay in the cache


class LayerRecorder:
    """Watches the experts of one layer while batches pass through it (an `hf.Observer`); sums in float64."""

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        sample: torch.Tensor,
        sequences: torch.Tensor,
        seq_len: int,
        domains: torch.Tensor,
    ) -> None:
        """
        Args:
            sample: [S] int64, ascending: positions (sequence x seq_len + offset) whose expert inputs are kept.
            sequences: [Q] int64, ascending: sequences whose mean expert input is kept.
            domains: [N] int64: the number of each sequence's domain, from 0.
        """
        self.num_experts, self.seq_len = num_experts, seq_len
        self.sample, self.sequences, self.domains = sample, sequences, domains
        self.tokens = 0
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)  # noqa: E731
        self.gate_sum, self.gated_norm_sum, self.gated_sq_sum = (zeros(num_experts) for _ in range(3))
        self.relative_sum, self.norm_sum, self.norm_sq_sum = (zeros(num_experts) for _ in range(3))
        self.turning_sum = zeros(num_experts)
        num_domains = int(domains.max()) + 1
        self.domain_tokens = torch.zeros(num_domains, dtype=torch.int64)
        self.domain_gated_sum = zeros(num_domains, num_experts)
        self.norm_max, self.absmax, self.output_sum = zeros(num_experts), zeros(num_experts), zeros(num_experts, hidden)
        self.max = torch.full((num_experts,), -torch.inf, dtype=torch.float64)
        self.count = torch.zeros(num_experts, dtype=torch.int64)
        self.coactivation = torch.zeros(num_experts, num_experts, dtype=torch.int64)
        self.sample_inputs: list[torch.Tensor] = []  # [*, H] each
        self.sample_routing: list[tuple[torch.Tensor, torch.Tensor]] = []  # experts and gates, [*, K] each
        self.sequence_inputs: list[torch.Tensor] = []  # [*, H] each

    def begin(self, first_sequence: int, mask: torch.Tensor) -> None:
        """The next batch: its first sequence's number, and mask [B, S] bool of the tokens that count."""
        self._first, self._mask = first_sequence, mask

    def on_input(self, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Note the routing of a batch and the inputs of the sample; returns the tokens that count."""
        self._index, self._gates = index, gates.double()
        self._valid = self._mask.flatten()
        self._norms = torch.zeros(index.shape, dtype=torch.float64)
        rows, low = self._mask.shape[0], self._first * self.seq_len
        inside = self.sample[(self.sample >= low) & (self.sample < low + rows * self.seq_len)] - low
        self.sample_inputs.append(hidden[inside])
        self.sample_routing.append((index[inside], self._gates[inside]))
        for sequence in self.sequences[
            (self.sequences >= self._first) & (self.sequences < self._first + rows)
        ].tolist():
            row = sequence - self._first
            own = hidden[row * self.seq_len : (row + 1) * self.seq_len][self._mask[row]]
            self.sequence_inputs.append(own.mean(0, keepdim=True, dtype=torch.float64).to(hidden.dtype))
        return self._valid

    def on_expert(self, expert: int, tokens: torch.Tensor, slots: torch.Tensor, output: torch.Tensor) -> None:
        """Reduce the outputs [n, H] of one expert, leaving out tokens that do not count."""
        keep = self._valid[tokens]
        if not bool(keep.all()):
            tokens, slots, output = tokens[keep], slots[keep], output[keep]
            if not len(tokens):
                return
        values = output.float()
        norms = torch.linalg.vector_norm(values, dim=1).double()
        self._norms[tokens, slots] = norms
        low, high = values.aminmax()
        self.max[expert] = torch.maximum(self.max[expert], high.double())
        self.absmax[expert] = torch.maximum(self.absmax[expert], torch.maximum(high, -low).double())
        self.output_sum[expert] += values.sum(0).double()

    def on_experts(self, seen: MoEObservation) -> None:
        """Add what all experts gave in a batch."""
        self._norms = seen.norms.double()
        self.max = torch.maximum(self.max, seen.high.double())
        self.absmax = torch.maximum(self.absmax, torch.maximum(seen.high, -seen.low).double())
        self.output_sum += seen.sums.double()

    def finish(self, entered: torch.Tensor, hidden: torch.Tensor) -> None:
        """Close the batch with the hidden states [B, S, H] that entered the decoder layer, and those after it."""
        hidden, entered = hidden.flatten(0, 1), entered.flatten(0, 1)
        scale = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32)
        sums = expert_statistics(self._index, self._gates, self._norms, scale, self._valid, self.num_experts)
        self.tokens += int(self._valid.sum())
        for name, value in sums._asdict().items():
            before = getattr(self, name)
            setattr(self, name, torch.maximum(before, value) if name == "norm_max" else before + value)
        self._add_by_token(_turning(entered, hidden).double())

    def _add_by_token(self, turning: torch.Tensor) -> None:
        """Add the sums of g |f| that weigh tokens, or take them apart by domain; turning [T] float64."""
        rows = self.domains[self._first : self._first + self._mask.shape[0]]
        domain = rows.repeat_interleave(self.seq_len)[self._valid]
        self.domain_tokens += torch.bincount(domain, minlength=len(self.domain_tokens))
        index = self._index[self._valid]
        known = (index >= 0) & (index < self.num_experts)
        expert = index.clamp(0, self.num_experts - 1)
        gated = (self._gates * self._norms)[self._valid] * known
        self.turning_sum.index_add_(0, expert.flatten(), (gated * turning[self._valid].unsqueeze(1)).flatten())
        place = domain.unsqueeze(1) * self.num_experts + expert
        self.domain_gated_sum.view(-1).index_add_(0, place.flatten(), gated.flatten())

    def result(self, name: str, layer: nn.Module) -> ExpertStats:
        """The statistics, with every expert of `layer` evaluated on the sample."""
        experts, num = hf.find_experts(layer), self.num_experts
        sample, means = torch.cat(self.sample_inputs), torch.cat(self.sequence_inputs)
        shared = hf.expert_outputs(experts, torch.cat([sample, means]))
        outputs, sequences = shared[:, : len(sample)], shared[:, len(sample) :]
        return ExpertStats(
            layer=name,
            tokens=self.tokens,
            **{name: getattr(self, name) for name in ExpertSums._fields},
            activation_max=torch.where(self.count > 0, self.max, 0.0),
            activation_absmax=self.absmax,
            output_sum=self.output_sum,
            turning_sum=self.turning_sum,
            domain_tokens=self.domain_tokens,
            domain_gated_sum=self.domain_gated_sum,
            output_gram=pairwise_gram(outputs.flatten(1)),
            mean_gram=pairwise_gram(outputs.mean(1, dtype=torch.float32)),
            gated_gram=_gated_gram(outputs, *(torch.cat(part) for part in zip(*self.sample_routing, strict=True))),
            cka=pairwise_cka(outputs),
            router_gram=_router_gram(layer, num),
            sequence_outputs=sequences.half(),
        )


@torch.inference_mode()
def calibrate(checkpoint: Checkpoint, sequences: Sequences, config: PruneConfig) -> Iterator[ExpertStats]:
    """Pass the sequences through the model and yield the statistics of each MoE layer, in order of depth.

    Holds one decoder layer and the hidden states of all sequences. Raises CpruneError for weights that are not finite,
    and where transformers cannot build the model.
    """
    model = StreamedModel(checkpoint, dtype=resolve_dtype(config.dtype, checkpoint))
    mask = counted(sequences.mask, skip_first=config.skip_first)
    sample, chosen = _draw_sample(mask, config)
    names = sorted(set(sequences.domain))
    domains = torch.tensor([names.index(name) for name in sequences.domain])
    batches = embed_all(model, sequences.input_ids, config.batch_tokens)
    seq_len, depth = mask.shape[1], len(model.layers)
    with tqdm(total=int(mask.sum()), desc="calibrate", unit="tok", unit_scale=True, disable=None) as bar:
        for index in range(depth):
            with model.layer(index) as layer:
                moe = model.moe_layer(index)
                recorder = None
                if moe is not None:
                    width = batches[0].hidden.shape[-1]
                    recorder = LayerRecorder(moe.num_experts, width, sample, chosen, seq_len, domains)
                first = 0
                for batch in batches:
                    rows = slice(first, first + len(batch.input_ids))
                    batch.hidden = _observed(model, index, layer, batch, recorder, first, mask[rows])
                    if not all_finite(batch.hidden):
                        raise _not_finite(checkpoint, index, model.model.dtype)
                    first = rows.stop
                    bar.update(int(mask[rows].sum()) / depth)
                if recorder is not None and moe is not None:
                    stats = recorder.result(moe.name, layer)
                    if not all_finite(stats.output_gram):
                        raise _not_finite(checkpoint, index, model.model.dtype)
                    if unrouted := int((stats.count == 0).sum()):
                        log.warning(
                            "%s: %d of %d experts saw no calibration token", moe.name, unrouted, moe.num_experts
                        )
                    yield stats


def parameter_stats(checkpoint: Checkpoint, config: PruneConfig) -> Iterator[ExpertStats]:
    """What can be known without data (`--calibration none`): `ExpertStats` with 0 tokens, weight and router Grams."""
    for moe, layer in _parameter_walk(checkpoint, config):
        yield with_parameter_grams(_empty_stats(moe, layer), layer, config.seed)


def add_parameter_grams(
    checkpoint: Checkpoint, config: PruneConfig, stats: dict[str, ExpertStats]
) -> Iterator[ExpertStats]:
    """Complete calibrated statistics by the Grams of the parameters, which similarities `weights` and `units` need."""
    for moe, layer in _parameter_walk(checkpoint, config):
        yield with_parameter_grams(stats[moe.name], layer, config.seed)


def with_parameter_grams(stats: ExpertStats, layer: nn.Module, seed: int) -> ExpertStats:
    """A copy of `stats` with the Grams of the experts' weights and of their hidden-unit signatures."""
    gate, up, down = hf.projections(hf.find_experts(layer))
    grams = weight_grams(gate, up, down)
    return replace(stats, weight_gram=grams, unit_gram=pairwise_gram(unit_signatures(gate, up, down, seed=seed)))


@torch.inference_mode()
def _parameter_walk(checkpoint: Checkpoint, config: PruneConfig) -> Iterator[tuple[MoELayer, nn.Module]]:
    model = StreamedModel(checkpoint, dtype=resolve_dtype(config.dtype, checkpoint))
    for index in tqdm(range(len(model.layers)), desc="parameters", unit="layer", disable=None):
        moe = model.moe_layer(index)
        if moe is not None:
            with model.layer(index) as layer:
                if not all(map(all_finite, layer.parameters())):
                    raise _not_finite(checkpoint, index, model.model.dtype)
                yield moe, layer


def _observed(
    model: StreamedModel,
    index: int,
    layer: nn.Module,
    batch: Batch,
    recorder: LayerRecorder | None,
    first: int,
    mask: torch.Tensor,
) -> torch.Tensor:
    if recorder is None:
        return model.run_layer(index, layer, batch)
    recorder.begin(first, mask)
    experts = hf.find_experts(layer)
    experts.cprune_observer = recorder
    try:
        hidden = model.run_layer(index, layer, batch)
    finally:
        del experts.cprune_observer
    recorder.finish(batch.hidden, hidden)
    return hidden


def _draw_sample(mask: torch.Tensor, config: PruneConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [S] and sequences [Q], ascending, drawn from the tokens that count, for the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    valid = mask.flatten().nonzero().flatten()
    positions = valid[torch.randperm(len(valid), generator=generator)[: config.sample_tokens]]
    rows = mask.any(1).nonzero().flatten()
    sequences = rows[torch.randperm(len(rows), generator=generator)[: config.sample_sequences]]
    return positions.sort().values, sequences.sort().values


def _turning(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the rows of [T, H] and [T, H], in float32: half the square of the distance of the directions."""
    turning = []
    for rows in zip(before.split(TURNING_ROWS), after.split(TURNING_ROWS), strict=True):
        old, new = (torch.nn.functional.normalize(x.float(), dim=1, eps=2.0**-100) for x in rows)
        turning.append(old.sub_(new).square_().sum(1) / 2)
    return torch.cat(turning)


def _gated_gram(outputs: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """[E, E] float64: sum_t g_i g_j <f_i, f_j>, from outputs [E, S, H] of all experts and the routing [S, K]."""
    num = outputs.shape[0]
    expert = index.clamp(0, num - 1)
    gates = gates.double() * ((index >= 0) & (index < num))
    routed = outputs[expert, torch.arange(len(index), device=index.device).unsqueeze(1)].double() * gates.unsqueeze(2)
    products = routed @ routed.transpose(1, 2)  # [S, K, K]
    place = expert.unsqueeze(2) * num + expert.unsqueeze(1)
    gram = torch.zeros(num * num, dtype=torch.float64, device=outputs.device)
    return gram.index_add_(0, place.flatten(), products.flatten()).view(num, num)


def _router_gram(layer: nn.Module, num_experts: int) -> torch.Tensor:
    rows = hf.find_router(layer).weight.double().reshape(num_experts, -1)
    return rows @ rows.T


def _empty_stats(moe: MoELayer, layer: nn.Module) -> ExpertStats:
    num = moe.num_experts
    hidden = hf.find_router(layer).weight.shape[-1]
    zeros = {name: torch.zeros(num, dtype=torch.float64) for name in _PER_EXPERT_SUMS}
    return ExpertStats(
        layer=moe.name,
        tokens=0,
        count=torch.zeros(num, dtype=torch.int64),
        **zeros,
        output_sum=torch.zeros(num, hidden, dtype=torch.float64),
        coactivation=torch.zeros(num, num, dtype=torch.int64),
        domain_tokens=torch.zeros(0, dtype=torch.int64),
        domain_gated_sum=torch.zeros(0, num, dtype=torch.float64),
        output_gram=torch.zeros(num, num, dtype=torch.float64),
        mean_gram=torch.zeros(num, num, dtype=torch.float64),
        gated_gram=torch.zeros(num, num, dtype=torch.float64),
        cka=torch.eye(num, dtype=torch.float64),
        router_gram=_router_gram(layer, num),
        sequence_outputs=torch.zeros(num, 0, hidden, dtype=torch.float16),
    )


_PER_EXPERT_SUMS = (
    *("gate_sum", "gated_norm_sum", "gated_sq_sum", "relative_sum", "turning_sum", "norm_sum", "norm_sq_sum"),
    *("norm_max", "activation_max", "activation_absmax"),
)


def _not_finite(checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> CpruneError:
    # The layer's own tensors, and the embedding's.
    names = [name for name in checkpoint.tensors if f"layers.{index}." in name or "layers." not in name]
    try:
        check_finite(checkpoint, names)
    except CpruneError as error:
        return error
    return CpruneError(
        f"hidden states must stay finite, got an overflow after decoder layer {index} in {dtype} (try --dtype float32)"
    )
