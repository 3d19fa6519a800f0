// ratio and ratio_sum: carrier * (message_a + message_b) / S(denominator), a step of its own.
#pragma once

#include "quotient_cpu.h"

namespace lrpfast {
namespace {

// Carriers and denominators may lie elsewhere than messages: one row for all.
template <bool kCarrier, bool kSum>
void ratio_run(const RatioArguments& given, std::int64_t begin, std::int64_t end, std::int64_t carrier_shift,
               std::int64_t denominator_shift) {
  const RatioArguments a = given;  // in registers: a result that is written might else be one of these fields
  for_vectors(begin, end, a.result_dtype, {a.carrier, a.message_a, a.message_b, a.denominator},
              [=](auto way, std::int64_t at) {
                Lanes message = way.read(a.message_a, at), carrier = {};
                if constexpr (kSum) {
                  message = message + way.read(a.message_b, at);
                }
                if constexpr (kCarrier) {
                  carrier = way.read(a.carrier, at + carrier_shift);
                }
                const Lanes z = way.read(a.denominator, at + denominator_shift);
                way.write(a.result, a.result_dtype, at, ratio_of<kCarrier>(carrier, message, z, a.eps));
              });
}

void ratio(const RatioArguments& a, std::int64_t begin, std::int64_t end) {
  const bool carrier = a.carrier.data != nullptr, sum = a.message_b.data != nullptr;
  const auto run = carrier ? (sum ? ratio_run<true, true> : ratio_run<true, false>)
                           : (sum ? ratio_run<false, true> : ratio_run<false, false>);
  if (!a.carrier.broadcast && !a.denominator.broadcast) {
    run(a, begin, end, 0, 0);
    return;
  }
  while (begin < end) {
    const std::int64_t row = begin / a.row_size * a.row_size, row_end = smaller(end, row + a.row_size);
    run(a, begin, row_end, a.carrier.broadcast ? -row : 0, a.denominator.broadcast ? -row : 0);
    begin = row_end;
  }
}

}  // namespace
}  // namespace lrpfast
