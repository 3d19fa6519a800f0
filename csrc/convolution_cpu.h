// A convolution for few places, straight from its weight: one image, of a layer with many channels. Panels of filters are laid out as
// they are multiplied, and never stand in memory; threads share filters, not places, so that each reads its own. Any window, stride,
// padding and dilation, and the transpose of each.
//
// It is a sum over taps of products of matrices. A tap's rows are gathered: those that lie in the padding are zero. Of a transpose
// with a stride, the places that meet the same taps are worked on together (a phase), so that no product is with zeros between values.
#pragma once

#include "epilogue_cpu.h"
#include "filters_cpu.h"

namespace lrpfast {
namespace {

constexpr int kMostWindow = 64;  // taps

// The places (first[i] + n * step[i]) of the result: those of one phase.
struct Phase {
  std::int64_t first[2], step[2], count[2];

  std::int64_t at(int axis, std::int64_t n) const { return first[axis] + n * step[axis]; }
};

// The place of the input that a tap takes to a place of the result, along an axis; -1: none. The tap is one that the place's
// phase meets.
inline std::int64_t input_place(const ConvolutionArguments& a, int axis, std::int64_t place, std::int64_t tap) {
  if (!a.transposed) {
    const std::int64_t at = place * a.stride[axis] + tap * a.dilation[axis] - a.padding[axis];
    return at >= 0 && at < a.size[axis] ? at : -1;
  }
  const std::int64_t at = place + a.padding[axis] - tap * a.dilation[axis];
  return at >= 0 && at / a.stride[axis] < a.size[axis] ? at / a.stride[axis] : -1;
}

// Whether any place of a phase may meet a tap.
inline bool meets(const ConvolutionArguments& a, const Phase& phase, int axis, std::int64_t tap) {
  return !a.transposed || (phase.first[axis] + a.padding[axis] - tap * a.dilation[axis]) % a.stride[axis] == 0;
}

// `depth` channels of the rows [first, first + count) of a phase for one tap, `stride` apart.
void gather_tap(const ConvolutionArguments& a, const Phase& phase, std::int64_t y_tap, std::int64_t x_tap,
                std::int64_t first, std::int64_t count, std::int64_t channel, std::int64_t depth, float* to,
                std::int64_t stride) {
  const std::size_t bytes = static_cast<std::size_t>(depth) * sizeof(float);
  for (std::int64_t row = first; row < first + count; ++row, to += stride) {
    const std::int64_t image = row / (phase.count[0] * phase.count[1]);
    const std::int64_t y = input_place(a, 0, phase.at(0, row / phase.count[1] % phase.count[0]), y_tap);
    const std::int64_t x = input_place(a, 1, phase.at(1, row % phase.count[1]), x_tap);
    if (y < 0 || x < 0) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, a.input + ((image * a.size[0] + y) * a.size[1] + x) * a.channels + channel, bytes);
    }
  }
}

// The taps that the places of a phase may meet.
struct MetTaps {
  int count = 0;
  std::int64_t y[kMostWindow], x[kMostWindow], offset[kMostWindow];  // offset: in the weight

  MetTaps(const ConvolutionArguments& a, const Phase& phase) {
    for (std::int64_t tap = 0; tap < a.kernel[0] * a.kernel[1]; ++tap) {
      y[count] = tap / a.kernel[1], x[count] = tap % a.kernel[1];
      if (meets(a, phase, 0, y[count]) && meets(a, phase, 1, x[count])) {
        offset[count] = y[count] * a.weight.tap_strides[0] + x[count] * a.weight.tap_strides[1];
        ++count;
      }
    }
  }
};

// Where a row of a phase begins in the result.
inline std::int64_t result_row(const ConvolutionArguments& a, const Phase& phase, std::int64_t row) {
  const std::int64_t image = row / (phase.count[0] * phase.count[1]);
  const std::int64_t y = phase.at(0, row / phase.count[1] % phase.count[0]), x = phase.at(1, row % phase.count[1]);
  return ((image * a.out_size[0] + y) * a.out_size[1] + x) * a.filters;
}

