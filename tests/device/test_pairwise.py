"""The launches of pairwise_gram and pairwise_cka against brute force in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter

from cprune_kernels.gram_launches import (
    FLOAT8,
    add_launches,
    cka_launches,
    finish_launch,
    gram_launches,
    gram_traffic,
    lane_count,
)
from cprune_kernels.launch import Launch
from cprune_kernels.pairwise import GramAccumulator, cosine_from_gram, pairwise_gram_reference
from cprune_kernels.picker import A100, H100, Arch, pick_gram

EPS32 = torch.finfo(torch.float32).eps
EXPERTS = (2, 3, 8, 17, 64, 65, 128, 131, 200, 256, 300, 384, 511)
WIDE = (torch.bfloat16, torch.float32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, *FLOAT8)


@pytest.fixture(params=[A100, H100], ids=lambda arch: arch.name)
def every_arch(request: pytest.FixtureRequest, device: str, arch: Arch) -> Arch:
    """Both ways of loading under the interpreter, the GPU's own on a GPU."""
    if device == "cuda" and request.param.capability != min(arch.capability, 90):
        pytest.skip("the kernels of another GPU")
    return arch if device == "cuda" else request.param


def skip_twin(dtype: torch.dtype, arch: Arch, device: str) -> None:
    """float32 has one kernel for all architectures: under the interpreter once is enough."""
    if device == "cpu" and dtype == torch.float32 and arch.capability >= 90:
        pytest.skip("the same launches as for sm_80")


def run(launches_and_output: tuple[list[Launch], torch.Tensor]) -> torch.Tensor:
    launches, output = launches_and_output
    for launch in launches:
        launch.run()
    return output.cpu()


