// Filters as products of matrices take them: panels of kPanel filters, with what a layer's weight is derived through done on the way
// (a batch norm's factor, the positive part), so that a weight can be laid out at each call and need not stand in memory twice.
#pragma once

#include <utility>

#include "matrix_cpu.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kChannelsAtOnce = 16;  // a cache line of weights, where channels are innermost

typedef std::int32_t Indices __attribute__((vector_size(4 * kLanes)));

// A cell: the values of one tap and panel, for channels that are worked on at a time.

// Rows become columns, in blocks of kWidth, kWidth / 2, .. 1.
template <int kWidth, std::size_t... kLane>
inline void exchange(Lanes rows[kLanes], std::index_sequence<kLane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kWidth) == 0) {
      const Lanes a = rows[i], b = rows[i + kWidth];
#if defined(__clang__)
      rows[i] = __builtin_shufflevector(a, b, ((kLane & kWidth) == 0 ? kLane : kLanes + kLane - kWidth)...);
      rows[i + kWidth] = __builtin_shufflevector(a, b, ((kLane & kWidth) == 0 ? kLane + kWidth : kLanes + kLane)...);
#else
      rows[i] = __builtin_shuffle(a, b, Indices{((kLane & kWidth) == 0 ? int(kLane) : int(kLanes + kLane - kWidth))...});
      rows[i + kWidth] =
          __builtin_shuffle(a, b, Indices{((kLane & kWidth) == 0 ? int(kLane + kWidth) : int(kLanes + kLane))...});
#endif
    }
  }
  if constexpr (kWidth > 1) {
    exchange<kWidth / 2>(rows, std::index_sequence<kLane...>{});
  }
}

// What has a factor: nothing, a filter, or a channel (of a transpose).
enum class Factor { kNone, kOfFilter, kOfChannel };

// What the values of a cell count as. A factor is the sum of two floats, so that its product rounds once; the sign that `scales` go by
// is that of the product.
template <Factor kFactor, bool kScaled>
struct Modified {
  const float *factors, *rests;  // of the cell's first filter, or channel
  Lanes positive, other;

  Modified(const FilterArguments& a, std::int64_t filter, std::int64_t channel)
      : positive(lanes(a.scales[0])), other(lanes(a.scales[1])) {
    if (kFactor != Factor::kNone) {
      const std::int64_t count = kFactor == Factor::kOfFilter ? a.filters : a.channels;
      factors = a.factors + (kFactor == Factor::kOfFilter ? filter : channel);
      rests = factors + (count + kPanel - 1) / kPanel * kPanel;
    }
  }

  Lanes operator()(Lanes v, std::int64_t filter, std::int64_t channel) const {
    if (kFactor == Factor::kOfFilter) {
      v = multiply_add(v, lanes(factors + filter), v * lanes(rests + filter));
    } else if (kFactor == Factor::kOfChannel) {
      v = multiply_add(v, lanes(factors[channel]), v * lanes(rests[channel]));
    }
    return kScaled ? v * (v > Lanes{} ? positive : other) : v;
  }
};

// A whole cell of filters whose channels lie side by side.
template <typename Modify>
inline void lay_out_transposed(const float* from, std::int64_t filter_stride, const Modify& modified, float* to) {
  for (std::int64_t f = 0; f < kPanel; f += kLanes) {
    for (std::int64_t c = 0; c < kChannelsAtOnce; c += kLanes) {
      Lanes rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = lanes(from + (f + i) * filter_stride + c);
      }
      exchange<kLanes / 2>(rows, std::make_index_sequence<kLanes>{});
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        put(to + (c + i) * kPanel + f, modified(rows[i], f, c + i));
      }
    }
  }
}

// `channels` rows of whole panels, `stride` apart.
template <typename Modify>
inline void lay_out_rows(const float* from, std::int64_t stride, std::int64_t channels, const Modify& modified, float* to) {
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t f = 0; f < kPanel; f += kLanes) {
      put(to + c * kPanel + f, modified(lanes(from + c * stride + f), f, c));
    }
  }
}

