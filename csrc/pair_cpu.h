// The two ratios of Gamma with a signed output, and of AlphaBeta, from one reading of the operands. See PairArguments.
#pragma once

#include "cpu_vector.h"

namespace lrpfast {
namespace {

inline float stable_quotient(float numerator, float z, float eps) {
  const float quotient = numerator / (z + (z >= 0.0f ? eps : -eps));
  return eps == 0.0f && z == 0.0f ? 0.0f : quotient;
}

template <bool kCarrier>
void gamma_block(const float* carrier, const float* message, const float* z, const float* z_plus, float* upper,
                 float* lower, std::int64_t count, float gamma, float eps) {
  LRPFAST_SIMD
  for (std::int64_t i = 0; i < count; ++i) {
    const float relevance = kCarrier ? carrier[i] * message[i] : message[i];
    const float value = z[i];
    const float shift = gamma * z_plus[i];
    const float denominator = value > 0.0f ? value + shift : (1.0f + gamma) * value - shift;
    const float s = stable_quotient(relevance, denominator, eps);
    upper[i] = value > 0.0f ? s : 0.0f;
    lower[i] = value < 0.0f ? s : 0.0f;
  }
}

template <bool kCarrier, bool kPlus>
void alpha_beta_block(const float* carrier, const float* message, const float* z_plus, const float* z_minus,
                      float* plus, float* minus, std::int64_t count, float alpha, float beta, float eps) {
  LRPFAST_SIMD
  for (std::int64_t i = 0; i < count; ++i) {
    const float relevance = kCarrier ? carrier[i] * message[i] : message[i];
    const float negative = z_minus[i];
    const float positive = kPlus ? z_plus[i] : carrier[i] - negative;
    plus[i] = alpha * stable_quotient(relevance, positive, eps);
    minus[i] = -beta * stable_quotient(relevance, negative, eps);
  }
}

void pair_block(const PairArguments& a, const float* carrier, const float* message, const float* first,
                const float* second, float* upper, float* lower, std::int64_t count) {
  if (a.gamma_rule) {
    const auto block = carrier ? gamma_block<true> : gamma_block<false>;
    block(carrier, message, first, second, upper, lower, count, a.gamma_or_alpha, a.eps);
  } else if (first) {
    const auto block = carrier ? alpha_beta_block<true, true> : alpha_beta_block<false, true>;
    block(carrier, message, first, second, upper, lower, count, a.gamma_or_alpha, a.beta, a.eps);
  } else {
    alpha_beta_block<true, false>(carrier, message, first, second, upper, lower, count, a.gamma_or_alpha, a.beta,
                                  a.eps);
  }
}

void pair(const PairArguments& a, std::int64_t begin, std::int64_t end) {
  alignas(64) float buffer_c[kBlock], buffer_m[kBlock], buffer_a[kBlock], buffer_b[kBlock], buffer_u[kBlock],
      buffer_l[kBlock];
  const bool narrow_result = a.result_dtype == DType::kBFloat16;
  while (begin < end) {
    const std::int64_t count = smaller(kBlock, end - begin);
    const float* carrier = a.carrier.data ? load(a.carrier, begin, count, buffer_c) : nullptr;
    const float* message = load(a.message, begin, count, buffer_m);
    const float* first = a.first.data ? load(a.first, begin, count, buffer_a) : nullptr;
    const float* second = load(a.second, begin, count, buffer_b);
    if (!narrow_result) {
      pair_block(a, carrier, message, first, second, static_cast<float*>(a.results[0]) + begin,
                 static_cast<float*>(a.results[1]) + begin, count);
    } else {
      pair_block(a, carrier, message, first, second, buffer_u, buffer_l, count);
      store(a.results[0], a.result_dtype, begin, buffer_u, count);
      store(a.results[1], a.result_dtype, begin, buffer_l, count);
    }
    begin += count;
  }
}

}  // namespace
}  // namespace lrpfast
