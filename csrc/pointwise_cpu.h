// A 1 x 1 convolution is a product of matrices: rows are places of images. What follows it elementwise happens in its
// epilogue; signed inputs (RULES §2, the positive part of a layer) are parted while rows are gathered.
#pragma once

#include "epilogue_cpu.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kDepth = 256;  // summed up at a time: rounding stays small, and a panel stays in the first-level cache

// Where a row's channels lie.
inline const float* input_row(const PointwiseArguments& a, std::int64_t row) {
  if (a.stride[0] == 1 && a.stride[1] == 1) {
    return a.input + row * a.channels;
  }
  const std::int64_t x = row % a.out_size[1], y = row / a.out_size[1] % a.out_size[0];
  const std::int64_t image = row / a.out_size[1] / a.out_size[0];
  return a.input + ((image * a.size[0] + y * a.stride[0]) * a.size[1] + x * a.stride[1]) * a.channels;
}

inline bool gathers(const PointwiseArguments& a) {
  return a.by_sign || a.stride[0] != 1 || a.stride[1] != 1 || a.channels % 512 == 0;
}

inline std::int64_t pointwise_depth(const PointwiseArguments& a) { return a.by_sign ? 2 * a.channels : a.channels; }

void gather_rows(const PointwiseArguments& a, std::int64_t first, std::int64_t count, float* to, std::int64_t stride) {
  for (std::int64_t r = 0; r < count; ++r, to += stride) {
    const float* from = input_row(a, first + r);
    if (!a.by_sign) {
      std::memcpy(to, from, static_cast<std::size_t>(a.channels) * sizeof(float));
      continue;
    }
    float* negative = to + a.channels;
    LRPFAST_SIMD
    for (std::int64_t c = 0; c < a.channels; ++c) {
      const float x = from[c];
      to[c] = x < 0.0f ? 0.0f : x;
      negative[c] = x > 0.0f ? 0.0f : x;
    }
  }
}

// The product of some rows with one weight, all filters: to `products`, whose rows are as many whole panels.
void multiply_rows(const PointwiseArguments& a, const float* weight, const float* rows, std::int64_t stride,
                   std::int64_t count, float* products, std::int64_t width, Fetch& fetch) {
  const std::int64_t depth = pointwise_depth(a);
  for (std::int64_t panel = 0; panel < a.filters; panel += kPanel) {
    float* to = products + panel;
    for (std::int64_t k = 0; k < depth; k += kDepth) {
      multiply_panel(
          count, rows + k, stride, weight + panel * depth + k * kPanel, smaller(kDepth, depth - k),
          smaller(kPanel, a.filters - panel),
          [&](std::int64_t row, std::int64_t column, Lanes sum) {
            float* product = to + row * width + column;
            put(product, k == 0 ? sum : lanes(static_cast<const float*>(product)) + sum);
          },
          fetch);
    }
  }
}

// What is asked for while `count` rows are multiplied: what their epilogue reads and writes, and the rows behind them.
Fetch pointwise_fetch(const PointwiseArguments& a, std::int64_t first, std::int64_t count, std::int64_t end) {
  const std::int64_t blocks = (count + kBlockRows - 1) / kBlockRows, panels = (a.filters + kPanel - 1) / kPanel;
  const std::int64_t times = blocks * panels * ((pointwise_depth(a) + kFetch - 1) / kFetch);
  const std::int64_t at = first * a.filters, size = count * a.filters;
  const Epilogue& e = a.epilogue;
  Fetch fetch;
  const bool over = e.message_a == a.result || e.message_b == a.result;
  const float* operands[] = {e.message_a, e.message_b, e.carrier, e.sign, over ? nullptr : a.result};
  for (const float* operand : operands) {
    fetch.add(operand ? operand + at : nullptr, size, times);
  }
  if (a.stride[0] == 1 && a.stride[1] == 1) {
    fetch.add(a.input + (first + count) * a.channels, smaller(a.block, end - first - count) * a.channels, times);
  }
  return fetch;
}

// Products become results in the order in which these lie in memory, all filters of a row, then the next row.
void finish_rows(const PointwiseArguments& a, const Epilogue& epilogue, std::int64_t first, std::int64_t count,
                 const float* products, std::int64_t width) {
  for (std::int64_t row = 0; row < count; ++row) {
    const std::int64_t at = (first + row) * a.filters;
    std::int64_t f = 0;
    for (; f + kLanes <= a.filters; f += kLanes) {
      finish(epilogue, lanes(products + row * width + f), f, a.result, at + f);
    }
    if (f < a.filters) {
      finish_part(epilogue, lanes(products + row * width + f), f, a.result, at + f, a.filters - f);
    }
  }
}

void pointwise_rows(const PointwiseArguments& a, std::int64_t begin, std::int64_t end, float* workspace) {
  const bool gathered = gathers(a);
  const std::int64_t depth = pointwise_depth(a), stride = gathered ? depth + kSkew : a.channels;
  const std::int64_t width = (a.filters + kPanel - 1) / kPanel * kPanel;
  float* products = workspace + a.block * (depth + kSkew);
  for (std::int64_t first = begin; first < end; first += a.block) {
    const std::int64_t count = smaller(a.block, end - first);
    if (gathered) {
      gather_rows(a, first, count, workspace, stride);
    }
    const float* rows = gathered ? workspace : input_row(a, first);
    Fetch fetch = pointwise_fetch(a, first, count, end);
    multiply_rows(a, a.weight, rows, stride, count, products, width, fetch);
    finish_rows(a, a.lower ? Epilogue{} : a.epilogue, first, count, products, width);
    if (a.lower) {
      multiply_rows(a, a.lower, rows, stride, count, products, width, fetch);
      finish_rows(a, a.epilogue, first, count, products, width);
    }
  }
}

// The shares [begin, end) of a.shares equal ones; each has its own workspace.
void pointwise(const PointwiseArguments& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t rows = a.images * a.out_size[0] * a.out_size[1];
  const std::int64_t share = ((rows + a.shares - 1) / a.shares + kBlockRows - 1) / kBlockRows * kBlockRows;
  const std::int64_t width = (a.filters + kPanel - 1) / kPanel * kPanel;
  const std::int64_t workspace = a.block * (pointwise_depth(a) + kSkew + width);
  for (std::int64_t i = begin; i < end; ++i) {
    pointwise_rows(a, smaller(rows, i * share), smaller(rows, (i + 1) * share), a.workspace + i * workspace);
  }
}

}  // namespace
}  // namespace lrpfast