def whole_numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Whole numbers of at most 8, whose inner products over 2^18 columns no order of a float32 sum can round."""
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed))
    return x.float().to(dtype).to(device)


def normals(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def brute(x: torch.Tensor) -> torch.Tensor:
    wide = x.cpu().float().double()
    return wide @ wide.mT


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(experts, dtype) for experts in EXPERTS for dtype in DTYPES if dtype in WIDE or experts in (8, 131, 300)],
)
def test_gram_of_whole_numbers_is_exact(experts: int, dtype: torch.dtype, every_arch: Arch, device: str) -> None:
    skip_twin(dtype, every_arch, device)
    x = whole_numbers(experts, 208, dtype=dtype, device=device)
    gram = run(gram_launches(x, every_arch, chain=128))
    assert gram.dtype == torch.float64
    assert torch.equal(gram, brute(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "length"), [(2, 1), (17, 131), (131, 257), (300, 77)])
def test_rows_off_the_16_byte_grid(
    experts: int, length: int, dtype: torch.dtype, every_arch: Arch, device: str
) -> None:
    skip_twin(dtype, every_arch, device)
    wide = whole_numbers(experts, length + 1, dtype=dtype, device=device)
    for x in (wide[:, 1:], wide[:, :length].contiguous()):
        assert torch.equal(run(gram_launches(x, every_arch, chain=128)), brute(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_any_strides(dtype: torch.dtype, every_arch: Arch, device: str) -> None:
    skip_twin(dtype, every_arch, device)
    wide = whole_numbers(300, 3 * 136, dtype=dtype, device=device)
    views = (wide[::2, 8:], wide.T[1::3], wide.view(300, 136, 3)[:131, :, 1], wide[:1].expand(5, -1), wide[:, :48])
    for view in views:
        assert torch.equal(run(gram_launches(view, every_arch)), brute(view))


@pytest.mark.parametrize(("experts", "dtype"), [(3, torch.float32), (17, torch.bfloat16)])
def test_layers_are_grams_of_their_own(experts: int, dtype: torch.dtype, every_arch: Arch, device: str) -> None:
    skip_twin(dtype, every_arch, device)
    x = whole_numbers(6, experts, 272, dtype=dtype, device=device)
    for batch in (x, x[::2], x[:1], x[1:3, :, 16:]):
        assert torch.equal(run(gram_launches(batch, every_arch, chain=128)), brute(batch))


@pytest.mark.parametrize("experts", [1, 513, 640])
def test_one_expert_and_more_than_the_picker_groups(experts: int, every_arch: Arch, device: str) -> None:
    x = whole_numbers(experts, 136, dtype=torch.bfloat16, device=device)
    assert torch.equal(run(gram_launches(x, every_arch)), brute(x))


@pytest.mark.parametrize(("experts", "length"), [(3, 0), (0, 300)])
def test_nothing_to_multiply(experts: int, length: int, every_arch: Arch, device: str) -> None:
    x = torch.zeros(experts, length, dtype=torch.bfloat16, device=device)
    assert torch.equal(run(gram_launches(x, every_arch)), torch.zeros(experts, experts, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("experts", "length"), [(8, 5000), (131, 1000)])
def test_gram_is_the_inner_product(
    experts: int, length: int, dtype: torch.dtype, every_arch: Arch, device: str
) -> None:
    """Each of the `chain` additions to a float32 sum errs by an ulp at most, of a sum that |x_i| |x_j| bounds."""
    skip_twin(dtype, every_arch, device)
    x, chain = normals(experts, length, dtype=dtype, device=device), 512
    gram, exact = run(gram_launches(x, every_arch, chain=chain)), brute(x)
    norm = exact.diagonal().sqrt()
    assert torch.equal(gram, gram.T)
    assert ((gram - exact) / torch.outer(norm, norm)).abs().max() <= chain * EPS32


@pytest.mark.parametrize("chain", [None, 512])
def test_partial_sums_are_added_in_float64(chain: int | None, every_arch: Arch, device: str) -> None:
    x = torch.ones(2, 1024, dtype=torch.float32, device=device)
    x[:, 0] = 2.0**13  # 2^26 + 511 has no float32; nor has the first 2^26 + 1
    x[:, 1:512] = 0
    assert run(gram_launches(x, every_arch, chain=512)).tolist() == [[2.0**26 + 512] * 2] * 2


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize(("experts", "length"), [(8, 384), (17, 300), (131, 272), (200, 256), (300, 144)])
def test_float8_takes_its_scales(experts: int, length: int, dtype: torch.dtype, every_arch: Arch, device: str) -> None:
    x = whole_numbers(2, experts, length, dtype=dtype, device=device)
    scale = 2.0 ** torch.randint(-3, 4, (2, experts, -(-length // 128)), generator=torch.Generator().manual_seed(1))
    gram = run(gram_launches(x, every_arch, scale=scale.to(device)))
    assert torch.equal(gram, brute(x.cpu().float() * scale.repeat_interleave(128, -1)[..., :length]))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_float8_is_decoded(dtype: torch.dtype, every_arch: Arch, device: str) -> None:
    """Against ones, in a column of its own; a scale of many digits is rounded as bfloat16 does."""
    number = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    x = number[number.isfinite()].diag()
    x[0] = 1.0
    scale = torch.full((len(x), -(-len(x) // 128)), 1.2345)
    gram = run(gram_launches(x.to(dtype).to(device), every_arch, scale=scale.to(device)))
    assert torch.equal(gram[0, 1:], brute((x * 1.2345).bfloat16())[0, 1:])
    nan = torch.full((2, 128), float("nan")).to(dtype)
    assert run(gram_launches(nan.to(device), every_arch)).isnan().all()


@pytest.mark.parametrize("experts", [8, 131])
def test_windows_of_chains_give_the_bits_of_one_call(experts: int, every_arch: Arch, device: str) -> None:
    x = normals(experts, 256 * 5 + 56, dtype=torch.bfloat16, device=device)
    for chain, widths in ((256, (256, 512, 568)), (128, (640, 128, 568))):
        lanes = torch.zeros(1, lane_count(experts), experts, experts, dtype=torch.float64, device=device)
        first = 0
        for window in x.split(widths, dim=1):
            launches, chunks = add_launches(window, lanes, every_arch, chain=chain, first=first)
            for launch in launches:
                launch.run()
            first += chunks
        gram = torch.empty(experts, experts, dtype=torch.float64, device=device)
        finish_launch(lanes, gram).run()
        assert torch.equal(gram.cpu(), run(gram_launches(x, every_arch, chain=chain)))


def test_accumulator_takes_windows_of_any_width(every_arch: Arch, device: str) -> None:
    x = whole_numbers(131, 1000, dtype=torch.float16, device="cpu")
    total = GramAccumulator(131, device, torch.float16, chain=128, arch=every_arch)
    assert not total.result().any()
    for start, end in ((0, 1), (1, 300), (300, 300), (300, 944), (944, 1000)):
        total.add(x[:, start:end])
        assert torch.equal(total.result().cpu(), brute(x[:, :end]))


@pytest.mark.parametrize("experts", [2, 8, 16, 31, 64, 65, 128, 129, 192, 200, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_each_byte_is_read_once(
    experts: int, dtype: torch.dtype, every_arch: Arch, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("the interpreter counts loads")
    if dtype.itemsize == 1 and experts > 128 and every_arch.capability < 90:
        pytest.skip("tiles that share what they read through L2 only")
    length = 1040
    x = whole_numbers(experts, length, dtype=dtype, device=device)
    loads = counted(x, monkeypatch)
    run(gram_launches(x, every_arch, chain=256))
    config = pick_gram(experts, length, 1, dtype, every_arch, chain=256, exact=True)
    traffic = gram_traffic(experts, length, 1, dtype, config)
    assert sum(loads) == traffic.fetched == traffic.read == x.nbytes


@pytest.mark.parametrize(("experts", "times"), [(384, 5 / 3), (512, 2.5), (300, 556 / 300)])
def test_what_is_read_more_than_once(
    experts: int, times: float, every_arch: Arch, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("the interpreter counts loads")
    x = whole_numbers(experts, 256, dtype=torch.bfloat16, device=device)
    loads = counted(x, monkeypatch)
    run(gram_launches(x, every_arch, chain=256))
    config = pick_gram(experts, 256, 1, torch.bfloat16, every_arch, chain=256, exact=True)
    assert sum(loads) == gram_traffic(experts, 256, 1, torch.bfloat16, config).fetched == round(times * x.nbytes)


def counted(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of x that every load of the interpreter from now on takes."""
    loads: list[int] = []
    first, end, original = x.data_ptr(), x.data_ptr() + x.nbytes, interpreter._interpreter

    def load(pointers: np.ndarray, mask: np.ndarray, *rest: object) -> np.ndarray:
        loads.append(int((mask & (pointers >= first) & (pointers < end)).sum()) * x.itemsize)
        return original.load(pointers, mask, *rest)

    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=original.store))
    return loads


