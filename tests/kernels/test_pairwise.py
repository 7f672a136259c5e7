"""Pairwise inner products, cosines, distances and CKA against brute force in float64; how their kernels are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cprune_kernels.gram_launches import gram_seconds, gram_traffic
from cprune_kernels.pairwise import (
    CHAIN,
    FLOAT8,
    GramAccumulator,
    cosine_from_gram,
    l2_from_gram,
    pairwise_cka,
    pairwise_gram,
    pairwise_gram_reference,
    row_scales,
)
from cprune_kernels.picker import A100, B200, H100, Arch, GramConfig, pick_gram

EPS32 = torch.finfo(torch.float32).eps
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gram_brute(x: torch.Tensor) -> np.ndarray:
    rows = x.double().numpy()
    return np.array([[np.dot(a, b) for b in rows] for a in rows])


def cka_brute(y: torch.Tensor) -> np.ndarray:
    """The definition, through H x H cross covariances."""
    experts = [e - e.mean(0) for e in y.double().numpy()]
    out = np.eye(len(experts))
    for i, a in enumerate(experts):
        for j, b in enumerate(experts):
            scale = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
            if i != j:
                out[i, j] = np.linalg.norm(a.T @ b) ** 2 / scale if scale > 0 else 0.0
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "length"), [(2, 300), (3, 100_000), (131, 300), (131, 4097)])
def test_gram_is_the_inner_product(dtype: torch.dtype, num_experts: int, length: int) -> None:
    x = random(num_experts, length, dtype=dtype)
    gram = pairwise_gram(x)
    brute = gram_brute(x)
    norm = np.sqrt(np.diag(brute))
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert np.abs((gram.numpy() - brute) / np.outer(norm, norm)).max() <= min(length, 32768) ** 0.5 * EPS32


@pytest.mark.parametrize("chain", [1, 7, 299, 300, 1000])
def test_any_window_gives_the_same_gram(chain: int) -> None:
    x = torch.randint(-8, 9, (3, 300), generator=torch.Generator().manual_seed(1)).float()
    np.testing.assert_array_equal(pairwise_gram(x, chain=chain).numpy(), gram_brute(x))


def test_windows_are_added_in_float64() -> None:
    x = torch.ones(2, 8)
    x[:, 0] = 2.0**13  # 2^26 + 7 has no float32
    assert pairwise_gram(x, chain=1).tolist() == [[2.0**26 + 7] * 2] * 2


def test_float16_squares_do_not_overflow() -> None:
    x = torch.full((2, 300), 32768.0, dtype=torch.float16)
    assert pairwise_gram(x).tolist() == [[300 * 2.0**30] * 2] * 2


def test_float64_keeps_its_digits() -> None:
    x = random(3, 300).double() + 1e-9
    np.testing.assert_allclose(pairwise_gram(x, chain=64).numpy(), gram_brute(x), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_gives_the_gram_of_its_copy(dtype: torch.dtype) -> None:
    wide = random(300, 3 * 131, seed=2, dtype=dtype)
    for view in (wide[::2, 5:], wide.T[1::3], wide.view(300, 131, 3)[:131, :, 1]):
        assert not view.is_contiguous()
        torch.testing.assert_close(pairwise_gram(view, chain=50), pairwise_gram(view.contiguous(), chain=50))


def test_zero_expert_and_empty_rows() -> None:
    x = random(3, 300)
    x[1] = 0
    assert pairwise_gram(x)[1].tolist() == [0.0, 0.0, 0.0]
    assert pairwise_gram(torch.zeros(2, 0)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(1, 2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)])
def test_gram_refuses_other_shapes_and_types(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be a floating \[E, P\] or \[L, E, P\], got"):
        pairwise_gram(x)
    with pytest.raises(ValueError, match="chain must be at least 1, got 0"):
        pairwise_gram(torch.zeros(2, 3), chain=0)
    with pytest.raises(ValueError, match="must be float8_e4m3fn or float8_e5m2 where it is a float8, got"):
        pairwise_gram(torch.zeros(2, 3).to(torch.float8_e4m3fnuz))
    with pytest.raises(ValueError, match="fewer than 2.31 columns, got 2147483648"):
        pairwise_gram(torch.zeros(1, 1).expand(2, 2**31))


def test_layers_are_grams_of_their_own() -> None:
    x = random(3, 17, 300)[:, ::2]
    assert torch.equal(pairwise_gram(x), torch.stack([pairwise_gram(layer) for layer in x]))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("chain", [None, 100])
def test_float8_is_scaled_by_blocks_and_rounded_to_bfloat16(dtype: torch.dtype, chain: int | None) -> None:
    x, scale = random(2, 3, 300).to(dtype), random(2, 3, 3, seed=1).abs()
    wide = (x.float() * scale.repeat_interleave(128, dim=-1)[..., :300]).bfloat16()
    assert torch.equal(pairwise_gram(x, scale=scale, chain=chain), pairwise_gram_reference(wide, chain=chain))
    assert torch.equal(pairwise_gram(x[1]), pairwise_gram_reference(x[1].float()))


def test_scales_must_fit() -> None:
    x = random(3, 300).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="scale must be given for a float8 x only, got x of torch.float32"):
        pairwise_gram(x.float(), scale=torch.ones(3, 3))
    for scale in (torch.ones(3, 2), torch.ones(3, 3).half(), torch.ones(3, 3, device="meta")):
        with pytest.raises(ValueError, match=r"scale must be a float32 \[3, 3\] on cpu, got"):
            pairwise_gram(x, scale=scale)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (131, 256), (300, 384), (1, 128)])
def test_scales_of_square_blocks(rows: int, columns: int) -> None:
    scale = random(2, -(-rows // 128), columns // 128)
    wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :rows].flatten(1)
    assert torch.equal(row_scales(scale, rows * columns).repeat_interleave(128, 1), wide)


@pytest.mark.parametrize("columns", [0, 128 * 256, 131 * 256 + 128, 257 * 256])
def test_scales_of_square_blocks_must_fit(columns: int) -> None:
    with pytest.raises(ValueError, match=rf"columns must be N x 256 with ceil\(N / 128\) = 2 for .*, got {columns}"):
        row_scales(torch.ones(2, 2), columns)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, *FLOAT8])
def test_windows_of_chains_give_the_bits_of_one_call(dtype: torch.dtype) -> None:
    x = random(131, 1000).to(dtype)
    scale = random(131, 8).abs() if dtype in FLOAT8 else None
    total = GramAccumulator(131, dtype=dtype, chain=128)
    assert not total.result().any()
    for start, end in ((0, 128), (128, 640), (640, 1000)):
        total.add(x[:, start:end], scale=None if scale is None else scale[:, start // 128 : -(-end // 128)])
        part = pairwise_gram(x[:, :end], scale=None if scale is None else scale[:, : -(-end // 128)], chain=128)
        assert torch.equal(total.result(), part)


def test_windows_have_any_width() -> None:
    x = torch.randint(-8, 9, (3, 300), generator=torch.Generator().manual_seed(1)).float()
    total = GramAccumulator(3, dtype=torch.float32)
    for window in x.split([1, 0, 130, 169], dim=1):
        total.add(window)
    np.testing.assert_array_equal(total.result().numpy(), gram_brute(x))


def test_accumulator_refuses_what_does_not_fit() -> None:
    total = GramAccumulator(3, dtype=torch.float32)
    for window in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(3, 4).half()):
        with pytest.raises(ValueError, match=r"window must be a torch.float32 \[3, w\], got"):
            total.add(window)
    for chain in (0, 100, -128):
        with pytest.raises(ValueError, match=f"chain must be a multiple of 128 and at least that, got {chain}"):
            GramAccumulator(3, chain=chain)
    with pytest.raises(ValueError, match="experts must be at least 1, got 0"):
        GramAccumulator(0)


def test_operators_are_traced_whole() -> None:
    x, y = random(2, 17, 300), random(3, 40, 8)

    @torch.compile(fullgraph=True, backend="eager")
    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gram = pairwise_gram(x)
        return cosine_from_gram(gram), l2_from_gram(gram), pairwise_cka(y)

    expected = cosine_from_gram(pairwise_gram(x)), l2_from_gram(pairwise_gram(x)), pairwise_cka(y)
    assert all(torch.equal(a, b) for a, b in zip(both(x, y), expected, strict=True))
    for operator, args in ((torch.ops.cprune.pairwise_gram, (x, None, 128)), (torch.ops.cprune.cka_gram, (y,))):
        torch.library.opcheck(operator.default, args)


@pytest.mark.parametrize("num_experts", [2, 131])
def test_l2_is_the_distance(num_experts: int) -> None:
    x = random(2, num_experts, 300, seed=3).double()
    x[:, 1] = x[:, 0]
    distance = l2_from_gram(pairwise_gram(x))
    np.testing.assert_allclose(
        distance.numpy(), torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"), atol=1e-6
    )
    assert torch.equal(distance, distance.mT)
    assert not distance.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize("num_experts", [2, 3, 131])
def test_cosine_is_the_angle(num_experts: int) -> None:
    x = random(num_experts, 300, seed=3).double()
    x[1] = -2 * x[0]
    cosine = cosine_from_gram(pairwise_gram(x))
    unit = x / x.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(cosine.numpy(), (unit @ unit.T).numpy(), atol=1e-12)
    assert torch.equal(cosine, cosine.T)
    assert (cosine.diagonal() == 1.0).all()
    assert cosine.min() >= -1.0
    assert cosine.max() <= 1.0


def test_cosine_of_zero_rows_is_zero_and_leading_axes_are_kept() -> None:
    x = random(131, 300, seed=4)
    x[[5, 130]] = 0
    gram = torch.stack([pairwise_gram(x), pairwise_gram(torch.zeros_like(x)), pairwise_gram(x * 1e-12)])
    cosine = cosine_from_gram(gram)
    assert cosine.shape == (3, 131, 131)
    assert cosine.isfinite().all()
    assert cosine[0, 5].nonzero().flatten().tolist() == [5]
    assert torch.equal(cosine[1], torch.eye(131, dtype=torch.float64))
    torch.testing.assert_close(cosine[2], cosine[0], atol=1e-6, rtol=0)


def test_cosine_of_integer_counts() -> None:
    counts = torch.tensor([[4, 2, 0], [2, 9, 0], [0, 0, 0]])
    assert cosine_from_gram(counts).tolist() == [[1.0, 2 / 6, 0.0], [2 / 6, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_cosine_is_clipped_and_leaves_its_input_alone() -> None:
    gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    assert cosine_from_gram(gram).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert gram.tolist() == [[1.0, 1.5], [1.5, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "samples", "hidden"), [(2, 300, 17), (3, 17, 300), (17, 131, 24)])
def test_cka_is_its_definition(dtype: torch.dtype, num_experts: int, samples: int, hidden: int) -> None:
    y = (random(num_experts, samples, hidden, seed=5) + 3.0).to(dtype)
    y[1] = y[0] * 2 + (random(samples, hidden, seed=6) * 0.5).to(dtype)
    cka = pairwise_cka(y)
    assert cka.dtype == torch.float64
    assert torch.equal(cka, cka.T)
    assert (cka.diagonal() == 1.0).all()
    np.testing.assert_allclose(cka.numpy(), cka_brute(y), atol=samples * EPS32)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    y = random(131, 40, seed=7)
    rotation = torch.linalg.qr(random(40, 40, seed=8))[0]
    cka = pairwise_cka(torch.stack([y, 1e6 * (y @ rotation) + 1e6, 1e-20 * y]))
    np.testing.assert_allclose(cka.numpy(), 1.0, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cka_of_constant_outputs_is_zero(dtype: torch.dtype) -> None:
    y = random(4, 131, 24, seed=9).to(dtype)
    y[1] = 0
    y[2] = random(24, seed=10).to(dtype) * 1000 + 0.1
    cka = pairwise_cka(y)
    for dead in (1, 2):
        assert cka[dead].nonzero().flatten().tolist() == [dead]
    assert cka[0, 3] > 0


def test_cka_reads_strided_input_and_refuses_others() -> None:
    y = random(131, 3, 24, seed=11).transpose(0, 1)
    torch.testing.assert_close(pairwise_cka(y), pairwise_cka(y.contiguous()))
    with pytest.raises(ValueError, match=r"must be a floating \[E, S, H\]"):
        pairwise_cka(torch.zeros(3, 4))


CONFIGS = [(e, dtype, arch) for e in range(1, 514) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32)
           for arch in (A100, H100, B200)]  # fmt: skip


def test_tiles_are_the_upper_triangle() -> None:
    """Every tile on or above the diagonal once, of blocks that hold all experts, three to a program at most."""
    for experts, dtype, arch in CONFIGS:
        config = pick_gram(experts, 10**6, 1, dtype, arch)
        tiles = [tile for program in config.tiles() for tile in program]
        assert sorted(tiles) == [(i, j) for i in range(config.blocks) for j in range(i, config.blocks)]
        assert (config.blocks - 1) * config.block < experts <= config.side
        assert max(len(program) for program in config.tiles()) <= 3
        rows = max(sum({b: config.block for tile in program for b in tile}.values()) for program in config.tiles())
        assert rows * config.step * dtype.itemsize * config.stages <= arch.shared_bytes
        assert config.chunk <= CHAIN
        assert config.chunk % config.step == 0


def test_one_program_owns_all_tiles_of_256_experts() -> None:
    for experts, dtype, arch in CONFIGS:
        config = pick_gram(experts, 10**6, 1, dtype, arch)
        traffic = gram_traffic(experts, 10**6, 1, dtype, config)
        assert traffic.read == experts * 10**6 * dtype.itemsize
        if dtype == torch.bfloat16 and experts <= 256:
            assert config.programs == 1
            assert traffic.fetched == traffic.read
        if dtype == torch.bfloat16 and experts <= 384:
            assert traffic.fetched <= 2 * traffic.read
        if experts <= 64:
            assert config.side < max(2 * experts, 17)


@pytest.mark.parametrize("arch", [A100, H100, B200], ids=lambda arch: arch.name)
@pytest.mark.parametrize(("length", "chain"), [(1, 128), (100, 128), (10**6, 1000), (10**6, 4096), (10**5, 50)])
def test_a_chain_that_is_asked_for_is_kept(arch: Arch, length: int, chain: int) -> None:
    """In whole steps, whatever the device and the number of columns, which windows rely on."""
    config = pick_gram(131, length, 1, torch.bfloat16, arch, chain=chain, exact=True)
    assert config.chunk == max(config.step, chain // config.step * config.step)


GRAMS = {"deepseek-v3": (256, 44_040_192, 1), "qwen3-30b-a3b": (128, 4_718_592, 1), "all of it": (128, 4_718_592, 48)}


@pytest.mark.parametrize("name", GRAMS)
def test_grams_come_within_a_twentieth_of_reading_the_weights(name: str) -> None:
    """The model's time, partial sums and waves that are not full included, over one read of the weights."""
    experts, length, layers = GRAMS[name]
    config = pick_gram(experts, length, layers, torch.bfloat16, H100)
    traffic = gram_traffic(experts, length, layers, torch.bfloat16, config)
    seconds = gram_seconds(traffic, length, layers, config, H100)
    assert traffic.read == layers * experts * length * 2
    assert seconds <= 1.05 * traffic.read / H100.bandwidth
    if layers == 48:
        assert seconds <= 20.3e-3


def test_bias_of_sums_that_truncate() -> None:
    """Tensor cores round the float32 sum toward zero at every step of 16 products: squares come out too small."""
    rng = np.random.default_rng(0)
    config: GramConfig = pick_gram(256, 44_040_192, 1, torch.bfloat16, H100)
    steps = config.chunk // 16
    assert CHAIN // 16 >= steps >= CHAIN // 32
    total, exact = np.zeros(64, np.float32), np.zeros(64)
    for _ in range(CHAIN // 16):
        x = torch.from_numpy(rng.standard_normal((64, 16))).bfloat16().double().numpy()
        added = total + (x * x).sum(1)  # in float64
        rounded = added.astype(np.float32)
        total = np.where(rounded > added, np.nextafter(rounded, np.float32(0)), rounded)
        exact += (x * x).sum(1)
    bias = (total / exact - 1).mean()
    assert -5e-5 <= bias < -1e-6  # and it is there: a rounding sum would be within 1e-7
