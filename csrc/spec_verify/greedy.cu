// Greedy acceptance: one CTA a request walks its drafts in order and stops at the first that the target disagrees
// with, so rows behind a mismatch are never read. Needs no tensor cores: the same code for every family.

#include "../launch.cuh"
#include "greedy.h"

namespace {

using i64 = long long;  // what min and max know

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;

// Orders as argmax wants it: larger values first, a NaN before all, then the lower index. See argmax.h.
template <typename Bits, u32 INFINITY_BITS>
DEV u64 rank_of(Bits value, u32 index) {
    constexpr u32 MAGNITUDE = (1u << (8 * sizeof(Bits) - 1)) - 1;
    const u32 bits = value, magnitude = bits & MAGNITUDE;
    const u32 signed_key = bits > MAGNITUDE ? 0u - magnitude : magnitude;
    const u32 key = (magnitude > INFINITY_BITS ? 0x7fffffffu : signed_key) ^ 0x80000000u;
    return ((u64)key << 32) | (0xffffffffu - index);
}

DEV u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// The index of the row's largest value, in every thread. `partial` is free again when this returns.
template <typename Bits, u32 INFINITY_BITS>
DEV u32 argmax_row(const Bits* row, u32 vocabulary, u64* partial) {
    u64 best = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) best = larger(best, rank_of<Bits, INFINITY_BITS>(row[i], i));
    for (int lanes = 16; lanes > 0; lanes /= 2) best = larger(best, __shfl_xor_sync(0xffffffffu, best, lanes));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = best;
    __syncthreads();
    best = partial[0];
    for (int warp = 1; warp < WARPS; warp++) best = larger(best, partial[warp]);
    __syncthreads();
    return 0xffffffffu - (u32)best;
}

template <typename Bits, u32 INFINITY_BITS>
__global__ void __launch_bounds__(THREADS) spec_verify_greedy(const GreedyProblem p) {
    STATIC_SMEM(u64, partial, [WARPS]);
    const i64 request = blockIdx.x, width = p.max_spec_len + 1, drafts = p.drafts;
    // The sums are data that nobody has checked on a GPU: whatever they say, reads and writes stay inside.
    const i64 before = request ? p.cu_num_draft_tokens[request - 1] : 0, through = p.cu_num_draft_tokens[request];
    const i64 first = min(max(before, 0ll), drafts), last = min(min(through, drafts), first + (width - 1));
    int32_t* output = p.output_token_ids + request * width;
    i64 written = 0;
    bool accepted = true;
    while (accepted && first + written < last) {
        const char* row = p.target_logits + (first + written) * p.row_bytes;
        const u32 token =
            argmax_row<Bits, INFINITY_BITS>(reinterpret_cast<const Bits*>(row), (u32)p.vocabulary, partial);
        accepted = (int32_t)token == p.draft_token_ids[first + written];
        if (threadIdx.x == 0) output[written] = (int32_t)token;
        written++;
    }
    if (accepted) {
        if (threadIdx.x == 0) output[written] = p.bonus_token_ids[request];
        written++;
    }
    for (i64 i = written + threadIdx.x; i < width; i += THREADS) output[i] = -1;
}

}  // namespace

extern "C" int tokenmill_spec_verify_greedy(const GreedyProblem* problem, void* stream) {
    if (problem->requests == 0) return 0;
    LaunchConfig config{};
    config.grid = dim3((unsigned)problem->requests);
    config.block = dim3(THREADS);
    config.stream = (Stream)stream;
    switch (problem->type) {
        case LOGITS_FLOAT32:
            return launch(spec_verify_greedy<uint32_t, 0x7f800000>, config, *problem);
        case LOGITS_FLOAT16:
            return launch(spec_verify_greedy<uint16_t, 0x7c00>, config, *problem);
        default:
            return launch(spec_verify_greedy<uint16_t, 0x7f80>, config, *problem);
    }
}
