// The transpose of a dense layer for a small batch. It is bound by reading the weight, so the weight is read once, in the
// order in which it lies, and the results of a stretch of columns stay in the cache meanwhile.
#pragma once

#include "cpu_vector.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kColumns = 1024;  // of float32: a page of each row at a time
constexpr std::int64_t kRows = 16;       // summed before the result is touched, which also keeps rounding small

inline float four(const float* s, const float* w, std::int64_t stride) {
  return (s[0] * w[0] + s[1] * w[stride]) + (s[2] * w[2 * stride] + s[3] * w[3 * stride]);
}

void dense_rows(const DenseDgradArguments& a, std::int64_t row, std::int64_t column, std::int64_t count) {
  const float* weight = a.weight + row * a.inputs + column;
  const std::int64_t stride = a.inputs;
  for (std::int64_t n = 0; n < a.batch; ++n) {
    const float* s = a.s + n * a.outputs + row;
    float* result = a.result + n * a.inputs + column;
    LRPFAST_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      const float* w = weight + i;
      result[i] += (four(s, w, stride) + four(s + 4, w + 4 * stride, stride)) +
                   (four(s + 8, w + 8 * stride, stride) + four(s + 12, w + 12 * stride, stride));
    }
  }
}

void dense_row(const DenseDgradArguments& a, std::int64_t row, std::int64_t column, std::int64_t count) {
  const float* w = a.weight + row * a.inputs + column;
  for (std::int64_t n = 0; n < a.batch; ++n) {
    const float s = a.s[n * a.outputs + row];
    float* result = a.result + n * a.inputs + column;
    LRPFAST_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      result[i] += s * w[i];
    }
  }
}

// The columns [begin, end) of the result.
void dense_dgrad(const DenseDgradArguments& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t column = begin; column < end; column += kColumns) {
    const std::int64_t count = smaller(kColumns, end - column);
    for (std::int64_t n = 0; n < a.batch; ++n) {
      std::memset(a.result + n * a.inputs + column, 0, static_cast<std::size_t>(count) * sizeof(float));
    }
    std::int64_t row = 0;
    for (; row + kRows <= a.outputs; row += kRows) {
      dense_rows(a, row, column, count);
    }
    for (; row < a.outputs; ++row) {
      dense_row(a, row, column, count);
    }
  }
}

}  // namespace
}  // namespace lrpfast