// Asks for what the epilogue of some panels reads and writes, at `count` places of a phase from `first` on, some lines at a time, while
// their products are computed.
class EpilogueFetch {
 public:
  EpilogueFetch(const ConvolutionArguments& a, const Phase& phase, std::int64_t first, std::int64_t count,
                std::int64_t begin, std::int64_t end, std::int64_t calls)
      : a_(a), phase_(phase), row_(first), end_(first + count), begin_(begin * kPanel) {
    const Epilogue& e = a.epilogue;
    const bool over = e.message_a == a.result || e.message_b == a.result;
    const float* given[] = {e.message_a, e.message_b, e.carrier, over ? nullptr : a.result};
    for (const float* operand : given) {
      if (operand) {
        operands_[operands_count_++] = operand;
      }
    }
    size_ = smaller(end * kPanel, a.filters) - begin_;
    a_time_ = (count * operands_count_ * ((size_ + kLine - 1) / kLine) + calls - 1) / calls;
  }

  void operator()() {
    for (std::int64_t i = 0; i < a_time_ && row_ < end_; ++i) {
      if (at_ == 0) {
        from_ = operands_[operand_] + result_row(a_, phase_, row_) + begin_;
      }
      __builtin_prefetch(from_ + at_, 0, 2);
      at_ += kLine;
      if (at_ >= size_) {
        at_ = 0;
        operand_ = (operand_ + 1) % operands_count_;
        row_ += operand_ == 0;
      }
    }
  }

 private:
  const ConvolutionArguments& a_;
  const Phase& phase_;
  std::int64_t row_, end_, begin_, size_, a_time_, at_ = 0;
  const float *operands_[4], *from_ = nullptr;
  int operands_count_ = 0, operand_ = 0;
};

// Asks for a panel's weight, some lines at a time, while the one before is multiplied: its pieces lie in pages of their own, where
// the processor's prefetching stops.
class WeightFetch {
 public:
  WeightFetch(const ConvolutionArguments& a, const MetTaps& taps, std::int64_t panel, std::int64_t channel,
              std::int64_t depth, std::int64_t calls)
      : taps_(taps) {
    const FilterArguments& w = a.weight;
    if (panel * kPanel >= a.filters) {
      return;
    }
    const std::int64_t filters = smaller(kPanel, a.filters - panel * kPanel);
    const bool by_channel = w.filter_stride < w.channel_stride;  // a piece: all filters of a channel, or all channels of a filter
    const std::int64_t inner = by_channel ? w.filter_stride : w.channel_stride;
    at_ = w.given + panel * kPanel * w.filter_stride + channel * w.channel_stride;
    step_ = by_channel ? w.channel_stride : w.filter_stride;
    within_ = inner > 1;
    taps_a_piece_ = within_ ? 1 : taps.count;
    left_ = by_channel ? depth : filters;
    size_ = (by_channel ? filters : depth) * inner;
    const std::int64_t lines = left_ * taps_a_piece_ * ((size_ + kLine - 1) / kLine);
    a_time_ = (lines + calls - 1) / calls;
    line_ = first_line();
    end_ = line_ + size_;
  }

  void operator()() {
    for (std::int64_t i = 0; i < a_time_ && left_ > 0; ++i) {
      __builtin_prefetch(line_, 0, 2);
      line_ += kLine;
      if (line_ < end_) {
        continue;
      }
      if (++tap_ == taps_a_piece_) {
        tap_ = 0;
        at_ += step_;
        --left_;
      }
      line_ = first_line();
      end_ = line_ + size_;
    }
  }

 private:
  const float* first_line() const { return within_ ? at_ : at_ + taps_.offset[tap_]; }

  const MetTaps& taps_;
  const float *at_ = nullptr, *line_ = nullptr, *end_ = nullptr;
  std::int64_t step_ = 0, left_ = 0, size_ = 0, a_time_ = 0, taps_a_piece_ = 1, tap_ = 0;
  bool within_ = false;  // the taps lie within a piece, not in pieces of their own
};

// The sums of one panel, at `count` places of a phase from `first` on.
void finish_places(const ConvolutionArguments& a, const Phase& phase, std::int64_t first, std::int64_t count,
                   std::int64_t panel, const float* sums) {
  const std::int64_t begin = panel * kPanel, end = smaller(begin + kPanel, a.filters);
  for (std::int64_t row = first; row < first + count; ++row, sums += kPanel) {
    const std::int64_t at = result_row(a, phase, row);
    std::int64_t f = begin;
    for (; f + kLanes <= end; f += kLanes) {
      finish(a.epilogue, lanes(sums + f - begin), f, a.result, at + f);
    }
    if (f < end) {
      finish_part(a.epilogue, lanes(sums + f - begin), f, a.result, at + f, end - f);
    }
  }
}

