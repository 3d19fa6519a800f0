// channel_sum: the sum of carrier * message over the channels of each group.
//
// Sums are in float64: a product of two float32 values is exact there, memory is the limit anyway, and the order of the
// terms, which differs between the two layouts, then no longer shows in a float32 result.
#pragma once

#include "cpu_vector.h"

namespace lrpfast {
namespace {

void store(const ChannelSumArguments& a, std::int64_t at, const double* sums, std::int64_t count) {
  if (a.message.dtype == DType::kFloat32) {
    float* target = static_cast<float*>(a.result) + at;
    LRPFAST_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      target[i] = static_cast<float>(sums[i]);
    }
  } else {
    std::uint16_t* target = static_cast<std::uint16_t*>(a.result) + at;
    LRPFAST_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      target[i] = narrow(static_cast<float>(sums[i]));
    }
  }
}

// A channel is a plane: a block of positions is summed channel by channel.
void sum_planes(const ChannelSumArguments& a, std::int64_t message_at, std::int64_t carrier_at, std::int64_t width,
                std::int64_t count, double* sums) {
  alignas(64) float buffer_m[kBlock], buffer_c[kBlock];
  for (std::int64_t i = 0; i < count; ++i) {
    sums[i] = 0.0;
  }
  for (std::int64_t c = 0; c < width; ++c, message_at += a.positions, carrier_at += a.positions) {
    const float* message = load(a.message, message_at, count, buffer_m);
    if (a.carrier.data) {
      const float* carrier = load(a.carrier, carrier_at, count, buffer_c);
      LRPFAST_SIMD
      for (std::int64_t i = 0; i < count; ++i) {
        sums[i] += static_cast<double>(carrier[i]) * static_cast<double>(message[i]);
      }
    } else {
      LRPFAST_SIMD
      for (std::int64_t i = 0; i < count; ++i) {
        sums[i] += static_cast<double>(message[i]);
      }
    }
  }
}

// The channels of a position lie side by side: one reduction a position.
double sum_neighbours(const ChannelSumArguments& a, std::int64_t message_at, std::int64_t carrier_at,
                      std::int64_t width) {
  alignas(64) float buffer_m[kBlock], buffer_c[kBlock];
  double sum = 0.0;
  for (std::int64_t done = 0; done < width; done += kBlock) {
    const std::int64_t count = smaller(kBlock, width - done);
    const float* message = load(a.message, message_at + done, count, buffer_m);
    if (a.carrier.data) {
      const float* carrier = load(a.carrier, carrier_at + done, count, buffer_c);
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < count; ++i) {
        sum += static_cast<double>(carrier[i]) * static_cast<double>(message[i]);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < count; ++i) {
        sum += static_cast<double>(message[i]);
      }
    }
  }
  return sum;
}

void channel_sum(const ChannelSumArguments& a, std::int64_t begin, std::int64_t end) {
  alignas(64) double sums[kBlock];
  const std::int64_t width = a.channels / a.groups;
  while (begin < end) {
    const std::int64_t row = begin / (a.groups * a.positions);
    const std::int64_t group = begin / a.positions % a.groups;
    const std::int64_t position = begin % a.positions;
    const std::int64_t count = smaller(kBlock, smaller(end - begin, a.positions - position));
    const std::int64_t row_at = row * a.channels * a.positions;
    const std::int64_t carrier_row_at = a.carrier.broadcast ? 0 : row_at;
    if (a.channels_last) {
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t at = (position + i) * a.channels + group * width;
        sums[i] = sum_neighbours(a, row_at + at, carrier_row_at + at, width);
      }
    } else {
      const std::int64_t at = group * width * a.positions + position;
      sum_planes(a, row_at + at, carrier_row_at + at, width, count, sums);
    }
    store(a, begin, sums, count);
    begin += count;
  }
}

}  // namespace
}  // namespace lrpfast
