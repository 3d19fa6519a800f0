// Pooling of channels-last images: the maximum with the place of the winner, and the ways back of maximum and average.
//
// The winner is kept as the number of its tap, one byte a window, an eighth of the int64 index that torch keeps. The ways back
// gather: each input position sums what the windows that cover it send there. So every element is written once, by one thread,
// in a fixed order, and nothing is zeroed beforehand.
#pragma once

#include "cpu_vector.h"

namespace lrpfast {
namespace {

// One channel block of one window. As in torch, the first of equals wins, and a NaN wins over all. The maximum of a window that lies
// in the padding altogether is -inf; the way back asks none of its taps.
void pool_window(const MaxPoolArguments& a, std::int64_t image, std::int64_t top, std::int64_t left, std::int64_t out,
                 std::int64_t channel, std::int64_t count) {
  alignas(64) float buffer[kBlock], best[kBlock];
  alignas(64) std::int32_t winner[kBlock];
  const Window& w = a.window;
  bool first = true;
  for (std::int64_t i = 0; i < w.kernel[0]; ++i) {
    const std::int64_t y = top + i * w.dilation[0];
    if (y < 0 || y >= w.size[0]) {
      continue;
    }
    for (std::int64_t j = 0; j < w.kernel[1]; ++j) {
      const std::int64_t x = left + j * w.dilation[1];
      if (x < 0 || x >= w.size[1]) {
        continue;
      }
      const std::int32_t tap = static_cast<std::int32_t>(i * w.kernel[1] + j);
      const float* values = load(a.input, ((image * w.size[0] + y) * w.size[1] + x) * w.channels + channel, count, buffer);
      if (first) {
        LRPFAST_SIMD
        for (std::int64_t c = 0; c < count; ++c) {
          best[c] = values[c];
          winner[c] = tap;
        }
        first = false;
        continue;
      }
      LRPFAST_SIMD
      for (std::int64_t c = 0; c < count; ++c) {
        const bool wins = values[c] > best[c] || values[c] != values[c];
        best[c] = wins ? values[c] : best[c];
        winner[c] = wins ? tap : winner[c];
      }
    }
  }
  for (std::int64_t c = 0; first && c < count; ++c) {
    best[c] = -__builtin_inff();
    winner[c] = 0;
  }
  store(a.result, a.input.dtype, out + channel, best, count);
  std::uint8_t* winners = a.winners + out + channel;
  LRPFAST_SIMD
  for (std::int64_t c = 0; c < count; ++c) {
    winners[c] = static_cast<std::uint8_t>(winner[c]);
  }
}

// [begin, end) are rows of the result.
void max_pool(const MaxPoolArguments& a, std::int64_t begin, std::int64_t end) {
  const Window& w = a.window;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t image = row / w.out_size[0];
    const std::int64_t top = row % w.out_size[0] * w.stride[0] - w.padding[0];
    for (std::int64_t column = 0; column < w.out_size[1]; ++column) {
      const std::int64_t out = (row * w.out_size[1] + column) * w.channels;
      for (std::int64_t channel = 0; channel < w.channels; channel += kBlock) {
        pool_window(a, image, top, column * w.stride[1] - w.padding[1], out, channel,
                    smaller(kBlock, w.channels - channel));
      }
    }
  }
}

// Calls body(tap, window) for the taps of one dimension that lie at `position`. Without dilation these are every stride-th one.
template <typename Body>
inline void for_each_tap(const Window& w, int dim, std::int64_t position, Body body) {
  const std::int64_t stride = w.stride[dim], dilation = w.dilation[dim], start = position + w.padding[dim];
  if (dilation == 1) {
    std::int64_t window = start / stride;
    for (std::int64_t tap = start % stride; tap < w.kernel[dim] && window >= 0; tap += stride, --window) {
      if (window < w.out_size[dim]) {
        body(tap, window);
      }
    }
    return;
  }
  for (std::int64_t tap = 0; tap < w.kernel[dim] && tap * dilation <= start; ++tap) {
    const std::int64_t offset = start - tap * dilation;
    if (offset % stride == 0 && offset / stride < w.out_size[dim]) {
      body(tap, offset / stride);
    }
  }
}

// What divides the sum of an average's window.
inline float divisor(const PoolDgradArguments& a, std::int64_t row, std::int64_t column) {
  if (a.divisor != 0) {
    return static_cast<float>(a.divisor);
  }
  const Window& w = a.window;
  std::int64_t count = 1;
  const std::int64_t place[2] = {row, column};
  for (int dim = 0; dim < 2; ++dim) {
    const std::int64_t start = place[dim] * w.stride[dim] - w.padding[dim];
    const std::int64_t padded_end = smaller(start + w.kernel[dim], w.size[dim] + w.padding[dim]);
    const std::int64_t inside = smaller(padded_end, w.size[dim]) - (start > 0 ? start : 0);
    count *= a.count_padding ? padded_end - start : inside;
  }
  return static_cast<float>(count);
}

void gather_position(const PoolDgradArguments& a, std::int64_t image, std::int64_t y, std::int64_t x,
                     std::int64_t channel, std::int64_t count) {
  alignas(64) float buffer[kBlock], sum[kBlock];
  const Window& w = a.window;
  LRPFAST_SIMD
  for (std::int64_t c = 0; c < count; ++c) {
    sum[c] = 0.0f;
  }
  for_each_tap(w, 0, y, [&](std::int64_t i, std::int64_t row) {
    for_each_tap(w, 1, x, [&](std::int64_t j, std::int64_t column) {
      const std::int64_t at = ((image * w.out_size[0] + row) * w.out_size[1] + column) * w.channels + channel;
      const float* sent = load(a.message, at, count, buffer);
      if (a.winners) {
        const std::uint8_t* winners = a.winners + at;
        const std::uint8_t tap = static_cast<std::uint8_t>(i * w.kernel[1] + j);
        LRPFAST_SIMD
        for (std::int64_t c = 0; c < count; ++c) {
          sum[c] += winners[c] == tap ? sent[c] : 0.0f;
        }
      } else {
        const float share = divisor(a, row, column);
        LRPFAST_SIMD
        for (std::int64_t c = 0; c < count; ++c) {
          sum[c] += sent[c] / share;
        }
      }
    });
  });
  store(a.result, a.message.dtype, ((image * w.size[0] + y) * w.size[1] + x) * w.channels + channel, sum, count);
}

// [begin, end) are rows of the pool's input.
void pool_dgrad(const PoolDgradArguments& a, std::int64_t begin, std::int64_t end) {
  const Window& w = a.window;
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t x = 0; x < w.size[1]; ++x) {
      for (std::int64_t channel = 0; channel < w.channels; channel += kBlock) {
        gather_position(a, row / w.size[0], row % w.size[0], x, channel, smaller(kBlock, w.channels - channel));
      }
    }
  }
}

}  // namespace
}  // namespace lrpfast
