"""Layers with their own number of experts in a stock transformers model.

This file stands beside the weights of every checkpoint whose layers keep different numbers of experts, as the body of
its `modeling_cprune.py`: it imports nothing of cprune, and works with transformers 4.5x and 5.
"""

import copy

EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def resize_experts(model, experts_per_layer):
    """Rebuild the MoE blocks of `model` so that decoder layer i has experts_per_layer[i] experts.

    Args:
        model: a transformers causal language model just constructed, weights not loaded yet.
        experts_per_layer: {"3": 12, ...}: decoder layer number (as JSON knows it) -> number of experts.
    """
    layers = next(module.layers for module in model.modules() if hasattr(module, "layers"))
    for index, count in experts_per_layer.items():
        if int(index) >= len(layers):
            continue  # a multi-token-prediction head, which this model class does not build
        layer = layers[int(index)]
        for name, block in list(layer.named_children()):
            if hasattr(block, "experts"):
                config = copy.deepcopy(model.config.get_text_config())
                for key in EXPERT_COUNT_NAMES:
                    if hasattr(config, key):
                        setattr(config, key, count)
                config._experts_implementation = getattr(model.config, "_experts_implementation", None)
                setattr(layer, name, type(block)(config))
