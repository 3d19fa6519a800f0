// A depthwise convolution, one filter a channel, and its transpose. Both are bound by memory: each value takes part in as many
// multiplications as a filter has taps, so what counts is that images are read and written once, in order, and that what
// follows elementwise costs no pass of its own.
//
// A result is a sum over taps: places of the source and rows of the weight. Places of a row that see the same taps, shifted, are
// computed together, all but those at the edges; the two directions differ in which taps a place sees, and in nothing else.
#pragma once

#include "epilogue_cpu.h"

namespace lrpfast {
namespace {

constexpr int kMostTaps = 64;    // of a filter
constexpr int kMostTapsAxis = 8;  // of a filter, along an axis
constexpr int kTogether = 8;      // places, at most

// The taps that a place sees along one axis: which, and where they read.
struct AxisTaps {
  int count;
  std::int64_t tap[kMostTapsAxis], source[kMostTapsAxis];
};

inline AxisTaps axis_taps(const DepthwiseArguments& a, int axis, std::int64_t place) {
  AxisTaps found;
  found.count = 0;
  for (std::int64_t tap = 0; tap < a.kernel[axis]; ++tap) {
    std::int64_t source = 0;
    if (a.transposed) {
      const std::int64_t reached = place + a.padding[axis] - tap * a.dilation[axis];
      if (reached < 0 || reached % a.stride[axis] != 0) {
        continue;
      }
      source = reached / a.stride[axis];
    } else {
      source = place * a.stride[axis] - a.padding[axis] + tap * a.dilation[axis];
    }
    if (source >= 0 && source < a.size[axis]) {
      found.tap[found.count] = tap;
      found.source[found.count++] = source;
    }
  }
  return found;
}

// The places of a row that see every tap that their neighbours `period` further see: [begin, end).
struct Inside {
  std::int64_t begin, end;
};

inline Inside inside(const DepthwiseArguments& a) {
  const std::int64_t reach = (a.kernel[1] - 1) * a.dilation[1], padding = a.padding[1], stride = a.stride[1];
  if (a.transposed) {
    return {reach - padding, (a.size[1] - 1) * stride - padding + 1};
  }
  const std::int64_t last = a.size[1] - 1 + padding - reach;
  return {(padding + stride - 1) / stride, last < 0 ? 0 : last / stride + 1};
}

// All taps of a place; and the part of the source that the next row of places reads first, of which each place asks for
// `ahead_size` floats: rows are read faster if they are asked for a row before.
struct Taps {
  int count;
  const float *source[kMostTaps], *weight[kMostTaps];
  const float* ahead;
  std::int64_t ahead_size;
};

inline void fetch(const float* from, std::int64_t size) {
  for (std::int64_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(from + i, 0, 2);
  }
}

// What the epilogue of a row further on reads and writes.
inline void fetch_operands(const DepthwiseArguments& a, std::int64_t at, std::int64_t size) {
  const Epilogue& e = a.epilogue;
  const float* operands[] = {e.message_a, e.message_b, e.carrier, e.message_a == a.result ? nullptr : a.result};
  for (const float* operand : operands) {
    if (operand) {
      fetch(operand + at, size);
    }
  }
}

// kPlaces results, `step` floats apart, whose sources are `source_step` floats apart; all channels.
template <int kPlaces>
inline void depthwise_places(const DepthwiseArguments& a, const Taps& taps, std::int64_t source_step, std::int64_t at,
                             std::int64_t step) {
  fetch(taps.ahead, kPlaces * taps.ahead_size);
  fetch_operands(a, at + a.out_size[1] * a.channels, kPlaces * a.channels);
  std::int64_t c = 0;
  for (; c + kLanes <= a.channels; c += kLanes) {
    Lanes sum[kPlaces] = {};
    for (int i = 0; i < taps.count; ++i) {
      const Lanes weight = lanes(taps.weight[i] + c);
      const float* source = taps.source[i] + c;
#pragma GCC unroll 8
      for (int place = 0; place < kPlaces; ++place) {
        sum[place] = multiply_add(lanes(source + place * source_step), weight, sum[place]);
      }
    }
#pragma GCC unroll 8
    for (int place = 0; place < kPlaces; ++place) {
      finish(a.epilogue, sum[place], c, a.result, at + place * step + c);
    }
  }
  if (c == a.channels) {
    return;
  }
  for (int place = 0; place < kPlaces; ++place) {
    alignas(64) float sum[kLanes] = {};
    for (int i = 0; i < taps.count; ++i) {
      const float* source = taps.source[i] + place * source_step;
      for (std::int64_t rest = c; rest < a.channels; ++rest) {
        sum[rest - c] += source[rest] * taps.weight[i][rest];
      }
    }
    finish_part(a.epilogue, lanes(static_cast<const float*>(sum)), c, a.result, at + place * step + c, a.channels - c);
  }
}

// The taps of a place whose rows are known.
inline Taps all_taps(const DepthwiseArguments& a, std::int64_t image, const AxisTaps& rows, std::int64_t x) {
  const AxisTaps columns = axis_taps(a, 1, x);
  Taps taps;
  taps.count = 0;
  for (int i = 0; i < rows.count; ++i) {
    for (int j = 0; j < columns.count; ++j) {
      const std::int64_t place = (image * a.size[0] + rows.source[i]) * a.size[1] + columns.source[j];
      taps.source[taps.count] = a.input + place * a.channels;
      taps.weight[taps.count++] = a.weight + (rows.tap[i] * a.kernel[1] + columns.tap[j]) * a.channels;
    }
  }
  return taps;
}

// As many of `count` places as are whole groups of kPlaces, then the rest in smaller groups.
template <int kPlaces>
inline void depthwise_groups(const DepthwiseArguments& a, Taps& taps, std::int64_t source_step, std::int64_t at,
                             std::int64_t step, std::int64_t count) {
  for (; count >= kPlaces; count -= kPlaces, at += kPlaces * step) {
    depthwise_places<kPlaces>(a, taps, source_step, at, step);
    for (int i = 0; i < taps.count; ++i) {
      taps.source[i] += kPlaces * source_step;
    }
    taps.ahead += kPlaces * taps.ahead_size;
  }
  if constexpr (kPlaces > 1) {
    depthwise_groups<kPlaces / 2>(a, taps, source_step, at, step, count);
  }
}

void depthwise_row(const DepthwiseArguments& a, std::int64_t image, std::int64_t y) {
  const AxisTaps rows = axis_taps(a, 0, y);
  const Inside same = inside(a);
  // Places this far apart see the same taps, and their sources are this far apart.
  const std::int64_t period = a.transposed ? a.stride[1] : 1;
  const std::int64_t source_step = (a.transposed ? 1 : a.stride[1]) * a.channels, step = period * a.channels;
  const std::int64_t row = (image * a.out_size[0] + y) * a.out_size[1];
  const std::int64_t end = smaller(same.end, a.out_size[1]);
  // What the next row of places sees and this one does not: `stride` rows; of a transpose a row every `stride` times.
  const std::int64_t rows_ahead = a.transposed ? 1 : a.stride[0], pitch = a.size[1] * a.channels;
  const std::int64_t last = rows.count ? rows.source[a.transposed ? 0 : rows.count - 1] : 0;
  const float* ahead = a.input + (image * a.size[0] + last + 1) * pitch;
  const std::int64_t ahead_size = rows_ahead * pitch / a.out_size[1];
  for (std::int64_t first = 0; first < period; ++first) {
    for (std::int64_t x = first; x < a.out_size[1];) {
      Taps taps = all_taps(a, image, rows, x);
      taps.ahead = ahead + x * ahead_size;
      taps.ahead_size = ahead_size;
      const std::int64_t count = x >= same.begin && x < end ? (end - x + period - 1) / period : 1;
      depthwise_groups<kTogether>(a, taps, source_step, (row + x) * a.channels, step, count);
      x += count * period;
    }
  }
}

// The rows [begin, end) of the result, counted over all images.
void depthwise(const DepthwiseArguments& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    depthwise_row(a, row / a.out_size[0], row % a.out_size[0]);
  }
}

}  // namespace
}  // namespace lrpfast
