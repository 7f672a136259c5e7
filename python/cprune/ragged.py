"""Layers with their own number of experts in a stock transformers model.

This file stands beside the weights of every checkpoint whose layers keep different numbers of experts, as the body of
its `modeling_cprune.py`: it imports nothing of cprune, and works with transformers 4.5x and 5.
"""

import copy

import torch

EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def resize_experts(model, experts_per_layer, expert_map=None):
    """Rebuild the MoE blocks of `model` so that decoder layer i has experts_per_layer[i] experts.

    Args:
        model: a transformers causal language model just constructed, weights not loaded yet.
        experts_per_layer: {"3": 12, ...}: decoder layer number (as JSON knows it) -> number of experts.
        expert_map: {"3": [0, 0, 1, -1, ...], ...} of layers whose router has more rows than there are experts: the
            expert of every row (see `map_rows`).
    """
    expert_map = expert_map or {}
    layers = next(module.layers for module in model.modules() if hasattr(module, "layers"))
    for index, count in experts_per_layer.items():
        if int(index) >= len(layers):
            continue  # a multi-token-prediction head, which this model class does not build
        layer = layers[int(index)]
        for name, block in list(layer.named_children()):
            if hasattr(block, "experts"):
                rows = expert_map.get(index)
                if rows is None:
                    setattr(layer, name, _block_of(block, model.config, count))
                else:
                    router_and_all = _block_of(block, model.config, len(rows))
                    router_and_all.experts = _block_of(block, model.config, count).experts
                    map_rows(router_and_all.experts, rows, count)
                    setattr(layer, name, router_and_all)


def _block_of(block, config, count):
    """A MoE block like `block` with `count` experts."""
    text_config = copy.deepcopy(config.get_text_config())
    for key in EXPERT_COUNT_NAMES:
        if hasattr(text_config, key):
            setattr(text_config, key, count)
    text_config._experts_implementation = getattr(config, "_experts_implementation", None)
    return type(block)(text_config)


def map_rows(experts, rows, count, novices=None):
    """Let `experts`, `count` of them, be called with numbers of router rows.

    Args:
        rows: rows[i] is the expert of row i. A token that chose several rows of one expert gets it with the sum of
            their weights. -1: its expert is gone, and a vector, the row's novice, answers, times the row's weight.
        novices: [D, H] of the D rows with -1, in their order; left out, a parameter to be loaded.
    """
    if not hasattr(experts, "is_transposed"):
        raise ImportError("a model whose router keeps rows of removed experts needs transformers 5")
    gone = [row for row, expert in enumerate(rows) if expert < 0]
    places = {row: place for place, row in enumerate(gone)}
    # of every row, and last of what is no row: the expert and the novice, or how many there are for none
    experts.expert_of_row = [expert if expert >= 0 else count for expert in (*rows, count)]
    experts.novice_of_row = [places.get(row, len(gone)) for row in range(len(rows) + 1)]
    experts.tables = {}
    kept = [expert for expert in rows if expert >= 0]
    experts.repeats_choices = len(set(kept)) < len(kept)  # a token's slots may lead to the same expert
    novice_or_none = None
    if gone:
        experts._is_expert_parallel = True  # slots may hold `count`, as transformers has them under expert parallelism
        hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
        novice_or_none = torch.nn.Parameter(torch.empty(len(gone), hidden) if novices is None else novices)
    experts.register_parameter("novices", novice_or_none)
    own = type(experts)
    experts.__class__ = type(own.__name__, (_CalledByRows, own), {"__module__": own.__module__})


class _CalledByRows:
    """What `map_rows` puts before a class of experts."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        device = top_k_index.device
        if device not in self.tables:
            self.tables[device] = top_k_index.new_tensor([self.expert_of_row, self.novice_of_row])
        experts, novices = self.tables[device][:, top_k_index]
        if self.novices is None:
            return super().forward(hidden_states, experts, top_k_weights)
        gone = experts == self.num_experts
        if getattr(self.config, "_experts_implementation", None) in (None, "eager"):
            experts = experts.masked_fill(gone, 0)  # gpt-oss's loop knows no slot without an expert
        out = super().forward(hidden_states, experts, top_k_weights.masked_fill(gone, 0.0))
        weights = top_k_weights.to(self.novices.dtype)
        weights = weights.new_zeros(len(weights), len(self.novices) + 1).scatter_add(1, novices.long(), weights)
        return out + (weights[:, :-1] @ self.novices).to(out.dtype)
