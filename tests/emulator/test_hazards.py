"""Every rule of the hardware that a kernel can break is reported by name, and kernels that break none are clean."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tokenmill.kernels.emulator import ASYNC_MODES, EmulatedLibrary

pytestmark = pytest.mark.emulator


@dataclass(frozen=True)
class Bug:
    """Bug `number` of a scenario, the kind of report it must give (one of several), and a phrase that explains it."""

    scenario: str
    number: int
    kind: str
    teaches: str

    def __str__(self) -> str:
        return f"{self.scenario}-{self.number}"


BUGS = (
    Bug("exchange", 1, "RACE", "a barrier between them"),
    Bug("exchange", 2, "OUT OF BOUNDS", "shared memory"),
    Bug("halves", 1, "RACE", "2 bytes at hazards.cu"),
    Bug("halves", 2, "UNWRITTEN", "static shared memory + 128"),
    Bug("lanes", 1, "RACE", "__syncwarp()"),
    Bug("copies", 1, "OUT OF BOUNDS", "136 bytes of global memory"),
    Bug("copies", 2, "RACE", "write"),
    Bug("divergence", 1, "DEADLOCK", "lanes 0xffff0000 have not come"),
    Bug("divergence", 2, "SHUFFLE", "not in the mask"),
    Bug("divergence", 3, "MASK", "leaves out"),
    Bug("divergence", 4, "DEADLOCK", "lanes 0xffff0000 of the warp have not come"),
    Bug("divergence", 5, "DIVERGENT", "barrier 1 of 32 threads"),
    Bug("named_barriers", 1, "RACE", "named_bar_sync"),
    Bug("named_barriers", 2, "BARRIER", "others wait at it for"),
    Bug("registers", 1, "DEADLOCK", "setmaxnreg.inc"),
    Bug("registers", 2, "WARPGROUP", "all four warps"),
    Bug("bulk_pipeline", 1, "DEADLOCK", "1 arrivals and 0 bytes outstanding"),
    Bug("bulk_pipeline", 2, "MBARRIER", "fence_mbar_init()"),
    Bug("bulk_pipeline", 3, "MBARRIER", "mbar_init"),
    Bug("bulk_pipeline", 4, "RACE", "mbar_wait"),
    Bug("bulk_pipeline", 5, "TRANSACTIONS", "mbar_arrive_tx with all bytes"),
    Bug("bulk_pipeline", 6, "DEADLOCK", "128 bytes outstanding"),
    Bug("bulk_pipeline", 7, "OUT OF BOUNDS", "global memory"),
    Bug("bulk_pipeline", 8, "RACE or DEADLOCK", "mbarrier"),
    Bug("bulk_pipeline", 9, "RACE or DEADLOCK", "mbarrier"),
    Bug("bulk_pipeline", 10, "RACE", "reads"),
    Bug("bulk_pipeline", 11, "RACE or DEADLOCK", "mbarrier"),
    Bug("bulk_pipeline", 12, "MBARRIER AS DATA", "mbar_inval"),
    Bug("bulk_pipeline", 13, "MBARRIER", "no initialised mbarrier"),
    Bug("store", 1, "RACE", "fence_proxy_async()"),
    Bug("store", 2, "RACE", "a barrier between them"),
    Bug("store", 3, "EXIT", "bulk_wait_read<0>()"),
    Bug("store", 4, "RACE", "bulk_wait<0>()"),
    Bug("global_proxy", 1, "RACE", "fence_proxy_async_global()"),
    Bug("global_proxy", 2, "RACE", "fence_proxy_async_global()"),
    Bug("cp_async", 1, "RACE", "cp_async_wait<N>()"),
    Bug("cp_async", 2, "RACE", "cp_async_wait<N>()"),
    Bug("cp_async", 4, "RACE", "cp_async_wait<N>()"),
    Bug("cp_async", 5, "EXIT", "cp.asyncs"),
    Bug("cluster_exchange", 1, "CLUSTER", "may not have started"),
    Bug("cluster_exchange", 2, "RACE", "cluster_sync()"),
    Bug("cluster_exchange", 3, "RACE", "cluster_sync()"),
    Bug("cluster_exchange", 4, "CLUSTER", "exited"),
    Bug("multicast", 1, "MBARRIER", "cluster"),
    Bug("multicast", 2, "RACE", "writes asynchronously"),
    Bug("multicast", 3, "RACE", "reads, by CTA"),
    Bug("flag", 1, "RACE", "a release after that access"),
    Bug("flag", 2, "RACE", "too narrow a scope"),
    Bug("flag", 3, "RACE", "an acquire before"),
    Bug("flag", 4, "DEADLOCK", "value 1"),
    Bug("flag", 5, "RACE", "too narrow a scope"),
    Bug("flag", 6, "RACE", "a release after that access"),
    Bug("grid_barrier", 1, "DEADLOCK", "only a cooperative launch"),
    Bug("grid_barrier", 2, "LAUNCH", "132 SMs"),
    Bug("dependent_pair", 1, "RACE", "griddep_wait()"),
    Bug("dependent_pair", 2, "RACE", "the grid before this one"),
    Bug("dependent_pair", 3, "RACE", "griddep_wait()"),
    Bug("dependent_pair", 4, "RACE", "griddep_wait()"),
    Bug("wgmma_rules", 1, "RACE", "fence_proxy_async()"),
    Bug("wgmma_rules", 2, "RACE", "a barrier between them"),
    Bug("wgmma_rules", 3, "FENCE", "no wgmma_fence()"),
    Bug("wgmma_rules", 4, "FENCE", "an accumulator"),
    Bug("wgmma_rules", 5, "DESCRIPTOR", "inside a swizzle pattern"),
    Bug("wgmma_rules", 6, "WARPGROUP", "do different things"),
    Bug("wgmma_rules", 7, "OUT OF BOUNDS", "wgmma B"),
    Bug("wgmma_rules", 8, "REGISTERS IN USE", "an A fragment"),
    Bug("wgmma_rules", 9, "REGISTERS IN USE", "an accumulator"),
    Bug("wgmma_rules", 10, "RACE", "wgmma_wait<0>()"),
    Bug("wgmma_rules", 11, "EXIT", "wgmmas in flight"),
    Bug("refused", 1, "LAUNCH", "1 to 1024"),
    Bug("refused", 2, "LAUNCH", "232448"),
    Bug("refused", 3, "LAUNCH", "clusters of 3"),
    Bug("refused", 4, "LAUNCH", "0 CTAs"),
    Bug("refused", 5, "WILD POINTER", "device memory"),
    Bug("refused", 6, "TRAP", "hazards.cu"),
)
CORRECT = (*((name, 0) for name in dict.fromkeys(bug.scenario for bug in BUGS)), ("flag", 7), ("cp_async", 3))


def run(library: EmulatedLibrary, scenario: str, number: int, **settings: object) -> tuple[int, str, torch.Tensor]:
    """Status, reports and the 64 words afterwards."""
    library.reset()
    library.configure(**settings)  # type: ignore[arg-type]
    data = library.upload(torch.zeros(64, dtype=torch.int32))
    status = library.call(scenario, data, number, None)
    return status, library.reports(), library.download(data, (64,), torch.int32)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bug_is_named_in_every_mode(kernels: Callable[[str], EmulatedLibrary], bug: Bug) -> None:
    library = kernels("hazards")
    for mode in ASYNC_MODES:
        for seed in (1, 2):
            status, reports, _ = run(library, bug.scenario, bug.number, seed=seed, mode=mode)
            assert status, f"{bug} went unnoticed in mode {mode}, seed {seed}"
            lines = reports.splitlines()
            kinds = tuple(f"{kind}:" for kind in bug.kind.split(" or "))
            assert any(line.startswith(kinds) for line in lines), reports
            assert bug.teaches in reports, reports
            assert len(lines) <= 48, reports


@pytest.mark.parametrize(("scenario", "number"), CORRECT)
def test_correct_kernel_is_clean(kernels: Callable[[str], EmulatedLibrary], scenario: str, number: int) -> None:
    library = kernels("hazards")
    for mode in ASYNC_MODES:
        for seed in range(1, 9):
            status, reports, _ = run(library, scenario, number, seed=seed, mode=mode, resident_ctas=1 + seed % 3 * 2)
            assert (status, reports) == (0, ""), f"mode {mode}, seed {seed}"


def test_predecessor_data_is_absent_until_the_wait(kernels: Callable[[str], EmulatedLibrary]) -> None:
    library = kernels("hazards")
    results = []
    for bug in (0, 3):
        library.reset()
        library.configure()
        data = library.upload(torch.arange(64, dtype=torch.int32))
        library.predecessor_writes(data, 128)
        assert (library.call("dependent", data, bug, None) == 0) == (bug == 0)
        results.append(library.download(data, (64,), torch.int32)[32:])
    assert torch.equal(results[0], torch.arange(1, 33, dtype=torch.int32))
    assert bool((results[1] == 0).all()), "without a wait the kernel finds poison (-1), not the data"


def test_same_seed_same_run(kernels: Callable[[str], EmulatedLibrary]) -> None:
    library = kernels("hazards")
    seen = []
    for seed in (3, 3, *range(4, 12)):
        run(library, "multicast", 0, seed=seed)
        seen.append(library.statistics())
    assert seen[0] == seen[1]
    assert len(set(seen)) > 1
