from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cprune.act.fold import RIDGE, RouterFit

EXPERTS, HIDDEN, TOKENS = 7, 5, 60
GROUPS = {1: [1, 0, 4], 5: [5, 6]}
KEPT = (1, 2, 3, 5)
SHARES = {1: (2.0, 1.0, 1.0), 5: (0.0, 3.0)}


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.is_transposed, self.num_experts = torch.nn.Parameter(torch.zeros(1), False), False, EXPERTS


class Layer(torch.nn.Module):
    """A decoder layer as far as a router's fit sees it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.gate, self.mlp.experts = torch.nn.Linear(HIDDEN, EXPERTS, bias=bias), Experts()
        self.requires_grad_(False)


def fit(bias: bool, counts: Tensor, x: Tensor, pieces: int = 60) -> tuple[Layer, RouterFit]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Layer(bias)
    found = RouterFit(layer, GROUPS, counts)
    handle = layer.mlp.gate.register_forward_pre_hook(found.note)
    for part in x.split(pieces):
        layer.mlp.gate(part.unsqueeze(0))
    handle.remove()
    return layer, found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pieces", [60, 17])
def test_rows_are_the_weighted_mean_and_the_least_squares_fit(bias: bool, pieces: int) -> None:
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5
    counts = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.8  # the last ten are held back
    layer, found = fit(bias, counts, x, pieces)
    weight = layer.mlp.gate.weight.double().numpy()
    offset = layer.mlp.gate.bias.double().numpy() if bias else np.zeros(EXPERTS)
    rows = found.rows(KEPT, SHARES)
    assert list(rows) == ["kept", "mean", "logsumexp"]
    assert np.array_equal(rows["kept"]["weight"].double().numpy(), weight[list(KEPT)])

    mean = weight[list(KEPT)].copy()
    mean[0] = (2 * weight[1] + weight[0] + weight[4]) / 4
    mean[3] = weight[6]
    np.testing.assert_allclose(rows["mean"]["weight"].numpy(), mean, rtol=0, atol=4 * 2.0**-24)

    used = x[:50][counts].double().numpy()
    logits = used @ weight.T + offset
    inputs = np.concatenate([used, np.ones((len(used), 1))], 1) if bias else used
    ridge = RIDGE * np.square(inputs).sum() / inputs.shape[1]
    system = np.concatenate([inputs, np.sqrt(ridge) * np.eye(inputs.shape[1])])
    want = np.concatenate([weight, offset[:, None]], 1)[list(KEPT)] if bias else weight[list(KEPT)]
    for expert, members in GROUPS.items():
        target = np.log(np.exp(logits[:, members]).sum(1)) - logits[:, expert]
        right = np.concatenate([target, np.zeros(inputs.shape[1])])
        want[KEPT.index(expert)] += np.linalg.lstsq(system, right, rcond=None)[0]
    got = rows["logsumexp"]["weight"]
    got = torch.cat([got, rows["logsumexp"]["bias"].unsqueeze(1)], 1) if bias else got
    # float32 normal equations whose condition number the ridge keeps below (I + ridge) / ridge = 600
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=600 * 2.0**-24 * 4)


def test_without_groups_the_rows_stay() -> None:
    found = RouterFit(Layer(False), {}, torch.ones(0, dtype=torch.bool))
    assert list(found.rows(KEPT, {})) == ["kept"]