def cka_brute(y: torch.Tensor) -> torch.Tensor:
    """The definition, through H x H cross covariances."""
    y = y.cpu().double()
    y = y - y.mean(1, keepdim=True)
    cross = torch.einsum("ish,jsk->ijhk", y, y).flatten(2).norm(dim=2).square()
    own = cross.diagonal().sqrt()
    return cross / torch.outer(own, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("experts", "samples", "hidden"), [(2, 131, 17), (3, 17, 300), (17, 30, 24), (5, 2, 131)])
def test_cka_is_its_definition(
    experts: int, samples: int, hidden: int, dtype: torch.dtype, every_arch: Arch, device: str
) -> None:
    """Centring and a kernel's element are float32 sums over S and H; the Gram's own error is averaged out."""
    y = (normals(experts, samples, hidden, dtype=torch.float32, device=device) + 3.0).to(dtype)
    y[1] = y[0] * 2 + (normals(samples, hidden, dtype=torch.float32, device=device, seed=6) * 0.5).to(dtype)
    cka = cosine_from_gram(run(cka_launches(y, every_arch)))
    assert torch.equal(cka, cka.T)
    torch.testing.assert_close(cka, cka_brute(y), rtol=0, atol=(samples + hidden) * EPS32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cka_of_constant_and_of_extreme_outputs(dtype: torch.dtype, every_arch: Arch, device: str) -> None:
    y = normals(5, 31, 24, dtype=dtype, device=device)
    y[1] = 0
    y[2] = normals(24, dtype=dtype, device=device, seed=10) * 1000 + 0.1
    y[3] = y[0] * 2.0**100
    y[4] = y[0] * 2.0**-100
    cka = cosine_from_gram(run(cka_launches(y, every_arch)))
    for dead in (1, 2):
        assert cka[dead].nonzero().flatten().tolist() == [dead]
    torch.testing.assert_close(cka[0, 3:], torch.ones(2, dtype=torch.float64), rtol=0, atol=31 * EPS32)


def test_cka_reads_strided_input(every_arch: Arch, device: str) -> None:
    y = normals(37, 3, 48, dtype=torch.bfloat16, device=device).transpose(0, 1)[:, :, ::2]
    assert torch.equal(run(cka_launches(y, every_arch)), run(cka_launches(y.contiguous(), every_arch)))


def test_the_reference_is_the_specification(every_arch: Arch, device: str) -> None:
    x = whole_numbers(2, 131, 1000, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.full((2, 131, 8), 0.5, device=device)
    gram = run(gram_launches(x, every_arch, scale=scale))
    assert torch.equal(gram, pairwise_gram_reference(x, scale).cpu())
