// INT4 GEMM for torch, CPU side. Shapes, dtypes and ranges were checked by kernels/int4_gemm; the layout is made by
// kernels/int4_gemm/cpu_layout.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
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

// Cuts `blocks` into chunks as wide as the kernel likes best, unless threads would go without, and what is left for the
// last turn of each thread into halves of them, so that no thread waits long for the others.
struct Chunks {
    int64_t blocks, wide, narrow, whole;

    Chunks(int64_t blocks, int64_t widest, int64_t threads) : blocks(blocks) {
        wide = std::clamp<int64_t>(blocks / threads, 1, widest);
        narrow = std::max<int64_t>(1, wide / 2);
        whole = std::max<int64_t>(0, blocks / wide - threads);
    }

    int64_t count() const { return whole + (blocks - whole * wide + narrow - 1) / narrow; }

    // Where chunk c begins; for c = count() the end.
    int64_t begin(int64_t c) const {
        return c <= whole ? c * wide : std::min(whole * wide + (c - whole) * narrow, blocks);
    }
};

void multiply(const Kernel& kernel, const Problem& p, const Rows& rows) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const Chunks chunks(p.weight.blocks, kernel.blocks, threads);
    const int64_t count = chunks.count();
    // Each thread takes the next chunk when it is through with one: on a shared machine threads are not equally fast.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
        for (int64_t c = next++; c < count; c = next++) kernel.multiply(p, rows, chunks.begin(c), chunks.begin(c + 1));
    });
}

Weight weight_of(const Header& header) {
    const auto* base = reinterpret_cast<const uint8_t*>(&header);
    Weight w{};
    w.lines = base + header.lines;
    w.scales = base + header.scales;
    w.zeros = header.zeros ? base + header.zeros : nullptr;
    w.group_units = reinterpret_cast<const int32_t*>(base + header.group_units);
    w.source = reinterpret_cast<const int32_t*>(base + header.source);
    w.scale_type = static_cast<Type>(header.scale_type);
    w.blocks = header.blocks;
    w.units = header.units;
    w.groups = header.groups;
    w.in_order = header.in_order;
    return w;
}

void int4_gemm_cpu(Tensor out, const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                   int64_t activation_bits, int64_t isa) {
    const Kernel* kernel = kernel_for(activation_bits, isa);
    STD_TORCH_CHECK(kernel, "int4_gemm has no kernel for ", activation_bits, "-bit activations at level ", isa);
    const auto& header = *static_cast<const Header*>(packed.const_data_ptr());
    STD_TORCH_CHECK(std::memcmp(header.magic, kMagic, sizeof header.magic) == 0, "not a weight packed by cpu_layout");
    Problem p{};
    p.weight = weight_of(header);
    p.type = type_of(x.scalar_type());
    p.bias = bias ? bias->const_data_ptr() : nullptr;
    p.N = header.N;
    p.K = header.K;
    STD_TORCH_CHECK(x.size(1) == p.K && out.size(1) == p.N && out.size(0) == x.size(0), "x [", x.size(0), ", ",
                    x.size(1), "] and out [", out.size(0), ", ", out.size(1), "] do not fit a weight of ", p.K, " by ",
                    p.N);
    p.ldx = x.stride(0);
    const auto* from = static_cast<const char*>(x.const_data_ptr());
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    const int64_t M = x.size(0), element = p.type == Type::kFloat32 ? 4 : 2;
    if (kernel->few && M <= kernel->few_rows) kernel = kernel->few;
    thread_local Workspace workspace;
    for (int64_t m = 0; m < M; m += kRowsAtOnce) {
        p.M = std::min(kRowsAtOnce, M - m);
        p.x = from + m * p.ldx * element;
        p.y = to + m * p.N * element;
        const Rows rows = workspace.rows(*kernel, p);
        pack(*kernel, p, rows);
        multiply(*kernel, p, rows);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("int4_gemm_cpu(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, int activation_bits, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CPU, m) { m.impl("int4_gemm_cpu", TORCH_BOX(&int4_gemm_cpu)); }
