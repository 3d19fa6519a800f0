// Steps that torch takes two passes for: a choice by sign (what a rule sends to a signed input whose positive and negative part
// were weighted differently, RULES.md §2), and a residual sum with its ReLU.
#pragma once

#include "lanes_cpu.h"

namespace lrpfast {
namespace {

void select_by_sign(const SelectArguments& given, std::int64_t begin, std::int64_t end) {
  const SelectArguments a = given;  // in registers, see ratio_run
  const DType result = a.upper.dtype;
  for_vectors(begin, end, result, {a.x, a.upper, a.lower}, [=](auto way, std::int64_t at) {
    const Lanes x = way.read(a.x, at), upper = way.read(a.upper, at), lower = way.read(a.lower, at);
    way.write(a.result, result, at, x >= Lanes{} ? upper : lower);
  });
}

// A NaN stays one, as in torch.
void add_relu(const AddReluArguments& given, std::int64_t begin, std::int64_t end) {
  const AddReluArguments a = given;  // in registers, see ratio_run
  const DType result = a.a.dtype;
  for_vectors(begin, end, result, {a.a, a.b}, [=](auto way, std::int64_t at) {
    const Lanes total = way.read(a.a, at) + way.read(a.b, at), zero = {};
    way.write(a.result, result, at, total < zero ? zero : total);
  });
}

}  // namespace
}  // namespace lrpfast
