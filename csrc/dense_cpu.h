// Dense layers and their transposes for a small batch. They are bound by reading the weight, so the weight is read once, in the
// order in which it lies, and whatever is asked of it is computed from that one reading: a layer with its own weight and with a
// modified one, which never stands in memory.
#pragma once

#include "matrix_cpu.h"

namespace lrpfast {
namespace {

inline float scaled(float w, const float scales[2]) { return w * (w > 0.0f ? scales[0] : scales[1]); }

inline float sum_of(Lanes v) {
  float sum = 0.0f;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    sum += v[i];
  }
  return sum;
}

// Rows that are read together: memory gives several streams faster than one, and the input is loaded once for all.
constexpr int kTogetherRows = 4;
constexpr int kSums = 2;  // a row: the next product need not wait for the last
// Asked for into the second-level cache: the first has too few places for lines that are on their way.
constexpr std::int64_t kAhead = 512;

// `kMany` outputs from `output` on.
template <bool kPlain, bool kScaled, int kMany>
inline void dense_some(const DenseArguments& a, std::int64_t output, std::int64_t n) {
  const float *w = a.weight + output * a.inputs, *x = a.x + n * a.inputs;
  const Lanes positive = lanes(a.scales[0]), negative = lanes(a.scales[1]);
  Lanes plain[kMany][kSums] = {}, other[kMany][kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums * kLanes <= a.inputs; i += kSums * kLanes) {
#pragma GCC unroll 2
    for (int j = 0; j < kSums; ++j) {
      const Lanes input = lanes(x + i + j * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kMany; ++r) {
        const float* at = w + r * a.inputs + i + j * kLanes;
        __builtin_prefetch(at + kAhead, 0, 2);
        const Lanes weight = lanes(at);
        if (kPlain) {
          plain[r][j] = multiply_add(weight, input, plain[r][j]);
        }
        if (kScaled) {
          other[r][j] = multiply_add(weight * (weight > Lanes{} ? positive : negative), input, other[r][j]);
        }
      }
    }
  }
  for (int r = 0; r < kMany; ++r) {
    float plain_sum = sum_of(plain[r][0] + plain[r][1]), other_sum = sum_of(other[r][0] + other[r][1]);
    for (std::int64_t rest = i; rest < a.inputs; ++rest) {
      const float weight = w[r * a.inputs + rest];
      plain_sum += weight * x[rest];
      other_sum += scaled(weight, a.scales) * x[rest];
    }
    const std::int64_t at = n * a.outputs + output + r;
    if (kPlain) {
      a.result[at] = plain_sum + (a.bias ? a.bias[output + r] : 0.0f);
    }
    if (kScaled) {
      a.scaled_result[at] = other_sum + (a.scaled_bias ? a.scaled_bias[output + r] : 0.0f);
    }
  }
}

template <bool kPlain, bool kScaled>
void dense_outputs(const DenseArguments& a, std::int64_t begin, std::int64_t end) {
  std::int64_t output = begin;
  for (; output + kTogetherRows <= end; output += kTogetherRows) {
    for (std::int64_t n = 0; n < a.batch; ++n) {
      dense_some<kPlain, kScaled, kTogetherRows>(a, output, n);
    }
  }
  for (; output < end; ++output) {
    for (std::int64_t n = 0; n < a.batch; ++n) {
      dense_some<kPlain, kScaled, 1>(a, output, n);
    }
  }
}

// The outputs [begin, end).
void dense(const DenseArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.result && a.scaled_result) {
    dense_outputs<true, true>(a, begin, end);
  } else {
    a.result ? dense_outputs<true, false>(a, begin, end) : dense_outputs<false, true>(a, begin, end);
  }
}

constexpr std::int64_t kColumns = 8192;  // of the result at a time; fewer would be fewer pages of a row
constexpr int kRows = 16;                // summed before the result is touched, which also keeps rounding small

template <bool kScaled>
inline Lanes weight_at(const float* w, Lanes positive, Lanes other) {
  const Lanes weight = lanes(w);
  return kScaled ? weight * (weight > Lanes{} ? positive : other) : weight;
}

// `kMany` rows of the weight, `count` columns of the result from `column` on.
template <bool kScaled, int kMany>
void dense_rows(const DenseDgradArguments& a, std::int64_t row, std::int64_t column, std::int64_t count) {
  const Lanes positive = lanes(a.scales[0]), other = lanes(a.scales[1]);
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t n = 0; n < a.batch; ++n) {
    const float* s = a.s + n * a.outputs + row;
    const float* w = a.weight + row * a.inputs + column;
    float* result = a.result + n * a.inputs + column;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      Lanes sums[2] = {};
#pragma GCC unroll 16
      for (int r = 0; r < kMany; ++r) {
        // The next rows lie in other pages, at which the processor's own prefetching stops: twice the speed.
        __builtin_prefetch(w + (r + kMany) * a.inputs + i, 0, 2);
        sums[r % 2] = multiply_add(weight_at<kScaled>(w + r * a.inputs + i, positive, other), lanes(s[r]), sums[r % 2]);
      }
      put(result + i, lanes(static_cast<const float*>(result + i)) + (sums[0] + sums[1]));
    }
    for (std::int64_t i = whole; i < count; ++i) {
      float sum = 0.0f;
      for (int r = 0; r < kMany; ++r) {
        const float weight = w[r * a.inputs + i];
        sum += (kScaled ? scaled(weight, a.scales) : weight) * s[r];
      }
      result[i] += sum;
    }
  }
}

template <bool kScaled>
void dense_columns(const DenseDgradArguments& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t column = begin; column < end; column += kColumns) {
    const std::int64_t count = smaller(kColumns, end - column);
    for (std::int64_t n = 0; n < a.batch; ++n) {
      std::memset(a.result + n * a.inputs + column, 0, static_cast<std::size_t>(count) * sizeof(float));
    }
    std::int64_t row = 0;
    for (; row + kRows <= a.outputs; row += kRows) {
      dense_rows<kScaled, kRows>(a, row, column, count);
    }
    for (; row < a.outputs; ++row) {
      dense_rows<kScaled, 1>(a, row, column, count);
    }
  }
}

// The columns [begin, end) of the result.
void dense_dgrad(const DenseDgradArguments& a, std::int64_t begin, std::int64_t end) {
  a.scaled ? dense_columns<true>(a, begin, end) : dense_columns<false>(a, begin, end);
}

}  // namespace
}  // namespace lrpfast
