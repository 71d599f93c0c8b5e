// INT4 GEMM for torch, CPU side. Shapes, dtypes and ranges were checked by kernels/int4_gemm; the layout is made by
// kernels/int4_gemm/cpu_layout.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>

#include "int4_gemm/cpu.h"
#include "int4_gemm/cpu_memory.h"

namespace {

using namespace tokenmill::int4;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of x that are packed and multiplied at a time at most: bounds the working memory, and one pass over the weights is
// long since amortised.
constexpr int64_t kRowsAtOnce = 512;
// So many bytes of packed rows a thread makes for itself, if its kernel packs fast: to fetch from the cache of another
// core what was written there just now takes longer.
constexpr int64_t kOwnBytes = 1 << 19;

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
    std::vector<float> sums, scales, scratch;

    static Workspace& of_this_thread() {
        thread_local Workspace workspace;
        return workspace;
    }

    Rows rows(const Kernel& kernel, const Problem& p) {
        Rows rows{};
        rows.split = kernel.split(p.type);
        rows.rows = kernel.tile_rows(p.M * rows.split, rows.split);
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

    // Room for one row while it is packed.
    float* row(const Problem& p) {
        grow(scratch, size_t(p.weight.units) * kUnit);
        return scratch.data();
    }

 private:
    template <class T>
    static void grow(std::vector<T>& buffer, size_t size) {
        if (buffer.size() < size) buffer.resize(size);
    }
};

// Until `done` is as large: at first without leaving the core, which costs microseconds.
void wait_for(const std::atomic<int64_t>& done, int64_t wanted) {
    constexpr int kTurnsOnCore = 1 << 12;
    for (int turn = 0; done.load(std::memory_order_acquire) < wanted; ++turn) {
#if defined(__x86_64__)
        if (turn < kTurnsOnCore) {
            __builtin_ia32_pause();
            continue;
        }
#endif
        std::this_thread::yield();
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

int64_t rows_at_once(const Kernel& kernel, const Problem& p) {
    const int64_t bytes = kernel.row_bytes(p.weight) * kernel.split(p.type);
    const int64_t most = std::clamp<int64_t>(kernel.bytes_at_once / bytes, 1, kRowsAtOnce);
    const int64_t passes = (p.M + most - 1) / most;
    return (p.M + passes - 1) / passes;  // of about the same height
}

// Packs rows and multiplies them, in one parallel region: to enter one costs microseconds. Each thread takes the next tile
// (or row) and chunk when it is through with one: on a shared machine threads are not equally fast.
void pack_and_multiply(const Kernel& kernel, const Problem& p) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const Chunks chunks(p.weight.blocks, kernel.blocks, threads);
    const int64_t count = chunks.count(), workers = std::min(threads, count);
    const Rows shared = Workspace::of_this_thread().rows(kernel, p);
    const bool own = kernel.own_columns != 0 && p.N >= workers * kernel.own_columns &&
                     shared.tiles * shared.rows * shared.row_bytes <= kOwnBytes;
    const int64_t at_once = kernel.packs_rows ? shared.split : 1;  // the parts of a row are one thread's
    const int64_t packs = kernel.packs_rows ? shared.tiles * shared.rows / at_once : shared.tiles;
    std::atomic<int64_t> next_pack{0}, packed{0}, next_chunk{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
        Workspace& workspace = Workspace::of_this_thread();
        const Rows rows = own ? workspace.rows(kernel, p) : shared;
        float* scratch = workspace.row(p);
        if (own) {
            kernel.pack(p, rows, 0, packs * at_once, scratch);
        } else {
            for (int64_t i = next_pack++; i < packs; i = next_pack++) {
                kernel.pack(p, rows, i * at_once, (i + 1) * at_once, scratch);
                packed.fetch_add(1, std::memory_order_release);
            }
            // What is not packed yet is in the hands of a thread that runs: none waits for one that has yet to come.
            wait_for(packed, packs);
        }
        for (int64_t c = next_chunk++; c < count; c = next_chunk++) {
            kernel.multiply(p, rows, chunks.begin(c), chunks.begin(c + 1));
        }
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
    const Kernel* kernel = kernel_for(activation_bits, isa, type_of(x.scalar_type()));
    STD_TORCH_CHECK(kernel, "int4_gemm has no kernel for ", activation_bits, "-bit activations of this dtype at level ",
                    isa);
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
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == p.N && bias->is_contiguous() &&
                              bias->scalar_type() == x.scalar_type()),
                    "the bias must be contiguous, of the dtype of x, and have ", p.N, " elements");
    p.ldx = x.stride(0);
    const auto* from = static_cast<const char*>(x.const_data_ptr());
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    const int64_t M = x.size(0), element = p.type == Type::kFloat32 ? 4 : 2;
    while (kernel->few && M <= kernel->few_rows) kernel = kernel->few;
    p.M = M;
    const int64_t step = M == 0 ? 1 : rows_at_once(*kernel, p);
    for (int64_t m = 0; m < M; m += step) {
        p.M = std::min(step, M - m);
        p.x = from + m * p.ldx * element;
        p.y = to + m * p.N * element;
        pack_and_multiply(*kernel, p);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenmill_native, m) {
    m.def("int4_gemm_cpu(Tensor(a!) out, Tensor x, Tensor packed, Tensor? bias, int activation_bits, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tokenmill_native, CPU, m) { m.impl("int4_gemm_cpu", TORCH_BOX(&int4_gemm_cpu)); }
