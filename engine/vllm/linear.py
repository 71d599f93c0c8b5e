"""INT4 linear layers by our GEMM: first in vLLM's list of kernels, and for GPTQ layers that stock refuses."""

from tokenmill.engine.vllm import compat
from tokenmill.engine.vllm.hooks import HookStatus


def install() -> HookStatus:
    """Offers the kernel to vLLM before its own; says what typical INT4 layers would run on, or why not on ours."""
    import torch

    from tokenmill.engine.vllm import linear_checkpoint, linear_kernel

    dtype = torch.bfloat16
    reason = linear_kernel.why_not(4096, 4096, 128, symmetric=True, dtype=dtype)
    if reason:
        return HookStatus("linear", "refused", f"vLLM's own kernels run INT4 layers: {reason}")
    kernels = compat.POSSIBLE_KERNELS.resolve().setdefault(compat.CURRENT_PLATFORM.resolve()._enum, [])
    if linear_kernel.TokenmillLinearKernel not in kernels:
        kernels.insert(0, linear_kernel.TokenmillLinearKernel)
    linear_checkpoint.install()
    if compat.series(compat.vllm_version()) == "0.32":
        from tokenmill.engine.vllm import linear_gptq

        linear_gptq.install()
        if compat.on_cpu():
            from tokenmill.engine.vllm import linear_experts

            linear_experts.install()
    return HookStatus("linear", "active", "ready for INT4 layers (GPTQ, AWQ, compressed-tensors)")
