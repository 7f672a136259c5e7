"""use_large_pages: the same numbers at the same place."""

from __future__ import annotations

import pytest
import torch

import cprune_kernels
from cprune_kernels.native import use_large_pages

if cprune_kernels.backend() == "reference":
    pytest.skip("the native kernels were not built", allow_module_level=True)

PAGE = 2 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_numbers_stay_where_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(3, 1000, 1025).to(dtype)
    before, place = x.clone(), x.data_ptr()
    moved = use_large_pages(x, x[1:, ::2])
    assert x.data_ptr() == place and torch.equal(x, before)
    assert moved % PAGE == 0 and 0 <= moved <= 2 * x.nbytes
    x += 1
    assert torch.equal(x, before + 1)


def test_less_than_a_page_is_left() -> None:
    assert use_large_pages(torch.zeros(PAGE // 8), torch.zeros(0, 5), torch.zeros(())) == 0


def test_another_device_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="tensors must be on the CPU, got meta"):
        use_large_pages(torch.zeros(3), torch.zeros(3, device="meta"))
