// A convolution for few places, straight from its weight: one image, of a layer with many channels. Panels of filters are laid out as
// they are multiplied, and never stand in memory; a piece of work is a panel, so that each is read by one thread. Any window, stride,
// padding and dilation, and the transpose of each.
//
// It is a sum over taps of products of matrices. A tap's rows are gathered: those that lie in the padding are zero. Of a transpose
// with a stride, the places that meet the same taps are worked on together (a phase), so that no product is with zeros between values.
#pragma once

#include "epilogue_cpu.h"
#include "filters_cpu.h"
#include "parallel.h"

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

// Some places of a phase.
struct Block {
  Phase phase;
  MetTaps taps;
  std::int64_t first, count;

  Block(const ConvolutionArguments& a, const Phase& phase, std::int64_t first)
      : phase(phase), taps(a, phase), first(first), count(smaller(a.block, a.images * phase.count[0] * phase.count[1] - first)) {}
};

// The rows of a block, as they are gathered in a workspace: [a.depth channels at a time][tap][row], this far apart.
inline std::int64_t row_stride(const ConvolutionArguments& a) { return a.depth + kSkew; }

inline std::int64_t gathered_rows(const ConvolutionArguments& a, std::int64_t channel, std::int64_t tap) {
  return (channel / a.depth * a.kernel[0] * a.kernel[1] + tap) * a.block * row_stride(a);
}

void gather(const ConvolutionArguments& a, const Block& block, float* rows) {
  const Phase& phase = block.phase;
  for (int tap = 0; tap < block.taps.count; ++tap) {
    for (std::int64_t i = 0; i < block.count; ++i) {
      const std::int64_t row = block.first + i, image = row / (phase.count[0] * phase.count[1]);
      const std::int64_t y = input_place(a, 0, phase.at(0, row / phase.count[1] % phase.count[0]), block.taps.y[tap]);
      const std::int64_t x = input_place(a, 1, phase.at(1, row % phase.count[1]), block.taps.x[tap]);
      const float* from = y < 0 || x < 0 ? nullptr : a.input + ((image * a.size[0] + y) * a.size[1] + x) * a.channels;
      for (std::int64_t channel = 0; channel < a.channels; channel += a.depth) {
        float* to = rows + gathered_rows(a, channel, tap) + i * row_stride(a);
        const std::size_t bytes = static_cast<std::size_t>(smaller(a.depth, a.channels - channel)) * sizeof(float);
        from ? std::memcpy(to, from + channel, bytes) : std::memset(to, 0, bytes);
      }
    }
  }
}

// Where a row of a phase begins in the result.
inline std::int64_t result_row(const ConvolutionArguments& a, const Phase& phase, std::int64_t row) {
  const std::int64_t image = row / (phase.count[0] * phase.count[1]);
  const std::int64_t y = phase.at(0, row / phase.count[1] % phase.count[0]), x = phase.at(1, row % phase.count[1]);
  return ((image * a.out_size[0] + y) * a.out_size[1] + x) * a.filters;
}

// Asks for what the epilogue of a panel reads and writes, some lines at a time, while its products are computed.
class EpilogueFetch {
 public:
  EpilogueFetch(const ConvolutionArguments& a, const Block& block, std::int64_t panel, std::int64_t calls)
      : a_(a), phase_(block.phase), row_(block.first), end_(block.first + block.count), begin_(panel * kPanel) {
    const Epilogue& e = a.epilogue;
    const bool over = e.message_a == a.result || e.message_b == a.result;
    const float* given[] = {e.message_a, e.message_b, e.carrier, over ? nullptr : a.result};
    for (const float* operand : given) {
      if (operand) {
        operands_[operands_count_++] = operand;
      }
    }
    rows_a_time_ = (block.count + calls - 1) / calls;
    size_ = smaller(kPanel, a.filters - begin_);
  }

  void operator()() {
    for (std::int64_t i = 0; i < rows_a_time_ && row_ < end_; ++i, ++row_) {
      const std::int64_t at = result_row(a_, phase_, row_) + begin_;
      for (int operand = 0; operand < operands_count_; ++operand) {
        for (std::int64_t line = 0; line < size_; line += kLine) {
          __builtin_prefetch(operands_[operand] + at + line, 0, 2);
        }
      }
    }
  }

