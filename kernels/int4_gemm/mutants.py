"""The bugs that the emulator must find in the INT4 GEMM kernels: mistakes that people make in such kernels.

Most give right values on most runs of real hardware; several would pass any test of values.
"""

from tokenmill.kernels.mutation import WRONG_RESULT, Mutant

_SM90 = "int4_gemm/sm90.cuh"
_MMA = "int4_gemm/mma_sync.cuh"
_TILES = "int4_gemm/tiles.cuh"
_UNPACK = "int4_unpack.cuh"

SM90_MUTANTS: tuple[Mutant, ...] = (
    # ---- mbarriers
    Mutant(
        "one wait for a full stage is missing",
        _SM90,
        "mbar_wait(full + 8 * s, i / STAGES & 1);",
        "if (i != 3) mbar_wait(full + 8 * s, i / STAGES & 1);",
        ("RACE",),
    ),
    Mutant(
        "full parity is wrong after the first wrap-around",
        _SM90,
        "mbar_wait(full + 8 * s, i / STAGES & 1);",
        "mbar_wait(full + 8 * s, i >= STAGES ? 0 : i / STAGES & 1);",
        ("RACE",),
    ),
    Mutant(
        "empty parity never toggles",
        _SM90,
        "mbar_wait(empty + 8 * (i % STAGES), (i / STAGES & 1) ^ 1);",
        "mbar_wait(empty + 8 * (i % STAGES), 1);",
        ("RACE", "DEADLOCK"),
    ),
    Mutant(
        "stages are refilled without waiting for their release",
        _SM90,
        "mbar_wait(empty + 8 * (i % STAGES), (i / STAGES & 1) ^ 1);",
        "",
        ("RACE",),
    ),
    Mutant(
        "the mbarriers are not fenced after initialisation",
        _SM90,
        "        fence_mbar_init();\n",
        "",
        ("MBARRIER", "RACE"),
    ),
    Mutant(
        "no barrier between the mbarriers' initialisation and their use",
        _SM90,
        "    }\n    __syncthreads();\n\n    if (warpgroup == 0) {",
        "    }\n\n    if (warpgroup == 0) {",
        ("MBARRIER", "RACE"),
    ),
    Mutant(
        "the empty barrier counts threads, but warps arrive",
        _SM90,
        "mbar_init(empty + 8 * s, 8);",
        "mbar_init(empty + 8 * s, 256);",
        ("DEADLOCK",),
    ),
    Mutant(
        "the full barrier expects an arrival that nobody makes",
        _SM90,
        "mbar_init(full + 8 * s, 1);",
        "mbar_init(full + 8 * s, 2);",
        ("DEADLOCK",),
    ),
    Mutant(
        "more bytes are expected than are copied",
        _SM90,
        "mbar_arrive_tx(bar, Smem::STAGE_BYTES);",
        "mbar_arrive_tx(bar, Smem::STAGE_BYTES + 128);",
        ("DEADLOCK",),
    ),
    Mutant(
        "the zero points' bytes are not expected",
        _SM90,
        "mbar_arrive_tx(bar, Smem::STAGE_BYTES);",
        "mbar_arrive_tx(bar, Smem::STAGE_BYTES - F::ZERO_BYTES);",
        ("MBARRIER", "RACE", "TRANSACTIONS"),
    ),
    Mutant(
        "lane 0 releases the stage for lanes that still read it",
        _SM90,
        "            __syncwarp();  // every lane has read its codes\n",
        "",
        ("RACE",),
    ),
    Mutant(
        "the stage whose wgmmas were just issued is released",
        _SM90,
        "            multiply(i, odd);\n            wgmma_wait<1>(sum);\n            release(i - 1);",
        "            multiply(i, odd);\n            wgmma_wait<1>(sum);\n            release(i);",
        ("RACE", "MBARRIER", "DEADLOCK"),
    ),
    # ---- wgmma
    Mutant(
        "a stage is released without waiting for the wgmmas that read it",
        _SM90,
        "            multiply(i + 1, even);\n            wgmma_wait<1>(sum);\n",
        "            multiply(i + 1, even);\n",
        ("RACE", "REGISTERS"),
    ),
    Mutant(
        "the accumulators are read without the last wait",
        _SM90,
        "        wgmma_wait<0>(sum);\n",
        "",
        ("REGISTERS",),
    ),
    Mutant(
        "fragments are overwritten while a wgmma reads them",
        _SM90,
        "            multiply(i, odd);\n            wgmma_wait<1>(sum);",
        "            multiply(i, even);\n            wgmma_wait<1>(sum);",
        ("REGISTERS",),
    ),
    Mutant(
        "no wgmma.fence after the fragments are written", _SM90, "            wgmma_fence();\n", "", ("FENCE", "WGMMA")
    ),
    Mutant(
        "the descriptor names another swizzle than the tile has",
        _SM90,
        "const u64 tokens = desc_sw128(base + s * Smem::STRIDE);",
        "const u64 tokens = wgmma_descriptor(base + s * Smem::STRIDE, 16, 1024, Swizzle::b64);",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the descriptor's stride is half of what it is",
        _SM90,
        "const u64 tokens = desc_sw128(base + s * Smem::STRIDE);",
        "const u64 tokens = wgmma_descriptor(base + s * Smem::STRIDE, 16, 512, Swizzle::b128);",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the descriptor advances two k16 steps at a time",
        _SM90,
        "tokens + k * 2);",
        "tokens + k * 4);",
        ("DESCRIPTOR", WRONG_RESULT),
    ),
    Mutant(
        "the consumers take more registers than the multiprocessor has",
        _SM90,
        "setmaxnreg_inc<232>();",
        "setmaxnreg_inc<256>();",
        ("SETMAXNREG", "REGISTERS", "DEADLOCK"),
    ),
    # ---- proxies, copies
    Mutant(
        "plain stores into a stage without a proxy fence before wgmma reads it",
        _SM90,
        "            const uint4 words = *(const uint4*)(tile + thread * 16);",
        """            for (int c = thread; c < TOKENS * 32; c += COMPUTE_THREADS)  // x + -0: the same values
                ((u32*)(smem + s * Smem::STRIDE))[c] = bf2_add(((u32*)(smem + s * Smem::STRIDE))[c], 0x80008000u);
            named_bar_sync(1, COMPUTE_THREADS);
            const uint4 words = *(const uint4*)(tile + thread * 16);""",
        ("RACE",),
    ),
    Mutant(
        "no proxy fence between stmatrix and the TMA store",
        _SM90,
        "        fence_proxy_async();\n        named_bar_sync(2 + half, 128);",
        "        named_bar_sync(2 + half, 128);",
        ("RACE",),
    ),
    Mutant(
        "no barrier between stmatrix and the TMA store",
        _SM90,
        "        named_bar_sync(2 + half, 128);\n",
        "",
        ("RACE",),
    ),
    Mutant(
        "a warpgroup overwrites stages that the other still multiplies",
        _SM90,
        "        named_bar_sync(1, COMPUTE_THREADS);  // both warpgroups are past their last wgmma\n",
        "",
        ("RACE",),
    ),
    Mutant(
        "the CTA ends while its TMA store still reads shared memory",
        _SM90,
        "            bulk_wait_read<0>();\n",
        "",
        ("EXIT",),
    ),
    Mutant(
        "stmatrix without transposition",
        _SM90,
        "stsm_x4_t(out + swizzled(",
        "stsm_x4(out + swizzled(",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the epilogue's tile is written without the map's swizzle",
        _SM90,
        "stsm_x4_t(out + swizzled(token * 128 + chunk * 16, Swizzle::b128), packed);",
        "stsm_x4_t(out + token * 128 + chunk * 16, packed);",
        (WRONG_RESULT,),
    ),
    Mutant(
        "a bulk copy reads past the end of the weights",
        _SM90,
        "bulk_load(to, weight.words_of(block, tile), WORD_BYTES, bar);",
        "bulk_load(to, weight.words_of(block, tile + 1), WORD_BYTES, bar);",
        ("OUT OF BOUNDS",),
    ),
    Mutant(
        "the tokens' map has rows that the tensor has not",
        _SM90,
        "a.K, a.M, a.x_stride * 2,",
        "a.K, (a.M + TOKENS - 1) / TOKENS * TOKENS, a.x_stride * 2,",
        ("OUT OF BOUNDS",),
    ),
    Mutant(
        "the output's map has columns that the tensor has not",
        _SM90,
        "a.N, a.M, a.y_stride * 2,",
        "a.y_stride, a.M, a.y_stride * 2,",
        (WRONG_RESULT,),
    ),
    Mutant(
        "dynamic shared memory is 2 KiB too small",
        _SM90,
        "config.dynamic_smem = Smem::BYTES;",
        "config.dynamic_smem = Smem::BYTES - 2048;",
        ("OUT OF BOUNDS",),
    ),
    # ---- barriers, dependent launch
    Mutant(
        "a warpgroup's barrier waits for both warpgroups",
        _SM90,
        "named_bar_sync(2 + half, 128);",
        "named_bar_sync(2 + half, 256);",
        ("DEADLOCK", "BARRIER"),
    ),
    Mutant(
        "tokens are loaded before the grid that writes them has ended",
        _SM90,
        "            griddep_wait();\n            for",
        "            for",
        ("RACE",),
    ),
    # ---- arithmetic
    Mutant(
        "both groups of a tile get the first one's scale",
        _SM90,
        "tile_scales<F>(tile, group, row);",
        "tile_scales<F>(tile, 0, row);",
        (WRONG_RESULT,),
    ),
)

