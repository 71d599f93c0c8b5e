// wgmma: asynchronous warpgroup matrix multiplication. Each warp's 16 rows are computed on their own; operands are checked
// when the instruction is issued, read when it runs, some time before its wait.
#include <algorithm>

#include "race.h"
#include "report.h"
#include "tensor_cores.h"

#include "../descriptors.cuh"  // after the dialect, whose words it uses

namespace emulator {
namespace {
// ---- matrix descriptors -----------------------------------------------------------------------------------------------------
struct Matrix {
    u32 start, leading, stride, pitch;  // pitch: bytes of a swizzle row, 16 without swizzle
    Swizzle swizzle;
};
Matrix matrix_of(u64 descriptor) {
    const u32 mode = (u32)(descriptor >> 62);
    return {(u32)(descriptor & 0x3fff) << 4, (u32)(descriptor >> 16 & 0x3fff) << 4, (u32)(descriptor >> 32 & 0x3fff) << 4,
            mode ? 256u >> mode : 16u, mode ? (Swizzle)(4 - mode) : Swizzle::none};
}

// Shared address of a 16-byte chunk. K-major: row `mn`, the chunk of K at `chunk`. MN-major: K-row `k`, the chunk of MN.
u32 k_major_chunk(const Matrix& m, u32 mn, u32 chunk) {
    return swizzled(m.start + mn / 8 * m.stride + mn % 8 * m.pitch + chunk * (m.swizzle == Swizzle::none ? m.leading : 16),
                    m.swizzle);
}
u32 mn_major_chunk(const Matrix& m, u32 k, u32 chunk) {
    if (m.swizzle == Swizzle::none) return m.start + chunk * m.stride + k / 8 * m.leading + k % 8 * 16;
    const u32 per_row = m.pitch / 16;
    return swizzled(m.start + chunk / per_row * m.leading + chunk % per_row * 16 + k / 8 * m.stride + k % 8 * m.pitch, m.swizzle);
}

// Calls action(address, first row of MN, first k) for each 16-byte chunk of rows [first, first + count) of MN.
template <class Action>
void for_each_chunk(const Matrix& m, Operand type, bool transposed, int first, int count, Action action) {
    const int elements = 16 / operand_bytes(type), k = operand_k(type);
    if (transposed) {
        for (int mn = first; mn < first + count; mn += elements)
            for (int p = 0; p < k; p++) action(mn_major_chunk(m, (u32)p, (u32)(mn / elements)), mn, p);
    } else {
        for (int mn = first; mn < first + count; mn++)
            for (int p = 0; p < k; p += elements) action(k_major_chunk(m, (u32)mn, (u32)(p / elements)), mn, p);
    }
}

void check_descriptor(u64 descriptor, const char* which, u32 pc) {
    const Matrix m = matrix_of(descriptor);
    const u32 row_bits = m.swizzle == Swizzle::b128 ? 0x380 : m.swizzle == Swizzle::b64 ? 0x180 : m.swizzle == Swizzle::b32 ? 0x80 : 0;
    if (m.start & row_bits)
        report(Problem::wgmma, pc, 6,
               format("DESCRIPTOR: %s of the wgmma at %s starts at 0x%x, inside a swizzle pattern", which, source_line(pc).c_str(), m.start),
               {format("needed  row 0 of a pattern: a multiple of %u, plus the advance in K", (row_bits & ~(row_bits - 1)) * 8)});
    if (descriptor >> 49 & 7)
        report(Problem::wgmma, pc, 7, format("DESCRIPTOR: %s of the wgmma at %s has a base offset, which the emulator does not model", which, source_line(pc).c_str()));
}

// Marks the warp's reads of a matrix in shared memory.
void check_reads(Warp& warp, u64 descriptor, const WgmmaShape& shape, bool transposed, int first, int count, Epoch by,
                 const char* which, u32 pc) {
    const Matrix m = matrix_of(descriptor);
    Thread* executing = current;
    current = &warp.lane((int)random_below(32));  // any lane's knowledge must suffice
    for_each_chunk(m, shape.type, transposed, first, count, [&](u32 address, int, int) {
        if (const char* p = shared_pointer(address, 16, 16, which, pc)) access(p, 16, is_async, *current, by, pc);
    });
    current = executing;
}

// The matrix as float values, mn-contiguous: values[k * count + mn].
void read_matrix(const Cta& cta, u64 descriptor, const WgmmaShape& shape, bool transposed, int first, int count, float* values) {
    const int elements = 16 / operand_bytes(shape.type);
    for_each_chunk(matrix_of(descriptor), shape.type, transposed, first, count, [&](u32 address, int mn, int k) {
        float chunk[16];
        char missing[16];
        memset(missing, 0xff, 16);
        const char* from = address + 16 <= slot_bytes ? cta.smem + address : missing;
        decode(shape.type, from, elements, chunk);
        for (int i = 0; i < elements; i++)
            if (transposed) values[k * count + mn - first + i] = chunk[i];
            else values[(k + i) * count + mn - first] = chunk[i];
    });
}

template <class Accumulator>
void run(Warp& warp, const WgmmaOperation& o) {
    static float b[32 * 256], a_columns[32 * 16];
    static Accumulator d[16 * 256];
    float a[16][32];
    const int n = o.shape.n, k = operand_k(o.shape.type);
    read_matrix(*warp.cta, o.b_descriptor, o.shape, o.shape.b_transposed, 0, n, b);
    if (o.shape.a_shared) {
        read_matrix(*warp.cta, o.a_descriptor, o.shape, o.shape.a_transposed, warp.number % 4 * 16, 16, a_columns);
        for (int p = 0; p < k; p++)
            for (int i = 0; i < 16; i++) a[i][p] = a_columns[p * 16 + i];
    } else {
        for (int l = 0; l < 32; l++)
            if (memcmp(o.a_values[l], o.a[l], 16))
                report(Problem::registers, o.pc, 0,
                       format("REGISTERS IN USE: an A fragment has changed while the wgmma at %s was in flight", source_line(o.pc).c_str()),
                       {"by      " + thread_name(warp.cta->number, warp.number * 32 + l)});
        decode_a_fragment(o.shape.type, o.a, a);
    }
    for (int l = 0; l < 32; l++)
        for (int j = 0; j < n / 8; j++)
            for (int e = 0; e < 4; e++)
                d[(l / 4 + (e >> 1) * 8) * n + j * 8 + l % 4 * 2 + (e & 1)] = o.accumulate ? static_cast<Accumulator*>(o.d[l])[j * 4 + e] : Accumulator(0);
    multiply_add(d, a, b, k, n);
    for (int l = 0; l < 32; l++)
        for (int j = 0; j < n / 8; j++)
            for (int e = 0; e < 4; e++)
                static_cast<Accumulator*>(o.d[l])[j * 4 + e] = d[(l / 4 + (e >> 1) * 8) * n + j * 8 + l % 4 * 2 + (e & 1)];
}

struct WgmmaArgument {
    WgmmaShape shape;
    void* d;
    const u32* a;
    u64 a_descriptor, b_descriptor;
    bool accumulate;
};

bool overlaps(const std::pair<const char*, u32>& written, const void* begin, size_t bytes) {
    const char* p = static_cast<const char*>(begin);
    return written.first < p + bytes && written.first + written.second > p;
}

// The registers must have been written before the last wgmma.fence.
void check_fenced(const WgmmaArgument& a, u32 pc) {
    const std::string by = by_line(*current);
    if (!current->wgmma_fences)
        report(Problem::wgmma, pc, 0, format("FENCE: the wgmma at %s has no wgmma_fence() before it", source_line(pc).c_str()),
               {by, "needed  wgmma_fence() before the first wgmma and whenever registers have changed"});
    for (const auto& written : current->written_since_fence) {
        const bool in_a = a.a && overlaps(written, a.a, 16);
        if (!in_a && !(a.accumulate && overlaps(written, a.d, (size_t)a.shape.n * 2))) continue;
        report(Problem::wgmma, pc, 1,
               format("FENCE: %s of the wgmma at %s was written after the last wgmma_fence()", in_a ? "an A fragment" : "an accumulator",
                      source_line(pc).c_str()),
               {by, "needed  wgmma_fence() between the write and the wgmma"});
        break;
    }
    for (const RegistersInUse& r : current->in_use)
        if (a.a && !r.accumulator && r.first != reinterpret_cast<const char*>(a.a) &&
            overlaps({r.first, (u32)r.bytes}, a.a, 16))
            report(Problem::wgmma, pc, 2, format("REGISTERS IN USE: overlapping A fragments at %s", source_line(pc).c_str()), {by});
}

void issue(Warp& warp, Rendezvous& r) {
    const WgmmaArgument& first = *static_cast<WgmmaArgument*>(r.arguments[0]);
    WgmmaOperation o{};
    o.shape = first.shape;
    o.a_descriptor = first.a_descriptor;
    o.b_descriptor = first.b_descriptor;
    o.accumulate = first.accumulate;
    o.pc = r.pc;
    statistics.warp_wgmmas++;
    for (int l = 0; l < 32; l++) {
        const WgmmaArgument& a = *static_cast<WgmmaArgument*>(r.arguments[l]);
        if (a.b_descriptor != o.b_descriptor || a.a_descriptor != o.a_descriptor || a.accumulate != o.accumulate)
            report(Problem::wgmma, r.pc, 3, format("WGMMA: descriptors or scale differ between the lanes at %s", source_line(r.pc).c_str()));
        o.d[l] = a.d;
        o.a[l] = a.a;
        if (a.a) memcpy(o.a_values[l], a.a, 16);
    }
    same_in_warpgroup(warp, (o.b_descriptor * 31 + o.a_descriptor) * 31 + (u64)o.shape.n * 4 + (u64)o.shape.type, "wgmma", r.pc);
    const Epoch by{warp.wgmmas_committed + 1, warp.cta->number << 12 | (u32)actors.wgmma(warp.number)};
    check_descriptor(o.b_descriptor, "B", r.pc);
    check_reads(warp, o.b_descriptor, o.shape, o.shape.b_transposed, 0, o.shape.n, by, "wgmma B", r.pc);
    if (o.shape.a_shared) {
        check_descriptor(o.a_descriptor, "A", r.pc);
        check_reads(warp, o.a_descriptor, o.shape, o.shape.a_transposed, warp.number % 4 * 16, 16, by, "wgmma A", r.pc);
    }
    for (int l = 0; l < 32; l++) {
        Thread& t = warp.lane(l);
        t.in_use.push_back({static_cast<char*>(o.d[l]), (size_t)o.shape.n * 2, true, by.clock, r.pc});
        if (o.a[l]) t.in_use.push_back({reinterpret_cast<const char*>(o.a[l]), 16, false, by.clock, r.pc});
    }
    warp.wgmmas.push_back(o);
}
}  // namespace

void run_wgmma_group(Warp& warp) {
    for (const WgmmaOperation& o : warp.wgmma_groups.front())
        if (o.shape.type == Operand::s8) run<int>(warp, o);
        else run<float>(warp, o);
    warp.wgmma_groups.erase(warp.wgmma_groups.begin());
    statistics.async_operations++;
}

void wgmma(const WgmmaShape& shape, void* d, const u32* a_registers, u64 a_descriptor, u64 b_descriptor, int scale_d) {
    const u32 pc = EMULATOR_PC;
    WgmmaArgument argument{shape, d, a_registers, a_descriptor, b_descriptor, scale_d != 0};
    check_fenced(argument, pc);
    collective(wgmma_operation * 16, "wgmma.mma_async", ~0u, &argument, issue, pc);
}

void wgmma_wait(int groups) {
    collective(wait_operation * 16, "wgmma.wait_group", ~0u, &groups, [](Warp& warp, Rendezvous& r) {
        const u32 allowed = *static_cast<u32*>(r.arguments[0]);
        while (warp.wgmma_groups.size() > allowed) run_wgmma_group(warp);
        // what the wait guarantees, not what happens to have finished
        const u32 done = warp.wgmmas_committed > allowed ? warp.wgmmas_committed - allowed : 0;
        warp.wgmmas_waited = std::max(warp.wgmmas_waited, done);
        warp.each(~0u, [&](Thread& t, int) {
            for (int v = 0; v < views; v++) {
                u32& known = t.knows.at((View)v, actors.wgmma(warp.number));
                known = std::max(known, done);
            }
            t.in_use.erase(std::remove_if(t.in_use.begin(), t.in_use.end(), [&](const RegistersInUse& u) { return u.group <= done; }),
                           t.in_use.end());
        });
    }, EMULATOR_PC);
}
}  // namespace emulator

using namespace emulator;

void wgmma_fence() {
    current->wgmma_fences++;
    current->written_since_fence.clear();
    collective(fence_operation * 16, "wgmma.fence", ~0u, nullptr, [](Warp&, Rendezvous&) {}, EMULATOR_PC);
}

void wgmma_commit() {
    collective(commit_operation * 16, "wgmma.commit_group", ~0u, nullptr, [](Warp& warp, Rendezvous&) {
        warp.wgmma_groups.push_back(std::move(warp.wgmmas));
        warp.wgmmas.clear();
        warp.wgmmas_committed++;
        if (config.async == AsyncMode::early) run_wgmma_group(warp);
    }, EMULATOR_PC);
}