 private:
  const ConvolutionArguments& a_;
  const Phase& phase_;
  std::int64_t row_, end_, begin_, size_, rows_a_time_;
  const float* operands_[4];
  int operands_count_ = 0;
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

// The sums of one panel become results.
void finish_places(const ConvolutionArguments& a, const Block& block, std::int64_t panel, const float* sums) {
  const std::int64_t begin = panel * kPanel, end = smaller(begin + kPanel, a.filters);
  for (std::int64_t row = block.first; row < block.first + block.count; ++row, sums += kPanel) {
    const std::int64_t at = result_row(a, block.phase, row);
    std::int64_t f = begin;
    for (; f + kLanes <= end; f += kLanes) {
      finish(a.epilogue, lanes(sums + f - begin), f, a.result, at + f);
    }
    if (f < end) {
      finish_part(a.epilogue, lanes(sums + f - begin), f, a.result, at + f, end - f);
    }
  }
}

// One panel of filters, at the places of a block, whose rows are gathered.
void convolve_panel(const ConvolutionArguments& a, const Block& block, std::int64_t panel, const float* rows, float* sums,
                    float* laid_out) {
  const std::int64_t columns = smaller(kPanel, a.filters - panel * kPanel);
  // A fetch's calls for each step in depth. A phase may meet no tap.
  const std::int64_t calls = larger(1, block.taps.count * ((block.count + kBlockRows - 1) / kBlockRows));
  EpilogueFetch operands(a, block, panel, calls * ((a.channels + kFetch - 1) / kFetch));
  const auto add = [=](std::int64_t row, std::int64_t column, Lanes sum) {
    float* at = sums + row * kPanel + column;
    put(at, lanes(static_cast<const float*>(at)) + sum);
  };
  std::memset(sums, 0, static_cast<std::size_t>(block.count * kPanel) * sizeof(float));
  for (std::int64_t channel = 0; channel < a.channels; channel += a.depth) {
    const std::int64_t depth = smaller(a.depth, a.channels - channel), next = channel + a.depth;
    WeightFetch weights(a, block.taps, next < a.channels ? panel : panel + 1, next < a.channels ? next : 0,
                        next < a.channels ? smaller(a.depth, a.channels - next) : smaller(a.depth, a.channels),
                        calls * ((depth + kFetch - 1) / kFetch));
    const auto fetch = [&] {
      weights();
      operands();
    };
    for (int tap = 0; tap < block.taps.count; ++tap) {
      for (std::int64_t c = 0; c < depth; c += kChannelsAtOnce) {
        lay_out_cell(a.weight, panel, channel + c, smaller(kChannelsAtOnce, depth - c), block.taps.offset[tap],
                     laid_out + c * kPanel);
      }
      multiply_panel(block.count, rows + gathered_rows(a, channel, tap), row_stride(a), laid_out, depth, columns, add, fetch);
    }
  }
  finish_places(a, block, panel, sums);
}

// The phases of a transpose with a stride; of anything else the one that there is.
inline std::int64_t phases(const ConvolutionArguments& a) { return a.transposed ? a.stride[0] * a.stride[1] : 1; }

inline Phase phase_at(const ConvolutionArguments& a, std::int64_t number) {
  const std::int64_t step[2] = {a.transposed ? a.stride[0] : 1, a.transposed ? a.stride[1] : 1};
  const std::int64_t y = number / step[1], x = number % step[1];
  const auto count = [&](int axis, std::int64_t first) { return larger(0, (a.out_size[axis] - first + step[axis] - 1) / step[axis]); };
  return {{y, x}, {step[0], step[1]}, {count(0, y), count(1, x)}};
}

inline std::int64_t blocks(const ConvolutionArguments& a, const Phase& phase) {
  return (a.images * phase.count[0] * phase.count[1] + a.block - 1) / a.block;
}

inline Block block_at(const ConvolutionArguments& a, std::int64_t number) {
  for (std::int64_t p = 0;; ++p) {
    const Phase phase = phase_at(a, p);
    if (number < blocks(a, phase)) {
      return Block(a, phase, number * a.block);
    }
    number -= blocks(a, phase);
  }
}

// A piece is a panel of filters at the places of a block.
void convolution(const ConvolutionArguments& a, Pieces& pieces) {
  const std::int64_t panels = (a.filters + kPanel - 1) / kPanel;
  std::int64_t count = 0;
  for (std::int64_t p = 0; p < phases(a); ++p) {
    count += blocks(a, phase_at(a, p)) * panels;
  }
  const std::int64_t rows_size = gathered_rows(a, (a.channels + a.depth - 1) / a.depth * a.depth, 0);
  float* rows = a.workspace + pieces.member() * (rows_size + (a.block + a.depth) * kPanel);
  float *sums = rows + rows_size, *laid_out = sums + a.block * kPanel;
  std::int64_t piece = pieces.next(count);
  while (piece >= 0) {
    const std::int64_t number = piece / panels;
    const Block block = block_at(a, number);
    gather(a, block, rows);
    for (; piece >= 0 && piece / panels == number; piece = pieces.next(count)) {
      convolve_panel(a, block, piece % panels, rows, sums, laid_out);
    }
  }
}

}  // namespace
}  // namespace lrpfast
