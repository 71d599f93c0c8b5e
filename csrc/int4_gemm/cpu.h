// INT4 GEMM on the CPU: the problem, the packed weight, and what one instruction set has to provide.
//
//   y [M, N] = x [M, K] @ W [K, N] + bias [N],   W[k, n] = scale[g(k), n] * (code[k, n] - zero[g(k), n])
//
// Packed weight: columns in blocks of 16; a word holds 8 codes of one column, the first in the low bits, so that one
// 64-byte line is 8 rows of K by 16 columns. Blocks are contiguous along K: a thread reads few long streams, a SIMD
// lane is a column (no horizontal sums), and one broadcast of activations feeds all columns. One AVX-512 register or
// two AVX2 registers hold a line, so the same buffer serves every instruction set.
//
// Rows of K are stored group by group and each group is filled up to whole words; activations are brought into the
// same order while they are packed, with zeros in the filling. That is how act-order, group sizes that are no
// multiple of 8 and ragged last groups cost nothing in the inner loop.
//
// No torch and no STL here: these headers are compiled once per instruction set, and an inline function of the
// library compiled for AVX-512 could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

#define TM_INLINE [[gnu::always_inline]] inline
// After the parameters of a lambda: one that GCC calls, as it may in a large file, gets its arrays in memory.
#define TM_INLINED __attribute__((always_inline))

namespace tokenmill::int4 {

constexpr int kBlock = 16;  // columns of a block
constexpr int kUnit = 8;    // rows of K in a word
constexpr int kLine = 64;   // bytes of one unit of one block

enum class Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What the buffer begins with that kernels/int4_gemm/cpu_layout.py makes; offsets are bytes from its start.
struct Header {
  char magic[8];
  int64_t K, N, blocks, units, groups, scale_type, in_order;
  int64_t lines, scales, zeros, group_units, source;  // offsets; zeros: 0 where there are none
};

constexpr char kMagic[] = "INT4CPU1";

struct Weight {
  const uint8_t* lines;        // [blocks][units][64 bytes]
  const void* scales;          // [blocks][groups][16] of scale_type
  const uint8_t* zeros;        // [blocks][groups][16], or null: 8 everywhere
  const int32_t* group_units;  // [groups + 1]: where each group begins, in units
  const int32_t* source;       // [units * 8]: the row of x that feeds each packed row, -1 for filling
  Type scale_type;
  int64_t blocks, units, groups;
  bool in_order;  // source[i] == i wherever it is not filling at the end: rows can be read straight
};

struct Problem {
  Weight weight;
  const void* x;  // [M, K], rows ldx elements apart
  void* y;        // [M, N], contiguous
  const void* bias;  // [N] or null
  Type type;         // of x, y and bias
  int64_t M, N, K, ldx;
};

// What packing the activations leaves behind: tiles of rows, unit by unit, and per group what undoes the offsets.
struct Rows {
  uint8_t* values;  // [tiles][units][rows of a tile][unit bytes]
  float* sums;      // [tiles][groups][rows of a tile]: sum of the packed values of a group
  float* scales;    // likewise, the scale of quantised activations; undefined for floating point
  int64_t tiles;
  int rows;   // rows of a tile
  int split;  // packed rows per row of x: 2 where a row is the sum of a coarse and a fine part
  int64_t row_bytes;  // of one packed row
};

// One arithmetic on one instruction set.
struct Kernel {
  const char* name;
  int blocks;                               // that `multiply` should be given at a time
  int64_t (*row_bytes)(const Weight&);      // of one packed row
  int (*split)(Type type);                  // packed rows per row
  int (*tile_rows)(int64_t packed_rows, int split);  // rows of a tile for so many packed rows: a multiple of split
  void (*pack)(const Problem&, const Rows&, int64_t first_tile, int64_t last_tile, float* scratch);  // or packed rows
  void (*multiply)(const Problem&, const Rows&, int64_t first_block, int64_t last_block);
  int64_t own_columns = 0;  // per thread, from which on each had better pack all rows for itself; 0: never
  int64_t bytes_at_once = 4 << 20;  // of packed rows: more of them come from memory once for every strip of blocks
  const Kernel* few = nullptr;  // what is faster for at most `few_rows` rows; int8 sums are exact, bf16 ones round anew
  int64_t few_rows = 0;
  bool packs_rows = false;  // not tiles: rows of one share no cache line, so that threads may divide it
};

// The kernel written for one level of isa.h; null where there is none. Activations of 16 bits are multiplied in bf16 or as
// int16 with a scale per row and group, those of type float32 as they are; those of 8 are quantised to int8 per row and
// group. The caller knows the processor.
const Kernel* kernel_for(int64_t activation_bits, int64_t isa, Type type);

extern const Kernel kPlainFloat;
extern const Kernel kAvx2Float, kAvx2Int16, kAvx2Int8;
extern const Kernel kAvxVnniInt16, kAvxVnniInt8;
extern const Kernel kAvx512Float, kAvx512Int16;
extern const Kernel kAvx512VnniInt16, kAvx512VnniInt8;
extern const Kernel kAvx512Bf16;
extern const Kernel kAmxBf16, kAmxInt16, kAmxInt8;

}  // namespace tokenmill::int4
