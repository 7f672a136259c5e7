"""Layers with their own number of experts in a stock transformers model.

This file stands beside the weights of every checkpoint whose layers keep different numbers of experts, as the body of
its `modeling_cprune.py`: it imports nothing of cprune, and works with transformers 4.5x and 5.
"""

import copy

EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def resize_experts(model, experts_per_layer, expert_map=None):
    """Rebuild the MoE blocks of `model` so that decoder layer i has experts_per_layer[i] experts.

    Args:
        model: a transformers causal language model just constructed, weights not loaded yet.
        experts_per_layer: {"3": 12, ...}: decoder layer number (as JSON knows it) -> number of experts.
        expert_map: {"3": [0, 0, 1, ...], ...} of layers whose router has more rows than there are experts: the expert
            of every row. A token that chose several rows of one expert gets it with the sum of their weights.
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
                    router_and_all.experts = _mapped(_block_of(block, model.config, count).experts, rows, count)
                    setattr(layer, name, router_and_all)


def _block_of(block, config, count):
    """A MoE block like `block` with `count` experts."""
    text_config = copy.deepcopy(config.get_text_config())
    for key in EXPERT_COUNT_NAMES:
        if hasattr(text_config, key):
            setattr(text_config, key, count)
    text_config._experts_implementation = getattr(config, "_experts_implementation", None)
    return type(block)(text_config)


def _mapped(experts, rows, count):
    """`experts` called with numbers of router rows: rows[i] is the expert of row i, and no expert stays none."""
    if not hasattr(experts, "is_transposed"):
        raise ImportError("a merged model that keeps its router's rows needs transformers 5")
    tables = {}

    def translate(module, args):
        hidden_states, top_k_index, top_k_weights = args
        if top_k_index.device not in tables:
            tables[top_k_index.device] = top_k_index.new_tensor([*rows, count])
        return hidden_states, tables[top_k_index.device][top_k_index], top_k_weights

    experts.repeats_choices = True  # a token's slots may lead to the same expert
    experts.register_forward_pre_hook(translate)
    return experts
