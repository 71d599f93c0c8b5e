"""Makes torch, oneDNN, MKL and vLLM keep to the instruction set that `TOKENMILL_ISA` allows.

So that a machine with AVX-512 can run and test what an AVX2-only machine would run.
"""

import os

from tokenmill import env, platform

#: Environment variables by the widest level allowed; MKL knows two levels.
_LIMITS: dict[str, dict[str, str]] = {
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx_vnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_vnni": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}
#: Questions that vLLM asks torch to choose its libraries and kernels, and the level each needs.
_QUESTIONS: dict[str, str] = {
    "_is_avx2_supported": "avx2",
    "_is_avx512_supported": "avx512",
    "_is_vnni_supported": "avx512_vnni",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx",
    "_is_amx_fp16_supported": "",
}


def narrow() -> None:
    """Applies `TOKENMILL_ISA` to this process and, through the environment, to its children.

    Call it before anything is computed with torch and before vLLM is imported: both choose once. Without
    `TOKENMILL_ISA` it does nothing. vLLM has no build below AVX2: its own code stays at AVX2 under `plain`.

    Raises:
        ConfigurationError: `TOKENMILL_ISA` is not a level.
    """
    if not env.ISA.get():
        return
    import torch

    levels = platform.isa_levels()
    os.environ.update(_LIMITS[levels[-1]])
    for question, level in _QUESTIONS.items():
        if level not in levels and hasattr(torch.cpu, question):
            setattr(torch.cpu, question, _no)


def _no() -> bool:
    return False
