// The stabilised quotient, RULES.md §1: S(z) = z + eps where z >= 0, else z - eps.
//
// Divisions are divisions, so all instruction sets give the same bits.
#pragma once

#include "lanes_cpu.h"

namespace lrpfast {
namespace {

// numerator / S(z). eps == 0 (LRP-0): what is divided by an exact zero is dropped.
inline Lanes stable_quotient(Lanes numerator, Lanes z, float eps) {
  const Lanes zero = {};
  const Lanes quotient = numerator / (z + (z >= zero ? lanes(eps) : lanes(-eps)));
  return eps == 0.0f ? (z == zero ? zero : quotient) : quotient;
}

// carrier * message / S(z). The quotient carrier / S comes first, as in the reference: for the carriers of the rules it lies in
// [0, 1] and can neither overflow nor underflow.
template <bool kCarrier>
inline Lanes ratio_of(Lanes carrier, Lanes message, Lanes z, float eps) {
  if constexpr (kCarrier) {
    const Lanes zero = {}, value = message * stable_quotient(carrier, z, eps);
    return eps == 0.0f ? (z == zero ? zero : value) : value;  // of an infinite message too
  } else {
    return stable_quotient(message, z, eps);
  }
}

}  // namespace
}  // namespace lrpfast
