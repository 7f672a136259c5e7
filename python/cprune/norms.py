"""The norms of the layers that are walked through, on the native kernel where that gives what they give.

Models differ in where a norm rounds and in what they add to its weight, and say so in code alone. So a norm is known by
what it gives for a few rows, with the weights that it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cprune import hf
from cprune_kernels.rms_norm import norms_natively, rms_norm

PROBED = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)  # sizes of the rows that are tried: the first ones show epsilon
SAME = 0.99  # of the numbers; sums in another order move a mean by its last bits, and so few roundings


@contextmanager
def native_norms(layer: nn.Module) -> Iterator[None]:
    """Within the context the norms of a decoder layer, its weights in memory, run on `rms_norm` where that is the same.

    Where gradients are wanted they still run as the model has them.
    """
    with ExitStack() as stack:
        for module in layer.modules():
            epsilon = _epsilon(module)
            if epsilon is not None and _is_rms_norm(module, epsilon):
                stack.enter_context(hf.replaced_forward(module, _Norm(module, epsilon)))
        yield


class _Norm:
    def __init__(self, module: nn.Module, epsilon: float) -> None:
        self.weight, self.epsilon, self.otherwise = module.weight, epsilon, module.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype and norms_natively(x, self.weight):
            return rms_norm(x, self.weight, self.epsilon)
        return self.otherwise(x)


def _epsilon(module: nn.Module) -> float | None:
    """What a norm adds to the mean; None for a module that has not the parameters of one, or takes more than rows."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or module.weight.dim() != 1:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module, epsilon: float) -> bool:
    """Whether the module gives what `rms_norm` gives, but for the order of a sum."""
    weight = module.weight
    sizes = torch.tensor(PROBED).unsqueeze(1)
    rows = torch.randn(len(PROBED), len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
    x = (rows * sizes).to(weight.device, weight.dtype)
    if not norms_natively(x, weight):
        return False
    own, ours = module.forward(x), rms_norm(x, weight, epsilon)
    if own.shape != ours.shape or own.dtype != ours.dtype:
        return False
    unit = torch.finfo(weight.dtype).eps
    apart = (own.double() - ours.double()).abs() / own.double().abs().clamp_min(torch.finfo(weight.dtype).tiny)
    same = apart <= (8 * unit if weight.dtype == torch.float32 else 0.0)
    return bool((apart <= 8 * unit).all()) and float(same.double().mean()) >= SAME
