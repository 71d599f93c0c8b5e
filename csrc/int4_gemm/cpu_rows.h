// Reading rows of activations and writing rows of results; compiled once per instruction set.
#pragma once

#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "cpu.h"

namespace tokenmill::int4 {
namespace {

TM_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TM_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TM_INLINE float bf16_to_float(uint16_t value) { return from_bits(uint32_t(value) << 16); }

// Round to nearest even; a NaN stays a NaN.
TM_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

TM_INLINE float half_to_float(uint16_t value) {
#ifdef __F16C__
  return __builtin_ia32_vcvtph2ps((__attribute__((vector_size(16))) short){short(value)})[0];
#else
  const uint32_t sign = uint32_t(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) return from_bits(sign | to_bits(float(magnitude) * 5.9604644775390625e-8f));
  return from_bits(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

// Round to nearest even; overflow becomes infinity.
TM_INLINE uint16_t float_to_half(float value) {
#ifdef __F16C__
  return uint16_t(__builtin_ia32_vcvtps2ph((__attribute__((vector_size(16))) float){value}, 0)[0]);
#else
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lines the subnormal's last bit up with the float's, and rounds as the hardware does.
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
#endif
}

TM_INLINE float load_as_float(const void* base, Type type, int64_t index) {
  if (type == Type::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t raw = static_cast<const uint16_t*>(base)[index];
  return type == Type::kFloat16 ? half_to_float(raw) : bf16_to_float(raw);
}

TM_INLINE void store_from_float(void* base, Type type, int64_t index, float value) {
  if (type == Type::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<uint16_t*>(base)[index] = type == Type::kFloat16 ? float_to_half(value) : float_to_bf16(value);
  }
}

// `count` values from `from` on, which is of kType.
template <Type kType>
TM_INLINE void to_floats(const void* base, int64_t from, int64_t count, float* values) {
  int64_t i = 0;
#ifdef __F16C__
  // GCC makes no vectors of this conversion by itself.
  if constexpr (kType == Type::kFloat16) {
    const auto* raw = static_cast<const uint16_t*>(base) + from;
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(raw + i))));
    }
  }
#endif
  for (; i < count; ++i) values[i] = load_as_float(base, kType, from + i);
}

template <Type kType>
void read_row(const Problem& p, int64_t m, int64_t begin, int64_t end, float* values) {
  const char* x = static_cast<const char*>(p.x) + m * p.ldx * (kType == Type::kFloat32 ? 4 : 2);
  if (p.weight.in_order) {
    const int64_t exist = p.K <= begin ? 0 : p.K < end ? p.K - begin : end - begin;
    to_floats<kType>(x, begin, exist, values);
    for (int64_t i = exist; i < end - begin; ++i) values[i] = 0.0f;
    return;
  }
  const int32_t* source = p.weight.source;
  for (int64_t i = begin; i < end; ++i) *values++ = source[i] < 0 ? 0.0f : load_as_float(x, kType, source[i]);
}

// Units first..last-1 of row m of x in packed order, as float; rows past the last are zeros.
void read_row(const Problem& p, int64_t m, int64_t first, int64_t last, float* values) {
  const int64_t begin = first * kUnit, end = last * kUnit;
  if (m >= p.M) {
    std::memset(values, 0, size_t(end - begin) * sizeof(float));
  } else if (p.type == Type::kFloat32) {
    read_row<Type::kFloat32>(p, m, begin, end, values);
  } else if (p.type == Type::kFloat16) {
    read_row<Type::kFloat16>(p, m, begin, end, values);
  } else {
    read_row<Type::kBFloat16>(p, m, begin, end, values);
  }
}

// One row of a tile; the type is known here, so that the compiler makes vectors of the loop.
template <Type kType>
void store_row(const Problem& p, int64_t m, int64_t n0, int64_t width, const float* coarse, const float* fine) {
  for (int64_t n = 0; n < width; ++n) {
    float value = fine ? coarse[n] + fine[n] : coarse[n];
    if (p.bias) value += load_as_float(p.bias, kType, n0 + n);
    store_from_float(p.y, kType, m * p.N + n0 + n, value);
  }
}

// Adds the parts of a row, adds the bias, rounds once, and writes the columns that exist.
// `tile` is [rows][columns] of packed rows first_row.. and of the blocks from `block` on.
void store_tile(const Problem& p, const Rows& rows, int64_t first_row, int64_t block, int columns, const float* tile) {
  const int64_t n0 = block * kBlock;
  const int64_t width = n0 + columns <= p.N ? columns : p.N - n0;
  for (int r = 0; r < rows.rows; r += rows.split) {
    const int64_t m = (first_row + r) / rows.split;
    if (m >= p.M) return;
    const float* coarse = tile + int64_t(r) * columns;
    const float* fine = rows.split == 2 ? coarse + columns : nullptr;
    if (p.type == Type::kFloat32) {
      store_row<Type::kFloat32>(p, m, n0, width, coarse, fine);
    } else if (p.type == Type::kFloat16) {
      store_row<Type::kFloat16>(p, m, n0, width, coarse, fine);
    } else {
      store_row<Type::kBFloat16>(p, m, n0, width, coarse, fine);
    }
  }
}

}  // namespace
}  // namespace tokenmill::int4
