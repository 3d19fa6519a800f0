// A product of matrices small enough to stay in the caches: what larger products are made of.
//
// The right factor lies in panels of kPanel columns ([columns / kPanel][depth][kPanel]), so that the inner loop reads it in
// order; the left one is read where it lies, row by row. A block of results stays in registers while the depth is summed up.
// Multiply-adds are fused where the instruction set has them: results agree between sets to rounding, not bit by bit.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu_vector.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kPanel = 32;

#if defined(__AVX512F__)
using Lanes = __m512;
constexpr std::int64_t kLanes = 16;
constexpr int kBlockRows = 14, kBlockLanes = 2;
inline Lanes lanes(const float* p) { return _mm512_loadu_ps(p); }
inline Lanes lanes(float value) { return _mm512_set1_ps(value); }
inline void put(float* p, Lanes v) { _mm512_storeu_ps(p, v); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
using Lanes = __m256;
constexpr std::int64_t kLanes = 8;
constexpr int kBlockRows = 6, kBlockLanes = 2;
inline Lanes lanes(const float* p) { return _mm256_loadu_ps(p); }
inline Lanes lanes(float value) { return _mm256_set1_ps(value); }
inline void put(float* p, Lanes v) { _mm256_storeu_ps(p, v); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
#else
typedef float Lanes __attribute__((vector_size(16)));
constexpr std::int64_t kLanes = 4;
constexpr int kBlockRows = 4, kBlockLanes = 2;
inline Lanes lanes(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Lanes lanes(float value) { return Lanes{value, value, value, value}; }
inline void put(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
inline Lanes larger(Lanes a, Lanes b) {  // as the instruction: the second where either is NaN
  Lanes v;
  for (int i = 0; i < 4; ++i) {
    v[i] = a[i] > b[i] ? a[i] : b[i];
  }
  return v;
}
#endif

// `kRows` rows by kBlockLanes vectors of the product: c = a b.
template <int kRows>
inline void multiply_block(const float* a, std::int64_t a_stride, const float* b, std::int64_t depth, float* c,
                           std::int64_t c_stride) {
  Lanes sum[kRows][kBlockLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlockLanes; ++j) {
      sum[i][j] = lanes(0.0f);
    }
  }
  for (std::int64_t k = 0; k < depth; ++k, b += kPanel) {
    Lanes right[kBlockLanes];
#pragma GCC unroll 2
    for (int j = 0; j < kBlockLanes; ++j) {
      right[j] = lanes(b + j * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Lanes left = lanes(a[i * a_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kBlockLanes; ++j) {
        sum[i][j] = multiply_add(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlockLanes; ++j) {
      put(c + i * c_stride + j * kLanes, sum[i][j]);
    }
  }
}

template <int kRows>
void multiply_rest(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b, std::int64_t depth,
                   float* c, std::int64_t c_stride) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_block<kRows>(a, a_stride, b, depth, c, c_stride);
    } else {
      multiply_rest<kRows - 1>(rows, a, a_stride, b, depth, c, c_stride);
    }
  }
}

// c = a b for one panel of b: `rows` rows, kPanel columns.
inline void multiply_panel(std::int64_t rows, const float* a, std::int64_t a_stride, const float* panel,
                           std::int64_t depth, float* c, std::int64_t c_stride) {
  for (std::int64_t column = 0; column < kPanel; column += kBlockLanes * kLanes) {
    std::int64_t row = 0;
    for (; row + kBlockRows <= rows; row += kBlockRows) {
      multiply_block<kBlockRows>(a + row * a_stride, a_stride, panel + column, depth, c + row * c_stride + column,
                                 c_stride);
    }
    multiply_rest<kBlockRows - 1>(rows - row, a + row * a_stride, a_stride, panel + column, depth,
                                  c + row * c_stride + column, c_stride);
  }
}

}  // namespace
}  // namespace lrpfast