MMA_SYNC_MUTANTS: tuple[Mutant, ...] = (
    # ---- cp.async
    Mutant(
        "one cp.async group too many may be pending",
        _MMA,
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        ("RACE",),
    ),
    Mutant(
        "no barrier after the wait for cp.async",
        _MMA,
        "        __syncthreads();  // stage i is complete; nobody reads stage i - 1, which is filled next\n",
        "",
        ("RACE",),
    ),
    Mutant(
        "a stage is refilled before the barrier",
        _MMA,
        "        __syncthreads();  // stage i is complete; nobody reads stage i - 1, which is filled next\n"
        "        if (i + STAGES - 1 < tiles) load(i + STAGES - 1);\n",
        "        if (i + STAGES - 1 < tiles) load(i + STAGES - 1);\n        __syncthreads();\n",
        ("RACE",),
    ),
    Mutant(
        "a stage too far ahead is filled",
        _MMA,
        "        if (i + STAGES - 1 < tiles) load(i + STAGES - 1);\n",
        "        if (i + STAGES < tiles) load(i + STAGES);\n",
        ("RACE",),
    ),
    Mutant(
        "empty cp.async groups are not committed",
        _MMA,
        "        if (i + STAGES - 1 < tiles) load(i + STAGES - 1);\n        cp_async_commit();\n",
        "        if (i + STAGES - 1 < tiles) load(i + STAGES - 1), cp_async_commit();\n",
        ("RACE",),
    ),
    Mutant(
        "the scales of the second group are not copied",
        _MMA,
        "thread * 16 < F::SCALE_BYTES",
        "thread * 16 < F::SCALE_BYTES / 2",
        ("UNWRITTEN",),
    ),
    Mutant(
        "tokens beyond M are read",
        _MMA,
        "const int left = first_token + token < M ? min(max(2 * (K - k), 0), 16) : 0;",
        "const int left = min(max(2 * (K - k), 0), 16);",
        ("OUT OF BOUNDS",),
    ),
    Mutant(
        "inputs beyond K are read",
        _MMA,
        "min(max(2 * (K - k), 0), 16) : 0;",
        "16 : 0;",
        (WRONG_RESULT, "OUT OF BOUNDS"),
    ),
    # ---- ldmatrix, mma
    Mutant(
        "ldmatrix transposes what is not transposed", _MMA, "ldsm_x4(b, tokens", "ldsm_x4_t(b, tokens", (WRONG_RESULT,)
    ),
    Mutant(
        "ldmatrix reads without the swizzle of the copy",
        _MMA,
        "ldsm_x4(b, tokens + token * 128 + ((chunk ^ (token & 7)) << 4));",
        "ldsm_x4(b, tokens + token * 128 + (chunk << 4));",
        (WRONG_RESULT,),
    ),
    Mutant(
        "ldmatrix in half of a warp",
        _MMA,
        "                ldsm_x4(b, tokens",
        "                if (lane < 16) ldsm_x4(b, tokens",
        ("DIVERGENT", "DEADLOCK"),
    ),
    Mutant(
        "the k16 steps of a pair are exchanged",
        _MMA,
        "b_first[2] = {b[0], b[1]}, b_second[2] = {b[2], b[3]};",
        "b_first[2] = {b[2], b[3]}, b_second[2] = {b[0], b[1]};",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the first group's products leak into the second",
        _MMA,
        "if (pair == 0 || F::FINE) part",
        "if (pair == 0) part",
        (WRONG_RESULT,),
    ),
    # ---- epilogue
    Mutant(
        "the epilogue overwrites a stage that is still read",
        _MMA,
        "    __syncthreads();  // the last stage has been read\n",
        "",
        ("RACE",),
    ),
    Mutant(
        "rows of the output are read before all warps have written them",
        _MMA,
        "    __syncthreads();\n    for (int c = thread;",
        "    for (int c = thread;",
        ("RACE", "UNWRITTEN"),
    ),
    Mutant(
        "tokens beyond M are stored",
        _MMA,
        "        if (first_token + token >= M) continue;\n",
        "",
        ("OUT OF BOUNDS",),
    ),
    Mutant(
        "features beyond N are stored",
        _MMA,
        "if (feature + 8 <= N)",
        "if (feature < N)",
        (WRONG_RESULT, "OUT OF BOUNDS"),
    ),
    Mutant(
        "one token of each pair is not written to the output's tile",
        _MMA,
        "        *(uint16_t*)(smem + (token + 1) * Smem::OUT_PITCH + feature * 2) = (uint16_t)(packed >> 16);\n",
        "",
        ("UNWRITTEN", WRONG_RESULT),
    ),
    Mutant(
        "shared memory is one stage too small",
        _MMA,
        "config.dynamic_smem = MmaSyncSmem<F, TOKENS, STAGES>::BYTES;",
        "config.dynamic_smem = MmaSyncSmem<F, TOKENS, STAGES - 1>::BYTES;",
        ("OUT OF BOUNDS",),
    ),
    Mutant(
        "nothing waits for the grid before",
        _MMA,
        "    griddep_wait();\n",
        "",
        ("RACE",),
    ),
    # ---- the sum over splits
    Mutant(
        "the ticket orders nothing", _TILES, "atom_add_acq_rel(ticket, 1)", "atom_add_relaxed(ticket, 1)", ("RACE",)
    ),
    Mutant(
        "the ticket does not release the partial sums",
        _TILES,
        "atom_add_acq_rel(ticket, 1)",
        "atom_add_acquire(ticket, 1)",
        ("RACE",),
    ),
    Mutant(
        "the ticket does not acquire the partial sums",
        _TILES,
        "atom_add_acq_rel(ticket, 1)",
        "atom_add_release(ticket, 1)",
        ("RACE",),
    ),
    Mutant(
        "the ticket is ordered within the CTA only",
        _TILES,
        "atom_add_acq_rel(ticket, 1)",
        "atom_add_acq_rel<Scope::cta>(ticket, 1)",
        ("RACE", "SCOPE"),
    ),
    Mutant(
        "no barrier between the partial sums and the ticket",
        _TILES,
        "    named_bar_sync(1, COMPUTE_THREADS);\n    if (thread == 0) *shared",
        "    if (thread == 0) *shared",
        ("RACE",),
    ),
    Mutant(
        "no barrier between the ticket and its readers",
        _TILES,
        "    named_bar_sync(1, COMPUTE_THREADS);\n    if (*shared",
        "    if (*shared",
        ("RACE", "UNWRITTEN"),
    ),
    Mutant(
        "everybody waits for one more split to be the last",
        _TILES,
        "if (*shared != (u32)splits - 1) return false;",
        "if (*shared != (u32)splits) return false;",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the ticket is not made ready for the next launch",
        _TILES,
        "    if (thread == 0) st_relaxed(ticket, 0);\n",
        "",
        (WRONG_RESULT,),
    ),
    Mutant(
        "one partial sum is left out",
        _TILES,
        "for (int s = 0; s < splits; s++)",
        "for (int s = 1; s < splits; s++)",
        (WRONG_RESULT,),
    ),
    # ---- unpacking
    Mutant(
        "fragment registers 1 and 2 are exchanged",
        _UNPACK,
        "fragment[r] = T::subtract(lifted,",
        "fragment[r == 1 ? 2 : r == 2 ? 1 : r] = T::subtract(lifted,",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the second row gets the first one's zero point",
        _TILES,
        "zeros[row], zeros[row + 8]",
        "zeros[row], zeros[row]",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the scales of a group are one row off",
        _TILES,
        "return {scales[row], scales[row + 8]};",
        "return {scales[row ^ 1], scales[row + 8]};",
        (WRONG_RESULT,),
    ),
)
