"""GPUs as the models of time see them: published specifications and microbenchmarks, none fitted to a goal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A GPU as the model sees it."""

    name: str
    capability: int  # 80, 90, 100: which kernels can run
    sms: int
    clock: float  # Hz
    shared_bytes: int  # most shared memory of one CTA
    bandwidth: float  # bytes/s of HBM
    flops: float  # dense bf16 FLOP/s that a good kernel reaches


A100 = Arch("A100", 80, 108, 1.41e9, 163 * 1024, 1.8e12, 270e12)
H100 = Arch("H100", 90, 132, 1.83e9, 227 * 1024, 3.0e12, 800e12)
B200 = Arch("B200", 100, 148, 1.96e9, 227 * 1024, 7.2e12, 1800e12)


@dataclass(frozen=True)
class Generation:
    """What `Arch` does not say; the same for all GPUs of a capability."""

    mma: int  # bf16 multiply-adds per clock and SM of the widest instruction (mma.sync, wgmma, tcgen05)
    mma_sync: int  # the same through mma.sync: 0.62 of wgmma on Hopper, as published microbenchmarks have it
    fma: int  # float32 multiply-adds per clock and SM, without tensor cores
    l2_rate: float  # bytes per clock from L2 to all SMs: a share of the 5,120 nominal; twice that assumed for two dies
    l2_bytes: float
    latency: float  # s from a load to its data, HBM under load
    l2_latency: float  # s, the same where L2 has it
    gap: float  # s between the end of a kernel and the start of the next one in a CUDA graph


# What L2 gives of its nominal rate is what GEMMs without multicast were measured to draw from it on an H100. Triton's
# persistent float8 one (its pull request 5461, 8192 x 8192 x 4096 by tiles of 128 x 256) takes 3.22 GB in 408 us, in
# 15.5 of 16 waves: 8.15 TB/s, 0.87 of nominal at 1.83 GHz. A bfloat16 one of pranjalssh/fast.cu (kernel 6, 6144^3 by
# 192 x 192) takes 4.83 GB in 605 us. Multicast, with a third less to take, gained such a GEMM 0.6 % at 7.9 TB/s
# (facebookexperimental/triton 1065), so that L2 was not yet its bound. The other generations are taken to be alike.
_L2_SHARE = 0.87
GENERATIONS = {
    80: Generation(1024, 1024, 64, _L2_SHARE * 5120, 40e6, 0.8e-6, 0.3e-6, 1.2e-6),
    90: Generation(2048, 1270, 128, _L2_SHARE * 5120, 50e6, 0.8e-6, 0.3e-6, 1.0e-6),
    100: Generation(4096, 1024, 128, _L2_SHARE * 10240, 126e6, 0.8e-6, 0.3e-6, 1.0e-6),
}
SHARED_RATE = 128  # bytes per clock and SM
SPECIAL_RATE = 16  # exponentials or reciprocals per clock and SM


def l2_bandwidth(arch: Arch) -> float:
    """bytes/s from L2 to the SMs."""
    return GENERATIONS[arch.capability].l2_rate * arch.clock


def launch_seconds(arch: Arch) -> float:
    """A kernel after another, up to the first data by way of one index."""
    generation = GENERATIONS[arch.capability]
    return generation.gap + generation.latency + generation.l2_latency
