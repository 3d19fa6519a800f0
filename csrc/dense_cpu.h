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
constexpr std::int64_t kListed = 4096;   // rows that are looked through at a time

template <bool kScaled>
inline Lanes weight_at(const float* w, Lanes positive, Lanes other) {
  const Lanes weight = lanes(w);
  return kScaled ? weight * (weight > Lanes{} ? positive : other) : weight;
}

// `kMany` rows of the weight, `count` columns of the result from `column` on. While they are read, the rows `kRows` further on in the
// list are asked for: rows lie in other pages, at which the processor's own prefetching stops. Twice the speed.
template <bool kScaled, int kMany>
void dense_rows(const DenseDgradArguments& a, const std::int32_t* listed, std::int64_t column, std::int64_t count) {
  const Lanes positive = lanes(a.scales[0]), other = lanes(a.scales[1]);
  const std::int64_t whole = count / kLanes * kLanes;
  const float *rows[kMany], *next[kMany];
  for (int r = 0; r < kMany; ++r) {
    rows[r] = a.weight + listed[r] * a.inputs + column;
    next[r] = a.weight + listed[r + kRows] * a.inputs + column;
  }
  for (std::int64_t n = 0; n < a.batch; ++n) {
    float s[kMany];
    for (int r = 0; r < kMany; ++r) {
      s[r] = a.s[n * a.outputs + listed[r]];
    }
    float* result = a.result + n * a.inputs + column;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      Lanes sum = {};
#pragma GCC unroll 16
      for (int r = 0; r < kMany; ++r) {
        __builtin_prefetch(next[r] + i, 0, 2);
        sum = multiply_add(weight_at<kScaled>(rows[r] + i, positive, other), lanes(s[r]), sum);
      }
      put(result + i, lanes(static_cast<const float*>(result + i)) + sum);
    }
    for (std::int64_t i = whole; i < count; ++i) {
      float sum = 0.0f;
      for (int r = 0; r < kMany; ++r) {
        sum += (kScaled ? scaled(rows[r][i], a.scales) : rows[r][i]) * s[r];
      }
      result[i] += sum;
    }
  }
}

// The same for the first `number` rows of the list, at most kMany.
template <bool kScaled, int kMany>
void dense_rows_of(const DenseDgradArguments& a, const std::int32_t* listed, int number, std::int64_t column,
                   std::int64_t count) {
  if constexpr (kMany > 0) {
    number == kMany ? dense_rows<kScaled, kMany>(a, listed, column, count)
                    : dense_rows_of<kScaled, kMany - 1>(a, listed, number, column, count);
  }
}

// Lists the rows of [begin, end) that any sample's s reaches: behind a ReLU it is zero for half of them, and their weights need not be
// read. `to` has room for kRows more, which are the last one again.
inline std::int64_t list_rows(const DenseDgradArguments& a, std::int64_t begin, std::int64_t end, std::int32_t* to) {
  std::int64_t listed = 0;
  for (std::int64_t row = begin; row < end; ++row) {
    bool reached = false;
    for (std::int64_t n = 0; n < a.batch; ++n) {
      reached |= a.s[n * a.outputs + row] != 0.0f;
    }
    to[listed] = static_cast<std::int32_t>(row);
    listed += reached;
  }
  for (int r = 0; r < kRows; ++r) {
    to[listed + r] = listed > 0 ? to[listed - 1] : 0;
  }
  return listed;
}

template <bool kScaled>
void dense_columns(const DenseDgradArguments& a, std::int64_t begin, std::int64_t end) {
  std::int32_t listed[kListed + kRows];
  for (std::int64_t column = begin; column < end; column += kColumns) {
    const std::int64_t count = smaller(kColumns, end - column);
    for (std::int64_t n = 0; n < a.batch; ++n) {
      std::memset(a.result + n * a.inputs + column, 0, static_cast<std::size_t>(count) * sizeof(float));
    }
    for (std::int64_t first = 0; first < a.outputs; first += kListed) {
      const std::int64_t last = smaller(first + kListed, a.outputs);
      const std::int64_t rows = list_rows(a, first, last, listed);
      // What is summed together are the rows of sixteen neighbours, whichever are reached: a sample's sums do not hang on the others.
      for (std::int64_t row = 0; row < rows;) {
        int number = 1;
        while (row + number < rows && listed[row + number] / kRows == listed[row] / kRows) {
          ++number;
        }
        dense_rows_of<kScaled, kRows>(a, listed + row, number, column, count);
        row += number;
      }
    }
  }
}

// The columns [begin, end) of the result.
void dense_dgrad(const DenseDgradArguments& a, std::int64_t begin, std::int64_t end) {
  a.scaled ? dense_columns<true>(a, begin, end) : dense_columns<false>(a, begin, end);
}

}  // namespace
}  // namespace lrpfast
