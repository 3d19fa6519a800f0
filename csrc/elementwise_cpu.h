// Steps that torch takes two passes for: a choice by sign (what a rule sends to a signed input whose positive and negative part
// were weighted differently, RULES.md §2), and a residual sum with its ReLU.
#pragma once

#include "cpu_vector.h"

namespace lrpfast {
namespace {

void select_by_sign(const SelectArguments& a, std::int64_t begin, std::int64_t end) {
  alignas(64) float buffer_x[kBlock], buffer_u[kBlock], buffer_l[kBlock], chosen[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t count = smaller(kBlock, end - at);
    const float* x = load(a.x, at, count, buffer_x);
    const float* upper = load(a.upper, at, count, buffer_u);
    const float* lower = load(a.lower, at, count, buffer_l);
    LRPFAST_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      chosen[i] = x[i] >= 0.0f ? upper[i] : lower[i];
    }
    store(a.result, a.upper.dtype, at, chosen, count);
  }
}

// A NaN stays one, as in torch.
void add_relu(const AddReluArguments& a, std::int64_t begin, std::int64_t end) {
  alignas(64) float buffer_a[kBlock], buffer_b[kBlock], sum[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t count = smaller(kBlock, end - at);
    const float* left = load(a.a, at, count, buffer_a);
    const float* right = load(a.b, at, count, buffer_b);
    LRPFAST_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      const float total = left[i] + right[i];
      sum[i] = total < 0.0f ? 0.0f : total;
    }
    store(a.result, a.a.dtype, at, sum, count);
  }
}

}  // namespace
}  // namespace lrpfast
