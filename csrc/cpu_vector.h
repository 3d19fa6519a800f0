// Blocks of elements in float32, whatever they are in memory: for kernels that sum or compare (elementwise ones work on vectors,
// lanes_cpu.h).
//
// Blocks fit the first-level cache. A float32 operand is used where it lies; a bfloat16 one is widened into a buffer first. So a
// kernel is one plain float loop, not one loop a combination of dtypes.
//
// Everything here has internal linkage: this header is compiled for several instruction sets in one library, and the
// linker must not pick one set's copy of an inline function for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

// Asserts that iterations are independent; result and operand may still be the very same memory.
#define LRPFAST_SIMD _Pragma("omp simd")

namespace lrpfast {
namespace {

constexpr std::int64_t kBlock = 512;

inline float widen(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To the nearest bfloat16, ties to even. A NaN is cut instead, lest rounding carry it over to zero; it stays one because
// what arithmetic returns is a quiet NaN, whose mark is among the upper bits.
inline std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 : rounded);
}

inline const float* load(const Operand& operand, std::int64_t offset, std::int64_t count, float* buffer) {
  if (operand.dtype == DType::kFloat32) {
    return static_cast<const float*>(operand.data) + offset;
  }
  const std::uint16_t* source = static_cast<const std::uint16_t*>(operand.data) + offset;
  LRPFAST_SIMD
  for (std::int64_t i = 0; i < count; ++i) {
    buffer[i] = widen(source[i]);
  }
  return buffer;
}

// Writes a block in the dtype of the result.
inline void store(void* target, DType dtype, std::int64_t at, const float* values, std::int64_t count) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(target) + at, values, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  std::uint16_t* narrowed = static_cast<std::uint16_t*>(target) + at;
  LRPFAST_SIMD
  for (std::int64_t i = 0; i < count; ++i) {
    narrowed[i] = narrow(values[i]);
  }
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace lrpfast
