// The two ratios of Gamma with a signed output, and of AlphaBeta, from one reading of the operands. See PairArguments.
#pragma once

#include "quotient_cpu.h"

namespace lrpfast {
namespace {

template <bool kCarrier>
void gamma_pair(const PairArguments& given, std::int64_t begin, std::int64_t end) {
  const PairArguments a = given;  // in registers, see ratio_run
  const float gamma = a.gamma_or_alpha;
  for_vectors(begin, end, a.result_dtype, {a.carrier, a.message, a.first, a.second}, [=](auto way, std::int64_t at) {
    Lanes relevance = way.read(a.message, at);
    if constexpr (kCarrier) {
      relevance = way.read(a.carrier, at) * relevance;
    }
    const Lanes zero = {}, z = way.read(a.first, at), shift = gamma * way.read(a.second, at);
    const Lanes denominator = z > zero ? z + shift : (1.0f + gamma) * z - shift;
    const Lanes s = stable_quotient(relevance, denominator, a.eps);
    way.write(a.results[0], a.result_dtype, at, z > zero ? s : zero);
    way.write(a.results[1], a.result_dtype, at, z < zero ? s : zero);
  });
}

template <bool kCarrier, bool kPlus>
void alpha_beta_pair(const PairArguments& given, std::int64_t begin, std::int64_t end) {
  const PairArguments a = given;  // in registers, see ratio_run
  for_vectors(begin, end, a.result_dtype, {a.carrier, a.message, a.first, a.second}, [=](auto way, std::int64_t at) {
    const Lanes message = way.read(a.message, at), negative = way.read(a.second, at);
    Lanes relevance = message, positive;
    if constexpr (kCarrier) {
      const Lanes carrier = way.read(a.carrier, at);
      relevance = carrier * message;
      positive = carrier - negative;
    }
    if constexpr (kPlus) {
      positive = way.read(a.first, at);
    }
    way.write(a.results[0], a.result_dtype, at, a.gamma_or_alpha * stable_quotient(relevance, positive, a.eps));
    way.write(a.results[1], a.result_dtype, at, -a.beta * stable_quotient(relevance, negative, a.eps));
  });
}

void pair(const PairArguments& a, std::int64_t begin, std::int64_t end) {
  const bool carrier = a.carrier.data != nullptr;
  if (a.gamma_rule) {
    (carrier ? gamma_pair<true> : gamma_pair<false>)(a, begin, end);
  } else if (a.first.data) {
    (carrier ? alpha_beta_pair<true, true> : alpha_beta_pair<false, true>)(a, begin, end);
  } else {
    alpha_beta_pair<true, false>(a, begin, end);
  }
}

}  // namespace
}  // namespace lrpfast
