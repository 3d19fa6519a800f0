// What the kernels and the module that exposes them agree on.
//
// The extension takes raw pointers and sizes. It links no libtorch and no OpenMP, allocates nothing and throws nothing:
// whoever calls (lrpfast/ops/native.py) has checked the operands and allocated the result.
#pragma once

#include <cstdint>

namespace lrpfast {

// The dtypes that the kernels read and write. Computation is in float32 (sums in float64).
enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

// An operand that is read.
struct Operand {
  const void* data;  // null: absent, counts as ones
  DType dtype;
  bool broadcast;  // one row serves every row of the result
};

// result = carrier * (message_a + message_b) / S(denominator), see RULES.md §1 for S; message_b.data may be null.
// All operands share one dense layout, so that the elements of a row (an index of dimension 0) are just numbered.
struct RatioArguments {
  Operand carrier, message_a, message_b, denominator;
  void* result;
  DType result_dtype;
  std::int64_t row_size;  // elements an index of dimension 0
  float eps;
};

// Two results of one reading (RULES.md §2, Gamma and AlphaBeta), for R = carrier * message:
//   gamma:      R / S(z + gamma z⁺) where z > 0, and R / S((1 + gamma) z - gamma z⁺) where z < 0; 0 elsewhere.
//               `first` is z, `second` z⁺.
//   alpha-beta: alpha R / S(z⁺), and -beta R / S(z⁻). `first` is z⁺ (null: carrier - z⁻), `second` z⁻.
// All operands share one dense layout; nothing is broadcast.
struct PairArguments {
  Operand carrier, message, first, second;
  void* results[2];
  DType result_dtype;
  bool gamma_rule;
  float gamma_or_alpha, beta, eps;
};

// result[row, group, p] = sum over the group's channels of carrier * message.
struct ChannelSumArguments {
  Operand carrier, message;
  void* result;  // contiguous, of the message's dtype
  std::int64_t channels, groups, positions;
  bool channels_last;  // a row is [positions, channels]; else [channels, positions]
};

// result[n, i] = sum over o of s[n, o] * weight[o, i]: the transpose of a dense layer for a small batch. All float32, rows
// contiguous.
struct DenseDgradArguments {
  const float* s;
  const float* weight;
  float* result;
  std::int64_t batch, outputs, inputs;
};

// One set of kernels an instruction set. Each computes the flat range [begin, end) of the result.
struct Kernels {
  void (*ratio)(const RatioArguments&, std::int64_t begin, std::int64_t end);
  void (*pair)(const PairArguments&, std::int64_t begin, std::int64_t end);
  void (*dense_dgrad)(const DenseDgradArguments&, std::int64_t begin, std::int64_t end);
  void (*channel_sum)(const ChannelSumArguments&, std::int64_t begin, std::int64_t end);
};

extern const Kernels kernels_default;
#if defined(LRPFAST_X86_VARIANTS)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace lrpfast
