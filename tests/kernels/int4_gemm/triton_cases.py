"""What the Triton kernels are run on, in Triton's interpreter and on a GPU, and how their results are judged.

As a program, ``TRITON_INTERPRET=1 python triton_cases.py`` runs every case in the interpreter, in float16 because the
interpreter's bfloat16 is wrong, and prints a JSON line for each: its number, and what is wrong with it or null.
"""

import json
from dataclasses import dataclass

import torch

from tokenmill.kernels.int4_gemm import configs
from tokenmill.kernels.int4_gemm.layout import CudaWeight, pack
from tokenmill.kernels.int4_gemm.proof import error_bound
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize, pack_codes
from tokenmill.kernels.numerics import Fenced, assert_bit_equal, assert_within


@dataclass(frozen=True)
class Case:
    """One product; group -1 is per channel. The family and the multiprocessors decide how it is planned."""

    M: int
    N: int
    K: int
    group: int = 128
    zeros: bool = False
    act_order: bool = False
    bias: bool = False
    family: str = "sm90"
    sm_count: int = 4

    def weight(self, dtype: torch.dtype) -> Int4Weight:
        generator = torch.Generator().manual_seed(self.K + self.N)
        size = self.K if self.group == -1 else min(self.group, self.K)
        G = -(-self.K // size)
        g_idx = (torch.arange(self.K) // size).to(torch.int32)[torch.randperm(self.K, generator=generator)]
        zeros = torch.randint(0, 16, (G, self.N), generator=generator, dtype=torch.uint8)
        return Int4Weight(
            codes=pack_codes(torch.randint(0, 16, (self.K, self.N), generator=generator, dtype=torch.uint8)),
            scales=(torch.rand(G, self.N, generator=generator) * 0.02 + 0.01).to(dtype),
            group_size=size,
            K=self.K,
            zeros=zeros if self.zeros else None,
            g_idx=g_idx if self.act_order else None,
            bias=torch.randn(self.N, generator=generator).to(dtype) if self.bias else None,
        )

    def activations(self, dtype: torch.dtype, device: str) -> torch.Tensor:
        """[M, K] columns of a wider matrix whose other columns are NaN."""
        generator = torch.Generator().manual_seed(self.M)
        wide = torch.full((self.M, self.K + 48), float("nan"), dtype=dtype)
        wide[:, : self.K] = torch.randn(self.M, self.K, generator=generator).to(dtype)
        return wide.to(device)[:, : self.K]


CASES = (
    Case(1, 136, 2048, sm_count=8),  # two tiles a step, four splits
    Case(2, 128, 1152, zeros=True, bias=True),  # splits of five and four steps
    Case(16, 128, 1024, group=-1, zeros=True, bias=True),
    Case(5, 67, 100, group=32, zeros=True, bias=True),  # nothing is a multiple of anything
    Case(3, 65, 1200, group=48, act_order=True),  # groups filled up to 64 rows
    Case(4, 130, 512, act_order=True, zeros=True),
    Case(20, 130, 1090, group=64, zeros=True),
    Case(33, 72, 192, group=64, bias=True),
    Case(40, 64, 2048, zeros=True, sm_count=8),  # scaled weights, split
    Case(130, 136, 320, zeros=True, bias=True),
    Case(150, 64, 256, group=32, family="sm80"),
    Case(7, 200, 512, zeros=True, family="sm100", sm_count=8),
    Case(1, 1, 1),
    Case(0, 64, 64),
)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Multiplies twice into poisoned memory between fences; AssertionError says what is wrong."""
    from tokenmill.kernels.int4_gemm import triton_impl

    weight = case.weight(dtype)
    packed = pack(weight.to(device), dtype)
    multiply = triton_impl.multiplier(packed, case.sm_count, case.family)
    x = case.activations(dtype, device)
    bias = None if weight.bias is None else weight.bias.to(device)
    results = []
    for _ in range(2):
        fenced = Fenced((case.M, case.N), dtype, device)
        multiply(x, fenced.tensor, bias)
        fenced.check()
        results.append(fenced.tensor.cpu())
    assert_bit_equal(results[1], results[0], "the second run")
    judge(results[0], x.cpu(), weight, packed, case)


def judge(y: torch.Tensor, x: torch.Tensor, weight: Int4Weight, packed: CudaWeight, case: Case) -> None:
    """y against float64 from the same codes, within what the dtypes explain; AssertionError names the first value."""
    dense = dequantize(weight)
    exact = x.double() @ dense
    if weight.bias is not None:
        exact += weight.bias.double()
    rounds_weights = case.M > 0 and configs.plan(case.M, packed, case.sm_count, case.family).config.scale_weights
    bound = error_bound(x, dense, exact, packed, rounds_weights) + exact.abs() * 2**-23  # adding the bias
    assert_within(y, exact, bound)


def main() -> None:
    """Runs every case in the interpreter."""
    for number, case in enumerate(CASES):
        wrong = None
        try:
            check(case, torch.float16, "cpu")
        except AssertionError as error:
            wrong = str(error)
        print(json.dumps({"case": number, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
