"""What `tokenmill kernels prove` runs for the INT4 GEMM kernels: cases, the float64 check, mutants, static gates."""

import ctypes
import random
from collections.abc import Mapping
from typing import Any

import torch

from tokenmill.kernels.emulator import CSRC, EmulatedLibrary
from tokenmill.kernels.gates import Gate
from tokenmill.kernels.int4_gemm import cuda_call
from tokenmill.kernels.int4_gemm.layout import CudaWeight, pack
from tokenmill.kernels.int4_gemm.mutants import MMA_SYNC_MUTANTS, SM90_MUTANTS
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes
from tokenmill.kernels.numerics import gamma, unit_roundoff
from tokenmill.kernels.prove import Proof

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def case(M: int, N: int, K: int, **changes: Any) -> dict[str, Any]:
    """One launch: sizes, and what differs from a symmetric bfloat16 weight with groups of 128.

    Keys: group (-1: per channel), zeros, act_order, dtype, token_tile, splits, dependent (programmatic dependent
    launch after a grid that writes x).
    """
    usual = {"group": 128, "zeros": False, "act_order": False, "dtype": "bfloat16", "splits": 1, "dependent": False}
    return {"M": M, "N": N, "K": K, **usual, **changes}


#: The one form that mutants are compiled for (INT4_GEMM_NARROW). Their first case wraps the pipeline twice and is
#: ragged in M, N and K; the second splits K.
_NARROW = {"group": 32, "zeros": True, "dtype": "bfloat16"}

SM90_CASES = (
    case(70, 200, 1112, token_tile=64, zeros=True, group=32, dependent=True),
    case(64, 128, 2240, token_tile=64, splits=2, dtype="float16", group=64),
    case(130, 136, 1096, token_tile=128, zeros=True, dtype="float16", dependent=True),
    case(40, 129, 1088, token_tile=64, group=-1, act_order=False),
    case(257, 72, 720, token_tile=256, group=32, splits=1),
    case(33, 64, 1200, token_tile=64, group=48, act_order=True, zeros=True),
    case(1, 1, 8, token_tile=64),
    case(0, 64, 64, token_tile=64),
)
SM90_MUTANT_CASES = (
    case(40, 100, 1112, token_tile=64, dependent=True, **_NARROW),
    case(64, 128, 384, token_tile=64, splits=2, **_NARROW),
)
MMA_SYNC_CASES = (
    case(5, 200, 1112, token_tile=8, zeros=True, group=32, dependent=True),
    case(1, 136, 2200, token_tile=8, splits=2),
    case(20, 130, 1090, token_tile=16, dtype="float16", group=64, zeros=True),
    case(32, 128, 1792, token_tile=32, dtype="float16", group=-1, splits=2, dependent=True),
    case(70, 72, 720, token_tile=64, zeros=True, splits=1),
    case(3, 65, 1200, token_tile=8, group=48, act_order=True),
    case(1, 1, 1, token_tile=8),
    case(0, 64, 64, token_tile=8),
)
MMA_SYNC_MUTANT_CASES = (
    # 17 tiles: the last one lies in the stage that the epilogue overwrites
    case(5, 69, 1079, token_tile=16, dependent=True, **_NARROW),
    case(16, 128, 384, token_tile=16, splits=3, **_NARROW),
)
#: Pipeline stages of each token tile, to draw cases that wrap them twice.
_STAGES = {"sm90": {64: 8, 128: 8, 256: 5}, "mma_sync": {8: 8, 16: 8, 32: 6, 64: 5}}


