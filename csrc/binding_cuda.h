// What every csrc/<op>/binding_cuda.cpp needs: torch's current stream, and launch results as errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

// Absent from CPU builds of torch, where the library must load all the same; a CUDA tensor implies that it is there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace tokenmill {

// Makes the tensor's device current and holds torch's current stream of it, for the length of one launch.
class DeviceScope {
  public:
    explicit DeviceScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
    }

    void* stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

// A launcher's result: 0, a negative CUDA error, or a refusal of its own (below -1000), which names the argument check
// that Python should have made.
inline void check_launch(int status, const char* launcher) {
    if (status <= -1000) {
        STD_TORCH_CHECK(false, launcher, " refuses its arguments with status ", status);
    }
    if (status != 0) {
        STD_TORCH_CHECK(false, launcher, ": ", cudaGetErrorString(static_cast<cudaError_t>(-status)));
    }
}

}  // namespace tokenmill
