"""`TOKENMILL_ISA` narrows what torch and vLLM choose; each case in a process of its own, as the choice is made once."""

import json
import os
import subprocess
import sys

import pytest

from tokenmill import env, platform

PROBE = """
import json
from tokenmill.engine.vllm import isa
isa.narrow()
import torch
torch.ones(2).sum()
questions = {name: getattr(torch.cpu, name)() for name in isa._QUESTIONS if hasattr(torch.cpu, name)}
print(json.dumps({"torch": torch.backends.cpu.get_cpu_capability(), **questions}))
"""
#: What torch calls the widest vector code it uses under each level.
TORCH_NAME = {"plain": "DEFAULT", "avx2": "AVX2", "avx_vnni": "AVX2"}


@pytest.mark.parametrize("level", env.ISA_LEVELS)
def test_narrowed(level: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROBE], env=os.environ | {"TOKENMILL_ISA": level}, capture_output=True, check=True
    )
    found = json.loads(ended.stdout)
    flags = platform.cpu_flags()
    allows = env.ISA_LEVELS.index(level) >= env.ISA_LEVELS.index("avx512")
    expected = TORCH_NAME.get(level) or ("AVX512" if "avx512f" in flags else "AVX2")
    assert found["torch"] == expected
    assert found["_is_avx512_supported"] == (allows and "avx512f" in flags)
    assert found["_is_avx512_bf16_supported"] == (level in ("avx512_bf16", "amx") and "avx512_bf16" in flags)
    assert found["_is_amx_tile_supported"] == (level == "amx" and "amx_tile" in flags)
