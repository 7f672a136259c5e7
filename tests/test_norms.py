"""`native_norms`: norms are replaced where the kernel gives what they give, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

import cprune_kernels
from cprune.norms import native_norms
from tests.test_experts import ARCHITECTURES, whole_model
from tests.test_hf import assert_close, logits

WIDTH = 96
BF16, FP32 = torch.bfloat16, torch.float32


class Shifted(Qwen3MoeRMSNorm):
    """Has the parameters of the others, and adds to what they give."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.25


def layer_of(norm: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(WIDTH, generator=generator) + 0.5)
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm).to(dtype).requires_grad_(False)
    return layer, torch.randn(40, WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize(
    ("make", "dtype", "native"),
    [
        (lambda: Qwen3MoeRMSNorm(WIDTH, 1e-6), BF16, True),
        (lambda: Qwen3MoeRMSNorm(WIDTH, 1e-6), torch.float16, True),
        (lambda: Qwen3MoeRMSNorm(WIDTH, 1e-6), FP32, True),
        (lambda: DeepseekV3RMSNorm(WIDTH, 1e-3), BF16, True),
        (lambda: GptOssRMSNorm(WIDTH, 1e-5), FP32, True),
        (lambda: GptOssRMSNorm(WIDTH, 1e-5), BF16, False),  # rounds once, after the weight
        (lambda: GemmaRMSNorm(WIDTH, 1e-6), FP32, False),  # adds 1 to the weight
        (lambda: Shifted(WIDTH, 1e-6), FP32, False),
        (lambda: nn.LayerNorm(WIDTH, bias=False), FP32, False),
    ],
)
def test_only_what_the_kernel_reproduces(make, dtype: torch.dtype, native: bool) -> None:  # type: ignore[no-untyped-def]
    layer, x = layer_of(make(), dtype)
    own = layer[1](x)
    with native_norms(layer):
        replaced = "forward" in layer[1].__dict__
        ours = layer[1](x)
    assert "forward" not in layer[1].__dict__ and "forward" not in layer[0].__dict__
    assert replaced == (native and cprune_kernels.backend() != "reference")
    assert replaced or torch.equal(ours, own)
    torch.testing.assert_close(ours, own, rtol=8 * torch.finfo(dtype).eps, atol=0.0)


def test_epsilon_is_that_of_the_norm() -> None:
    norm = Qwen3MoeRMSNorm(WIDTH, 1e-6)
    layer, _ = layer_of(norm, FP32)
    norm.forward = lambda x, own=norm.forward: own(x * 1.01)  # as another epsilon would, where rows are small
    with native_norms(layer):
        assert not hasattr(norm.forward, "otherwise")


def test_a_norm_that_takes_more_than_rows_stays() -> None:
    layer, x = layer_of(Qwen3NextRMSNormGated(WIDTH, 1e-6), FP32)
    own = layer[1](x, x)
    with native_norms(layer):
        assert torch.equal(layer[1](x, x), own)


def test_gradients_run_as_the_model_has_them() -> None:
    layer, x = layer_of(Qwen3MoeRMSNorm(WIDTH, 1e-6), FP32)
    x.requires_grad_()
    with native_norms(layer):
        layer[1](x).sum().backward()
        mixed = layer[1](x.detach().bfloat16())  # of another type than the weight
    assert x.grad is not None and mixed.dtype == FP32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_models_give_the_same_logits(name: str) -> None:
    """Whatever their norms take, add to their weights or are called."""
    model = whole_model(name)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    own = logits(model)
    with native_norms(model):
        assert_close(logits(model), own)
