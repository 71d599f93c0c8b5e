// INT4 GEMM for torch, CPU side. Shapes, dtypes and ranges were checked by kernels/int4_gemm; the layout is made by
// kernels/int4_gemm/cpu_layout.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "int4_gemm/cpu.h"
#include "int4_gemm/cpu_memory.h"

namespace {

using namespace tokenmill::int4;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of x that are packed and multiplied at a time: bounds the working memory, and one pass over the weights is long
// since amortised.
constexpr int64_t kRowsAtOnce = 512;
// Below so many values one thread packs faster than two can be woken.
constexpr int64_t kPackAlone = 1 << 15;

Type type_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return Type::kFloat32;
        case ScalarType::Half:
            return Type::kFloat16;
        case ScalarType::BFloat16:
            return Type::kBFloat16;
        default:
            STD_TORCH_CHECK(false, "int4_gemm takes float32, float16 or bfloat16");
    }
}

// Working memory that a thread keeps from call to call.
struct Workspace {
    Memory values;
    std::vector<float> sums, scales;

    Rows rows(const Kernel& kernel, const Problem& p) {
        Rows rows{};
        rows.split = kernel.split(p.type);
        rows.rows = kernel.tile_rows(p.M * rows.split);
        rows.tiles = (p.M * rows.split + rows.rows - 1) / rows.rows;
        rows.row_bytes = kernel.row_bytes(p.weight);
        const size_t packed = size_t(rows.tiles) * size_t(rows.rows);
        grow(sums, packed * size_t(p.weight.groups));
        grow(scales, packed * size_t(p.weight.groups));
        rows.values = values.at_least(packed * size_t(rows.row_bytes));
        rows.sums = sums.data();
        rows.scales = scales.data();
        return rows;
    }

    template <class T>
    static void grow(std::vector<T>& buffer, size_t size) {
        if (buffer.size() < size) buffer.resize(size);
    }
};

void pack(const Kernel& kernel, const Problem& p, const Rows& rows) {
    const auto work = [&](int64_t first, int64_t last) {
        thread_local std::vector<float> scratch;
        Workspace::grow(scratch, size_t(p.weight.units) * kUnit);
        kernel.pack(p, rows, first, last, scratch.data());
    };
    if (p.M * p.K <= kPackAlone) {
        work(0, rows.tiles);
    } else {
        torch::stable::parallel_for(0, rows.tiles, 1, work);
    }
}

void multiply(const Kernel& kernel, const Problem& p, const Rows& rows) {
    const int64_t blocks = p.weight.blocks;
    // Chunks as wide as the kernel likes best, unless threads would go without.
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t chunk = std::clamp<int64_t>(blocks / threads, 1, kernel.blocks);
    torch::stable::parallel_for(0, (blocks + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
        kernel.multiply(p, rows, first * chunk, std::min(last * chunk, blocks));
    });
}

void int4_gemm_cpu(Tensor out, const Tensor& x, const Tensor& lines, const Tensor& scales,
                   const std::optional<Tensor>& zeros, const Tensor& group_units, const Tensor& source, bool in_order,
                   const std::optional<Tensor>& bias, const std::string& arithmetic, const std::string& level) {
    const Kernel* kernel = kernel_for(arithmetic.c_str(), level.c_str());
    STD_TORCH_CHECK(kernel, "int4_gemm has no kernel for arithmetic ", arithmetic, " at instruction set ", level);
    if (kernel->few && x.size(0) <= kernel->few_rows) kernel = kernel->few;
    Problem p{};
    p.weight.lines = static_cast<const uint8_t*>(lines.const_data_ptr());
    p.weight.scales = scales.const_data_ptr();
    p.weight.zeros = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
    p.weight.group_units = static_cast<const int32_t*>(group_units.const_data_ptr());
    p.weight.source = static_cast<const int32_t*>(source.const_data_ptr());
    p.weight.scale_type = type_of(scales.scalar_type());
    p.weight.blocks = lines.size(0);
    p.weight.units = lines.size(1);
    p.weight.groups = scales.size(1);
    p.weight.in_order = in_order;
    p.type = type_of(x.scalar_type());
    p.bias = bias ? bias->const_data_ptr() : nullptr;
    p.N = out.size(1);
    p.K = x.size(1);
    p.ldx = x.stride(0);
    thread_local Workspace workspace;
    const int64_t element = int64_t(x.element_size());
    for (int64_t m = 0; m < x.size(0); m += kRowsAtOnce) {
        p.M = std::min(kRowsAtOnce, x.size(0) - m);
        p.x = static_cast<const char*>(x.const_data_ptr()) + m * p.ldx * element;
        p.y = static_cast<char*>(out.mutable_data_ptr()) + m * p.N * element;
        const Rows rows = workspace.rows(*kernel, p);
        pack(*kernel, p, rows);
        multiply(*kernel, p, rows);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("int4_gemm_cpu(Tensor(a!) out, Tensor x, Tensor lines, Tensor scales, Tensor? zeros, Tensor group_units, "
          "Tensor source, bool in_order, Tensor? bias, str arithmetic, str level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CPU, m) { m.impl("int4_gemm_cpu", TORCH_BOX(&int4_gemm_cpu)); }
