// What becomes of sums before they are written, while they are in registers: see Epilogue. An elementwise step that follows a
// product costs no pass over memory of its own.
#pragma once

#include "matrix_cpu.h"
#include "quotient_cpu.h"

namespace lrpfast {
namespace {

template <bool kCarrier, bool kSum, typename T>
inline Lanes ratio_lanes(const EpilogueOf<T>& e, Lanes z, std::int64_t at) {
  Lanes message = lanes(e.message_a + at);
  if (kSum) {
    message = message + lanes(e.message_b + at);
  }
  return ratio_of<kCarrier>(kCarrier ? lanes(e.carrier + at) : Lanes{}, message, z, e.eps);
}

template <typename T>
inline Lanes ratio_lanes(const EpilogueOf<T>& e, Lanes z, std::int64_t at) {
  if (e.carrier) {
    return e.message_b ? ratio_lanes<true, true>(e, z, at) : ratio_lanes<true, false>(e, z, at);
  }
  return e.message_b ? ratio_lanes<false, true>(e, z, at) : ratio_lanes<false, false>(e, z, at);
}

// `sum` belongs to `column`, and to the place `at` of the result.
template <typename T>
inline void finish(const EpilogueOf<T>& e, Lanes sum, std::int64_t column, T* result, std::int64_t at) {
  if (e.bias) {
    sum = sum + lanes(e.bias + column);
  }
  if (e.message_a) {
    put(result + at, ratio_lanes(e, sum, at));
    return;
  }
  if (e.add) {
    sum = sum + lanes(result + at);
  }
  if (e.clamp) {
    const Lanes low = lanes(e.low), high = lanes(e.high);
    sum = sum <= low ? low : sum;
    sum = sum > high ? high : sum;
  }
  put(result + at, sum);
}

// The same for `count` < kLanes columns, the last of a row: what lies behind them is neither read nor written.
template <typename T>
inline void finish_part(const EpilogueOf<T>& e, Lanes sum, std::int64_t column, T* result, std::int64_t at,
                        std::int64_t count) {
  alignas(64) float bias[kLanes] = {};
  if (e.bias) {
    std::memcpy(bias, e.bias + column, static_cast<std::size_t>(count) * sizeof(float));
  }
  alignas(64) T parts[4][kLanes] = {};
  const T* sources[] = {e.carrier, e.message_a, e.message_b, result};
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  for (int i = 0; i < 4; ++i) {
    if (sources[i]) {
      std::memcpy(parts[i], sources[i] + at, bytes);
    }
  }
  const auto part = [&](int i) { return sources[i] ? parts[i] : nullptr; };
  const EpilogueOf<T> whole = {e.bias ? bias : nullptr, e.add, e.clamp, e.low, e.high, part(0), part(1), part(2), e.eps};
  finish(whole, sum, 0, parts[3], 0);
  std::memcpy(result + at, parts[3], bytes);
}

}  // namespace
}  // namespace lrpfast