template <Factor kFactor, bool kScaled>
void lay_out_cell(const FilterArguments& a, std::int64_t panel, std::int64_t channel, std::int64_t channels,
                  std::int64_t tap_offset, float* to) {
  const std::int64_t filter = panel * kPanel, filters = smaller(kPanel, a.filters - filter);
  const float* from = a.given + filter * a.filter_stride + channel * a.channel_stride + tap_offset;
  const Modified<kFactor, kScaled> modified(a, filter, channel);
  if (a.filter_stride == 1 && filters == kPanel) {
    for (std::int64_t c = channels; c < 2 * channels; ++c) {
      __builtin_prefetch(from + c * a.channel_stride, 0, 2);
      __builtin_prefetch(from + c * a.channel_stride + kPanel / 2, 0, 2);
    }
    lay_out_rows(from, a.channel_stride, channels, modified, to);
  } else if (a.channel_stride == 1 && filters == kPanel && channels == kChannelsAtOnce) {
    lay_out_transposed(from, a.filter_stride, modified, to);
  } else {
    alignas(64) float cell[kChannelsAtOnce * kPanel] = {};
    for (std::int64_t f = 0; f < filters; ++f) {
      for (std::int64_t c = 0; c < channels; ++c) {
        cell[c * kPanel + f] = from[f * a.filter_stride + c * a.channel_stride];
      }
    }
    lay_out_rows(cell, kPanel, channels, modified, to);
  }
}

// The cell of one tap: `channels` rows of a panel.
inline void lay_out_cell(const FilterArguments& a, std::int64_t panel, std::int64_t channel, std::int64_t channels,
                         std::int64_t tap_offset, float* to) {
  auto* lay_out = a.scaled ? lay_out_cell<Factor::kNone, true> : lay_out_cell<Factor::kNone, false>;
  if (a.factors && a.factor_of_channel) {
    lay_out = a.scaled ? lay_out_cell<Factor::kOfChannel, true> : lay_out_cell<Factor::kOfChannel, false>;
  } else if (a.factors) {
    lay_out = a.scaled ? lay_out_cell<Factor::kOfFilter, true> : lay_out_cell<Factor::kOfFilter, false>;
  }
  lay_out(a, panel, channel, channels, tap_offset, to);
}

// G g: the rows 0, (0 + 1 + 2) / 2, (0 - 1 + 2) / 2, 2; for stride 2 the rows 0, 0 + 2, 2, 1.
template <bool kStrided>
inline void transform_filter(const Lanes g[3], Lanes out[4]) {
  const Lanes half = lanes(0.5f), outer = g[0] + g[2];
  out[0] = g[0];
  out[1] = kStrided ? outer : (outer + g[1]) * half;
  out[2] = kStrided ? g[2] : (outer - g[1]) * half;
  out[3] = kStrided ? g[1] : g[2];
}

// `to` is where the panel's row of a channel begins; that of the next point lies point_stride further.
template <bool kStrided>
inline void put_transformed(const Lanes g[9], float* to, std::int64_t point_stride) {
  Lanes half[3][4];  // [column][row]
  for (int j = 0; j < 3; ++j) {
    const Lanes column[3] = {g[j], g[3 + j], g[6 + j]};
    transform_filter<kStrided>(column, half[j]);
  }
  for (int row = 0; row < 4; ++row) {
    const Lanes across[3] = {half[0][row], half[1][row], half[2][row]};
    Lanes transformed[4];
    transform_filter<kStrided>(across, transformed);
    for (int j = 0; j < 4; ++j) {
      put(to + (row * 4 + j) * point_stride, transformed[j]);
    }
  }
}

// G g G' of the panels [begin, end); those of a point lie point_stride behind those of the last.
void transform_panels(const FilterArguments& a, std::int64_t begin, std::int64_t end, float* to, std::int64_t point_stride) {
  alignas(64) float taps[9][kChannelsAtOnce * kPanel];
  for (std::int64_t i = begin * a.channels; i < end * a.channels; i += kChannelsAtOnce, to += kChannelsAtOnce * kPanel) {
    for (int tap = 0; tap < 9; ++tap) {
      const std::int64_t offset = tap / 3 * a.tap_strides[0] + tap % 3 * a.tap_strides[1];
      lay_out_cell(a, i / a.channels, i % a.channels, kChannelsAtOnce, offset, taps[tap]);
    }
    for (std::int64_t at = 0; at < kChannelsAtOnce * kPanel; at += kLanes) {
      Lanes g[9];
      for (int tap = 0; tap < 9; ++tap) {
        g[tap] = lanes(taps[tap] + at);
      }
      a.strided ? put_transformed<true>(g, to + at, point_stride) : put_transformed<false>(g, to + at, point_stride);
    }
  }
}

inline void winograd_filters(const FilterArguments& a, std::int64_t begin, std::int64_t end) {
  transform_panels(a, begin, end, a.result + begin * a.channels * kPanel, a.filters * a.channels);
}

}  // namespace
}  // namespace lrpfast
