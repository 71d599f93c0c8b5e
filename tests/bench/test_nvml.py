"""NVML is spoken to by its C interface; a library with that interface stands in for the driver's."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tokenmill.bench import nvml

DRIVER = r"""
#include <stdint.h>
#include <string.h>
static char card;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** out) { *out = &card; return index == 0 ? 0 : 2; }
int nvmlDeviceGetTotalEnergyConsumption(void* d, unsigned long long* mj) {
    *mj = 5000000000123ULL; return d == &card ? 0 : 2; }
int nvmlDeviceGetClockInfo(void* d, unsigned type, unsigned* mhz) { *mhz = 1000 * type; return d == &card ? 0 : 2; }
int nvmlDeviceGetTemperature(void* d, unsigned sensor, unsigned* c) { return 3; /* not supported */ }
int nvmlDeviceGetPowerUsage(void* d, unsigned* mw) { *mw = 345678; return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned length) { strncpy(text, "580.1", length); return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    source = folder / "nvml.c"
    source.write_text(DRIVER)
    target: Path = folder / "libnvml.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return str(target)


def test_figures_in_their_units(library: str) -> None:
    card = nvml.Device(0, library)
    assert card.joules() == 5_000_000_000.123
    assert card.state() == {"sm_mhz": 1000, "memory_mhz": 2000, "watts": 345}, "what is not supported is absent"
    assert card.driver() == "580.1"


def test_no_such_gpu(library: str) -> None:
    with pytest.raises(OSError, match="no GPU 1"):
        nvml.Device(1, library)


def test_no_driver() -> None:
    with pytest.raises(OSError, match="libnonesuch"):
        nvml.Device(0, "libnonesuch.so")
