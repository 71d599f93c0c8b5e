// The choice of an instruction set, and both arithmetics in plain C++ for processors that have none of them.
#include "cpu.h"

#include "cpu_tiles.h"
#include "isa.h"

namespace tokenmill::int4 {
namespace {

// Same packing as the vector kernels read: activations as they are, or int8 in natural order.
struct PlainFloat {
  static constexpr int kUnitBytes = kUnit * int(sizeof(float));
  static constexpr int kMaxRows = 4;
  static constexpr int width(int) { return 1; }

  template <int MB, int NB>
  static void tile(const Weight& w, const uint8_t* x, const float* sums, const float*, int64_t block, float* out) {
    static_assert(NB == 1);
    const uint8_t* lines = w.lines + block * w.units * kLine;
    std::memset(out, 0, sizeof(float) * MB * kBlock);
    for (int64_t g = 0; g < w.groups; ++g) {
      float acc[MB][kBlock] = {};
      for (int32_t u = w.group_units[g]; u < w.group_units[g + 1]; ++u, lines += kLine, x += MB * kUnitBytes) {
        uint32_t words[kBlock];
        float a[MB][kUnit];
        std::memcpy(words, lines, sizeof words);
        std::memcpy(a, x, sizeof a);
        for (int i = 0; i < kUnit; ++i) {
          float code[kBlock];
          for (int c = 0; c < kBlock; ++c) code[c] = float(int32_t(words[c] >> (4 * i) & 15u));
          for (int m = 0; m < MB; ++m) {
            for (int c = 0; c < kBlock; ++c) acc[m][c] += code[c] * a[m][i];
          }
        }
      }
      add_group<MB>(w, g, block, acc, sums, nullptr, out);
    }
  }

  template <int MB>
  static void add_group(const Weight& w, int64_t g, int64_t block, const float (&acc)[MB][kBlock], const float* sums,
                        const float* scales, float* out) {
    const int64_t index = (block * w.groups + g) * kBlock;
    for (int m = 0; m < MB; ++m) {
      for (int c = 0; c < kBlock; ++c) {
        const float zero = w.zeros ? float(w.zeros[index + c]) : 8.0f;
        const float scale = load_as_float(w.scales, w.scale_type, index + c) * (scales ? scales[g * MB + m] : 1.0f);
        out[m * kBlock + c] += (acc[m][c] - zero * sums[g * MB + m]) * scale;
      }
    }
  }

  static void pack_group(const float* values, int32_t units, uint8_t* out, int64_t stride, float* sum, float*) {
    *sum = 0.0f;
    for (int32_t u = 0; u < units; ++u, values += kUnit, out += stride) {
      std::memcpy(out, values, kUnitBytes);
      for (int i = 0; i < kUnit; ++i) *sum += values[i];
    }
  }
};

}  // namespace

const Kernel kPlainFloat = {"plain", kStrip, unit_row_bytes<PlainFloat>, no_split,
                            tile_rows<PlainFloat>, pack<PlainFloat>,   multiply<PlainFloat>};

namespace {

struct Entry {
  int64_t activation_bits;
  Isa isa;
  const Kernel* kernel;
  const Kernel* float32 = kernel;  // for activations of that type; null: none that keeps all of their bits
};

// W4A8 in plain C++ would save nothing over W4A16, so there is none.
const Entry kEntries[] = {
    {16, ISA_PLAIN, &kPlainFloat},
#if defined(__x86_64__)
    {16, ISA_AVX2, &kAvx2Int16, &kAvx2Float},
    {16, ISA_AVX_VNNI, &kAvxVnniInt16, nullptr},
    {16, ISA_AVX512, &kAvx512Int16, &kAvx512Float},
    {16, ISA_AVX512_VNNI, &kAvx512VnniInt16, nullptr},
    {16, ISA_AVX512_BF16, &kAvx512Bf16, nullptr},
    {16, ISA_AMX, &kAmxBf16, nullptr},
    {8, ISA_AVX2, &kAvx2Int8},
    {8, ISA_AVX_VNNI, &kAvxVnniInt8},
    {8, ISA_AVX512_VNNI, &kAvx512VnniInt8},
    {8, ISA_AMX, &kAmxInt8},
#endif
};

}  // namespace

const Kernel* kernel_for(int64_t activation_bits, int64_t isa, Type type) {
  for (const Entry& entry : kEntries) {
    if (entry.activation_bits == activation_bits && entry.isa == isa) {
      return type == Type::kFloat32 ? entry.float32 : entry.kernel;
    }
  }
  return nullptr;
}

}  // namespace tokenmill::int4
