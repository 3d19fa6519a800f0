// A 1 x 1 convolution is a product of matrices: rows are places of images. What follows it elementwise happens in its
// epilogue. By sign, the positive part of a layer with signed input (RULES §2) is one product, and so is its transpose.
#pragma once

#include "epilogue_cpu.h"
#include "parallel.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kDepth = 256;  // summed up at a time: rounding stays small, and a panel stays in the first-level cache

// Where a row's channels lie.
template <typename T>
inline const T* input_row(const PointwiseArguments<T>& a, std::int64_t row) {
  if (a.stride[0] == 1 && a.stride[1] == 1) {
    return a.input + row * a.channels;
  }
  const std::int64_t x = row % a.out_size[1], y = row / a.out_size[1] % a.out_size[0];
  const std::int64_t image = row / a.out_size[1] / a.out_size[0];
  return a.input + ((image * a.size[0] + y * a.stride[0]) * a.size[1] + x * a.stride[1]) * a.channels;
}

// What a row's channels take, in floats.
template <typename T>
inline std::int64_t depth_of(const PointwiseArguments<T>& a) { return a.channels / kValuesAFloat<T>; }

template <typename T>
inline bool gathers(const PointwiseArguments<T>& a) {
  return a.stride[0] != 1 || a.stride[1] != 1 || depth_of(a) % 512 == 0;
}

template <typename T>
void gather_rows(const PointwiseArguments<T>& a, std::int64_t first, std::int64_t count, float* to, std::int64_t stride) {
  for (std::int64_t r = 0; r < count; ++r, to += stride) {
    std::memcpy(to, input_row(a, first + r), static_cast<std::size_t>(a.channels) * sizeof(T));
  }
}

// The product of some rows, all filters: to `products`, whose rows are as many whole panels, as those of `signs` are.
template <BySign kSign, typename T>
void multiply_rows(const PointwiseArguments<T>& a, const float* rows, std::int64_t stride, const float* signs,
                   std::int64_t count, float* products, std::int64_t width, Fetch& fetch) {
  constexpr std::int64_t kWeights = kSign == BySign::kNone ? 1 : 2, kStep = kDepth / kWeights;
  const float* weights = reinterpret_cast<const float*>(a.weight);
  const std::int64_t whole = depth_of(a);
  for (std::int64_t panel = 0; panel < a.filters; panel += kPanel) {
    const std::int64_t columns = smaller(kPanel, a.filters - panel);
    for (std::int64_t k = 0; k < whole; k += kStep) {
      const float* weight = weights + kWeights * (panel * whole + k * kPanel);
      const std::int64_t depth = smaller(kStep, whole - k);
      const auto sink = [&](std::int64_t row, std::int64_t column, Lanes sum) {
        float* product = products + row * width + panel + column;
        put(product, k == 0 ? sum : lanes(static_cast<const float*>(product)) + sum);
      };
      if constexpr (kSign == BySign::kGiven) {
        multiply_chosen_panel(count, rows + k, stride, weight, depth, columns, signs + panel, width, sink, fetch);
      } else {
        constexpr Factors kFactors = kSign == BySign::kInput ? Factors::kBySign : kFactorsOf<T>;
        multiply_panel<kFactors>(count, rows + k, stride, weight, depth, columns, sink, fetch);
      }
    }
  }
}

// What is asked for while `count` rows are multiplied: what their epilogue reads and writes, and the rows behind them.
template <typename T>
Fetch pointwise_fetch(const PointwiseArguments<T>& a, std::int64_t first, std::int64_t count, std::int64_t end) {
  const std::int64_t blocks = (count + kBlockRows - 1) / kBlockRows, panels = (a.filters + kPanel - 1) / kPanel;
  const std::int64_t times = blocks * panels * ((depth_of(a) + kFetch - 1) / kFetch);
  const std::int64_t at = first * a.filters, size = count * a.filters;
  const EpilogueOf<T>& e = a.epilogue;
  Fetch fetch;
  const bool over = e.message_a == a.result || e.message_b == a.result;
  const T* operands[] = {e.message_a, e.message_b, e.carrier, over ? nullptr : a.result};
  for (const T* operand : operands) {
    fetch.add(operand ? operand + at : nullptr, size, times);
  }
  const std::int64_t next = smaller(a.block, end - first - count);
  fetch.add(a.sign ? a.sign + at + size : nullptr, next * a.filters, times);
  if (a.stride[0] == 1 && a.stride[1] == 1) {
    fetch.add(a.input + (first + count) * a.channels, next * a.channels, times);
  }
  return fetch;
}

// Products become results in the order in which these lie in memory, all filters of a row, then the next row.
template <typename T>
void finish_rows(const PointwiseArguments<T>& a, std::int64_t first, std::int64_t count, const float* products,
                 std::int64_t width) {
  for (std::int64_t row = 0; row < count; ++row) {
    const std::int64_t at = (first + row) * a.filters;
    std::int64_t f = 0;
    for (; f + kLanes <= a.filters; f += kLanes) {
      finish(a.epilogue, lanes(products + row * width + f), f, a.result, at + f);
    }
    if (f < a.filters) {
      finish_part(a.epilogue, lanes(products + row * width + f), f, a.result, at + f, a.filters - f);
    }
  }
}

// A piece is a block of rows.
template <BySign kSign, typename T>
void pointwise_by(const PointwiseArguments<T>& a, Pieces& pieces) {
  const std::int64_t rows = a.images * a.out_size[0] * a.out_size[1], blocks = (rows + a.block - 1) / a.block;
  const std::int64_t width = (a.filters + kPanel - 1) / kPanel * kPanel;
  const bool gathered = gathers(a);
  const std::int64_t stride = gathered ? depth_of(a) + kSkew : depth_of(a);
  float* workspace = a.workspace + pieces.member() * a.block * (depth_of(a) + kSkew + (a.sign ? 2 : 1) * width);
  float *products = workspace + a.block * (depth_of(a) + kSkew), *signs = products + a.block * width;
  for (std::int64_t i = pieces.next(blocks); i >= 0; i = pieces.next(blocks)) {
    const std::int64_t first = i * a.block, count = smaller(a.block, rows - first);
    if (gathered) {
      gather_rows(a, first, count, workspace, stride);
    }
    for (std::int64_t row = 0; a.sign && row < count; ++row) {
      const T* from = a.sign + (first + row) * a.filters;
      std::memcpy(signs + row * width, from, static_cast<std::size_t>(a.filters) * sizeof(T));
    }
    Fetch fetch = pointwise_fetch(a, first, count, rows);
    const float* from = gathered ? workspace : reinterpret_cast<const float*>(input_row(a, first));
    multiply_rows<kSign>(a, from, stride, signs, count, products, width, fetch);
    finish_rows(a, first, count, products, width);
  }
}

template <typename T>
void pointwise(const PointwiseArguments<T>& a, Pieces& pieces) {
  if constexpr (kValuesAFloat<T> == 1) {
    if (a.by_sign == BySign::kInput) {
      return pointwise_by<BySign::kInput>(a, pieces);
    }
    if (a.by_sign == BySign::kGiven) {
      return pointwise_by<BySign::kGiven>(a, pieces);
    }
  }
  pointwise_by<BySign::kNone>(a, pieces);
}

}  // namespace
}  // namespace lrpfast
