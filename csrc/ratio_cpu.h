// ratio and ratio_sum: carrier * (message_a + message_b) / S(denominator), S(z) = z + eps where z >= 0, else z - eps.
//
// The quotient carrier / S comes first, as in the reference: for the carriers of the rules it lies in [0, 1] and can
// neither overflow nor underflow. The divisions are divisions, so all instruction sets give the same bits.
#pragma once

#include "cpu_vector.h"

namespace lrpfast {
namespace {

// eps == 0 (LRP-0) is its own case: what is divided by an exact zero is dropped.
template <bool kCarrier, bool kSum, bool kZeroRule>
void ratio_block(const float* carrier, const float* message_a, const float* message_b, const float* denominator,
                 float* result, std::int64_t count, float eps) {
  LRPFAST_SIMD
  for (std::int64_t i = 0; i < count; ++i) {
    const float z = denominator[i];
    const float message = kSum ? message_a[i] + message_b[i] : message_a[i];
    const float stable = kZeroRule ? z : z + (z >= 0.0f ? eps : -eps);
    const float value = kCarrier ? message * (carrier[i] / stable) : message / stable;
    result[i] = kZeroRule && z == 0.0f ? 0.0f : value;
  }
}

using RatioBlock = void (*)(const float*, const float*, const float*, const float*, float*, std::int64_t, float);

RatioBlock choose_ratio_block(bool carrier, bool sum, bool zero_rule) {
  static constexpr RatioBlock kTable[] = {
      ratio_block<false, false, false>, ratio_block<false, false, true>, ratio_block<false, true, false>,
      ratio_block<false, true, true>,   ratio_block<true, false, false>, ratio_block<true, false, true>,
      ratio_block<true, true, false>,   ratio_block<true, true, true>,
  };
  return kTable[(carrier ? 4 : 0) + (sum ? 2 : 0) + (zero_rule ? 1 : 0)];
}

void ratio(const RatioArguments& a, std::int64_t begin, std::int64_t end) {
  alignas(64) float buffer_c[kBlock], buffer_a[kBlock], buffer_b[kBlock], buffer_d[kBlock], buffer_r[kBlock];
  const RatioBlock block = choose_ratio_block(a.carrier.data, a.message_b.data, a.eps == 0.0f);
  const bool narrow_result = a.result_dtype == DType::kBFloat16;
  while (begin < end) {
    const std::int64_t within_row = begin % a.row_size;
    const std::int64_t count = smaller(kBlock, smaller(end - begin, a.row_size - within_row));
    const std::int64_t carrier_at = a.carrier.broadcast ? within_row : begin;
    const std::int64_t denominator_at = a.denominator.broadcast ? within_row : begin;

    const float* carrier = a.carrier.data ? load(a.carrier, carrier_at, count, buffer_c) : nullptr;
    const float* message_a = load(a.message_a, begin, count, buffer_a);
    const float* message_b = a.message_b.data ? load(a.message_b, begin, count, buffer_b) : nullptr;
    const float* denominator = load(a.denominator, denominator_at, count, buffer_d);
    float* result = narrow_result ? buffer_r : static_cast<float*>(a.result) + begin;
    block(carrier, message_a, message_b, denominator, result, count, a.eps);

    if (narrow_result) {
      store(a.result, a.result_dtype, begin, buffer_r, count);
    }
    begin += count;
  }
}

}  // namespace
}  // namespace lrpfast