def random_case(kernel: str, rng: random.Random) -> dict[str, Any]:
    """A case that wraps the kernel's pipeline at least twice in every split."""
    token_tile = rng.choice(cuda_call.TOKEN_TILES[kernel])
    splits = rng.choice((1, 1, 2, 3)) if token_tile < 128 else 1
    tiles = splits * (2 * _STAGES[kernel][token_tile] + 1) + rng.randrange(3)
    return case(
        M=rng.randint(1, token_tile + token_tile // 4),
        N=rng.choice((rng.randint(1, 128), rng.randint(1, 200))),
        K=64 * tiles - rng.randrange(64),
        group=rng.choice((-1, 16, 32, 64, 96, 128, 256)),
        zeros=rng.random() < 0.5,
        act_order=rng.random() < 0.2,
        dtype=rng.choice(("float16", "bfloat16")),
        token_tile=token_tile,
        splits=splits,
        dependent=rng.random() < 0.5,
    )


def _weight(case: Mapping[str, Any], generator: torch.Generator) -> Int4Weight:
    K, N = case["K"], case["N"]
    size = K if case["group"] == -1 else min(case["group"], K)
    G = -(-K // size)
    g_idx = (torch.arange(K) // size).to(torch.int32)
    return Int4Weight(
        codes=pack_codes(torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8)),
        scales=(torch.rand(G, N, generator=generator) * 0.02 + 0.01).to(_DTYPES[case["dtype"]]),
        group_size=size,
        K=K,
        zeros=torch.randint(0, 16, (G, N), generator=generator, dtype=torch.uint8) if case["zeros"] else None,
        g_idx=g_idx[torch.randperm(K, generator=generator)] if case["act_order"] else None,
    )


def error_bound(
    x: torch.Tensor, dequantized: torch.Tensor, exact: torch.Tensor, weight: CudaWeight, rounds_weights: bool
) -> torch.Tensor:
    """[M, N] float64: how far a kernel may be from the exact product.

    Products of 16-bit numbers are exact in float32; a sum of K of them and of the groups' scaled sums loses at most
    gamma of the magnitudes, twice that because tensor cores may truncate; the Hopper kernel rounds each weight to the
    dtype of x; the result is rounded once.
    """
    magnitudes = x.double().abs() @ dequantized.abs()
    terms = weight.padded_depth + weight.scales.shape[1]
    relative = 2 * gamma(terms, torch.float32) + (unit_roundoff(x.dtype) if rounds_weights else 0.0)
    inner = relative * magnitudes
    return inner + unit_roundoff(x.dtype) * (exact.abs() + inner) + torch.finfo(x.dtype).smallest_normal


def check(library: EmulatedLibrary, kernel: str, case: Mapping[str, Any], seed: int) -> str | None:
    """Launches one case on seeded data; None, or what is wrong with the numbers it left."""
    generator = torch.Generator().manual_seed(seed)
    M, N, K, dtype = case["M"], case["N"], case["K"], _DTYPES[case["dtype"]]
    weight = _weight(case, generator)
    packed = pack(weight, dtype)
    x = torch.randn(M, K, generator=generator).to(dtype)
    launch = cuda_call.Plan(kernel, case["token_tile"], case["splits"])
    ordered = cuda_call.arranged(x, packed)
    x_stride, y_stride = cuda_call.padded_stride(ordered.shape[1]), cuda_call.padded_stride(N + 3)
    rows = torch.full((M, x_stride), float("nan"), dtype=dtype)  # what lies between rows must not matter
    rows[:, : ordered.shape[1]] = ordered
    block = cuda_call.arguments(packed, dtype, M, x_stride, y_stride, launch, bool(case["dependent"]))
    block.x = library.upload(rows)
    block.words, block.scales = library.upload(packed.words), library.upload(packed.scales)
    block.zeros = None if packed.zeros is None else library.upload(packed.zeros)
    block.y = library.allocate(max(M, 1) * y_stride * 2)
    tickets = torch.zeros(cuda_call.tickets(packed, M, launch), dtype=torch.int32)
    if launch.splits > 1:
        block.workspace = library.allocate(4 * cuda_call.workspace_floats(packed, M, launch))
        block.tickets = library.upload(tickets)
    if case["dependent"]:
        library.predecessor_writes(block.x, rows.numel() * 2)
        library.predecessor_writes(block.y, M * y_stride * 2)
        if launch.splits > 1:
            library.predecessor_writes(block.workspace, 4 * cuda_call.workspace_floats(packed, M, launch))
    status = library.call(f"tokenmill_int4_gemm_{kernel}", ctypes.byref(block), None)
    if status < 0:
        return f"the launcher refused with {status}"
    result = library.download(block.y, (M, y_stride), dtype)
    if not bool((result[:, N:].contiguous().view(torch.int16) == -1).all()):
        return "memory behind the output's rows was written"
    if tickets.numel() and library.download(block.tickets, tickets.shape, torch.int32).any():
        return "a ticket is not zero afterwards"
    dequantized = dequantize(weight)
    exact = x.double() @ dequantized
    error = (result[:, :N].double() - exact).abs()
    wrong = ~(error <= error_bound(x, dequantized, exact, packed, rounds_weights=kernel == "sm90"))
    if wrong.any():
        m, n = (int(i) for i in wrong.nonzero()[0])
        return (
            f"{int(wrong.sum())} of {wrong.numel()} values are wrong; the first at [{m}, {n}]: "
            f"{float(result[m, n]):.6g}, expected {float(exact[m, n]):.6g}"
        )
    return None


SM90 = Proof(
    name="int4_gemm_sm90",
    summary="TMA, mbarriers, wgmma with the weights in registers",
    root=CSRC,
    source="int4_gemm/sm90.cu",
    check=lambda library, case, seed: check(library, "sm90", case, seed),
    cases=SM90_CASES,
    random_case=lambda rng: random_case("sm90", rng),
    mutants=SM90_MUTANTS,
    mutant_cases=SM90_MUTANT_CASES,
    mutant_defines=("INT4_GEMM_NARROW",),
    gates=(
        Gate(
            CSRC / "int4_gemm/sm90.cu",
            ("90a",),
            required={"HGMMA": 16, "UTMALDG": 1, "UTMASTG": 1, "UBLKCP": 4, "STSM": 4, "USETMAXREG": 2, "ACQBULK": 1},
            max_registers=168,
        ),
    ),
)
MMA_SYNC = Proof(
    name="int4_gemm_mma_sync",
    summary="cp.async and mma.sync, for few tokens and every GPU from sm_80",
    root=CSRC,
    source="int4_gemm/mma_sync.cu",
    check=lambda library, case, seed: check(library, "mma_sync", case, seed),
    cases=MMA_SYNC_CASES,
    random_case=lambda rng: random_case("mma_sync", rng),
    mutants=MMA_SYNC_MUTANTS,
    mutant_cases=MMA_SYNC_MUTANT_CASES,
    mutant_defines=("INT4_GEMM_NARROW",),
    gates=(
        Gate(
            CSRC / "int4_gemm/mma_sync.cu",
            ("80", "89"),
            required={"HMMA": 4, "LDGSTS": 2, "LDSM": 2},
            max_registers=128,
        ),
        Gate(
            CSRC / "int4_gemm/mma_sync.cu",
            ("90a", "100a", "120a"),
            required={"HMMA": 4, "LDGSTS": 2, "LDSM": 2, "ACQBULK": 1, "PREEXIT": 1},
            max_registers=128,
        ),
    ),
)