// Adds what `depth` channels from `channel` on give, for one panel, to its sums. Rows lie `stride` apart, those of a tap behind
// those of the last.
void multiply_places(const ConvolutionArguments& a, const MetTaps& taps, std::int64_t panel, std::int64_t channel,
                     std::int64_t depth, const float* rows, std::int64_t stride, std::int64_t count, float* sums,
                     float* laid_out, WeightFetch& weights, EpilogueFetch& operands) {
  const std::int64_t columns = smaller(kPanel, a.filters - panel * kPanel);
  const auto add = [=](std::int64_t row, std::int64_t column, Lanes sum) {
    float* at = sums + row * kPanel + column;
    put(at, lanes(static_cast<const float*>(at)) + sum);
  };
  const auto fetch = [&] {
    weights();
    operands();
  };
  for (int tap = 0; tap < taps.count; ++tap) {
    for (std::int64_t c = 0; c < depth; c += kChannelsAtOnce) {
      lay_out_cell(a.weight, panel, channel + c, smaller(kChannelsAtOnce, depth - c), taps.offset[tap],
                   laid_out + c * kPanel);
    }
    multiply_panel(count, rows + tap * a.block * stride, stride, laid_out, depth, columns, add, fetch);
  }
}

// The panels [begin, end) of filters, at the places of one phase.
void convolve_phase(const ConvolutionArguments& a, const Phase& phase, std::int64_t begin, std::int64_t end,
                    float* workspace) {
  const MetTaps taps(a, phase);
  const std::int64_t places = a.images * phase.count[0] * phase.count[1], most = a.depth, stride = most + kSkew;
  float* sums = workspace + a.kernel[0] * a.kernel[1] * a.block * stride;
  float* laid_out = sums + a.block * (end - begin) * kPanel;
  for (std::int64_t first = 0; first < places; first += a.block) {
    const std::int64_t count = smaller(a.block, places - first), blocks = (count + kBlockRows - 1) / kBlockRows;
    std::memset(sums, 0, static_cast<std::size_t>(a.block * (end - begin) * kPanel) * sizeof(float));
    const std::int64_t calls = taps.count * blocks * ((a.channels + kFetch - 1) / kFetch) * (end - begin);
    EpilogueFetch operands(a, phase, first, count, begin, end, larger(calls, 1));
    for (std::int64_t channel = 0; channel < a.channels && taps.count > 0; channel += most) {
      const std::int64_t depth = smaller(most, a.channels - channel);
      for (int tap = 0; tap < taps.count; ++tap) {
        gather_tap(a, phase, taps.y[tap], taps.x[tap], first, count, channel, depth, workspace + tap * a.block * stride,
                   stride);
      }
      for (std::int64_t panel = begin; panel < end; ++panel) {
        WeightFetch weights(a, taps, panel + 1 < end ? panel + 1 : a.filters, channel, depth,
                            taps.count * blocks * ((depth + kFetch - 1) / kFetch));
        multiply_places(a, taps, panel, channel, depth, workspace, stride, count, sums + (panel - begin) * a.block * kPanel,
                        laid_out, weights, operands);
      }
    }
    for (std::int64_t panel = begin; panel < end; ++panel) {
      finish_places(a, phase, first, count, panel, sums + (panel - begin) * a.block * kPanel);
    }
  }
}

// The shares [begin, end) of a.shares equal ones of the filters; each has its own workspace.
void convolution(const ConvolutionArguments& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t panels = (a.filters + kPanel - 1) / kPanel, share = (panels + a.shares - 1) / a.shares;
  const std::int64_t workspace =
      a.block * (a.kernel[0] * a.kernel[1] * (a.depth + kSkew) + share * kPanel) + a.depth * kPanel;
  const std::int64_t phases[2] = {a.transposed ? a.stride[0] : 1, a.transposed ? a.stride[1] : 1};
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t first = smaller(panels, i * share), last = smaller(panels, (i + 1) * share);
    for (std::int64_t p = 0; p < phases[0] * phases[1] && first < last; ++p) {
      const std::int64_t y = p / phases[1], x = p % phases[1];
      const Phase phase = {{y, x},
                           {phases[0], phases[1]},
                           {(a.out_size[0] - y + phases[0] - 1) / phases[0], (a.out_size[1] - x + phases[1] - 1) / phases[1]}};
      if (phase.count[0] > 0 && phase.count[1] > 0) {
        convolve_phase(a, phase, first, last, a.workspace + i * workspace);
      }
    }
  }
}

}  // namespace
}  // namespace lrpfast
