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

// result = x >= 0 ? upper : lower. All operands share one dense layout; the result has the dtype of `upper`.
struct SelectArguments {
  Operand x, upper, lower;
  void* result;
};

// result = max(a + b, 0): the end of a residual block. Both operands share one dense layout and dtype.
struct AddReluArguments {
  Operand a, b;
  void* result;
};

// result[row, group, p] = sum over the group's channels of carrier * message.
struct ChannelSumArguments {
  Operand carrier, message;
  void* result;  // contiguous, of the message's dtype
  std::int64_t channels, groups, positions;
  bool channels_last;  // a row is [positions, channels]; else [channels, positions]
};

// Dense layers of small batches, float32, rows contiguous. With `scales` a weight w counts as scales[0] * w where it is positive and
// as scales[1] * w elsewhere (RULES.md §2: W⁺, W⁻, W + gamma W⁺), without such a weight in memory.

// result[n, i] = sum over o of s[n, o] * weight[o, i]: the transpose.
struct DenseDgradArguments {
  const float* s;
  const float* weight;
  float* result;
  std::int64_t batch, outputs, inputs;
  bool scaled;
  float scales[2];
};

// result[n, o] = bias[o] + sum over i of weight[o, i] * x[n, i], and scaled_result the same with the scaled weight and its bias.
struct DenseArguments {
  const float *x, *weight;
  const float *bias, *scaled_bias;  // may be null
  float *result, *scaled_result;    // one of them may be null
  std::int64_t batch, outputs, inputs;
  float scales[2];
};

// Pooling windows over channels-last images; arrays hold height, then width.
struct Window {
  std::int64_t size[2], out_size[2];  // of the input, of the result
  std::int64_t kernel[2], stride[2], padding[2], dilation[2];
  std::int64_t channels;
};

// result[n, y, x, c] = the maximum of a window; winners[n, y, x, c] = the number of the tap that it was found at.
struct MaxPoolArguments {
  Operand input;
  void* result;
  std::uint8_t* winners;
  Window window;
};

// The way back: result[n, y, x, c] = the sum of what the windows that cover (y, x) send there. With `winners` a window sends
// all to the winner, without it sends each place an equal share: 1 / divisor, or with 0 one over the number of its places, those
// in the padding counted or not (torch.nn.AvgPool2d).
struct PoolDgradArguments {
  Operand message;
  const std::uint8_t* winners;
  void* result;
  Window window;
  std::int64_t divisor;
  bool count_padding;
};

// What becomes of the sums of a product of matrices before they are written. Operands lie as the result does. T: float, or
// bfloat16 as std::uint16_t; bias and computation are in float32.
template <typename T>
struct EpilogueOf {
  const float* bias;  // one a column, added; null: none
  bool add;           // to what the result holds
  bool clamp;         // to [low, high]; a NaN stays
  float low, high;
  // Given message_a: result = carrier * (message_a + message_b) / S(sum), see RatioArguments; carrier and message_b may be null.
  const T *carrier, *message_a, *message_b;
  float eps;
};
using Epilogue = EpilogueOf<float>;

// Filters as they are given. A value counts as its product with its filter's factor, and as scales[0] times that where it is positive,
// scales[1] times elsewhere.
struct FilterArguments {
  const float* given;  // element [filter, channel, y, x] at the sum of index * stride
  std::int64_t filter_stride, channel_stride, tap_strides[2];
  std::int64_t filters, channels;
  const float* factors;    // each the sum of two floats, the larger ones first, as many as whole panels of 32 have; null: none
  bool factor_of_channel;  // one a channel: the layer is a transpose
  bool scaled;
  float scales[2];
  float* result;  // G g G' of 3 x 3 filters as `winograd` takes them, [16][filters / 32][channels][32]
  bool strided;   // for stride 2, or its transpose
};

// The layers that Winograd's filtering is for: 3 x 3 filters, stride 1 (a transpose is one, too), stride 2, and the transpose of the latter.
enum class WinogradForm : int { kUnitStride = 0, kStrided = 1, kStridedTranspose = 2 };

// result = convolution of images with 3 x 3 filters, or its transpose (winograd_cpu.h): channels-last; T as above. Channels are a
// multiple of 16, filters of 32.
template <typename T>
struct WinogradArguments {
  const T* input;    // [images, size, channels]
  const T* weight;   // G g G', [16][filters / 32][channels][32]; of bfloat16 pairs of channels, [..][channels / 2][32][2]; null: given
  FilterArguments given;  // float alone: to be transformed by who multiplies them, once for each block; its result is not used
  T* result;         // [images, out_size, filters]
  float* workspace;  // threads times what Workspace of winograd_cpu.h takes
  std::int64_t images, size[2], out_size[2], padding[2], channels, filters;
  std::int64_t block;   // tiles that are worked on at a time
  std::int64_t chunk;   // filters that are, a multiple of 32
  WinogradForm form;
  EpilogueOf<T> epilogue;
};

// result = convolution of images with 1 x 1 filters (pointwise_cpu.h): channels-last; T as above. There may be two weights, of which
// one is taken by a sign: that of the input's value, or one that is given for each place of the result. Of bfloat16 there is one, and
// channels are even.
enum class BySign { kNone, kInput, kGiven };

template <typename T>
struct PointwiseArguments {
  const T* input;   // [images, size, channels]
  const T* weight;  // [filters / 32, rounded up][channels][32]; by sign [..][channels][2][32], first for signs not negative; of
                    // bfloat16 pairs of channels, [..][channels / 2][32][2]
  BySign by_sign;
  const T* sign;     // as the result, where one is given
  T* result;         // [images, out_size, filters]
  float* workspace;  // threads * block * (channels + 16 + filters, rounded up to 32, twice where a sign is given) floats, of bfloat16
                     // (channels / 2 + ..)
  std::int64_t images, size[2], out_size[2], stride[2], channels, filters;
  std::int64_t block;   // rows that are worked on at a time
  EpilogueOf<T> epilogue;
};

// result = convolution of images with one filter a channel (depthwise_cpu.h), or its transpose: channels-last, float32. A filter
// has at most 64 taps, and 8 along an axis.
struct DepthwiseArguments {
  const float* input;   // [images, size, channels]
  const float* weight;  // [kernel, channels]
  float* result;        // [images, out_size, channels]
  std::int64_t images, size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2], channels;
  bool transposed;  // stride, padding and dilation are those of the convolution that maps the result's size to the input's
  Epilogue epilogue;
};

// result = convolution of images, or its transpose, straight from its weight (convolution_cpu.h): channels-last, float32.
struct ConvolutionArguments {
  const float* input;      // [images, size, channels]
  FilterArguments weight;  // at most 64 taps; its result is not used
  float* result;           // [images, out_size, filters]
  float* workspace;        // threads * (block * (taps * (depth + 16) * (channels / depth, rounded up) + 32) + depth * 32) floats
  std::int64_t images, size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2], channels, filters;
  bool transposed;      // stride, padding and dilation are those of the convolution that maps the result's size to the input's
  std::int64_t block;   // places that are worked on at a time
  std::int64_t depth;   // channels that are, a multiple of 16
  Epilogue epilogue;
};

class Pieces;  // parallel.h

// One set of kernels an instruction set. Each computes the range [begin, end) of the result: elements, or rows of
// images where it says so; or the pieces that it is dealt.
struct Kernels {
  void (*ratio)(const RatioArguments&, std::int64_t begin, std::int64_t end);
  void (*pair)(const PairArguments&, std::int64_t begin, std::int64_t end);
  void (*select_by_sign)(const SelectArguments&, std::int64_t begin, std::int64_t end);
  void (*add_relu)(const AddReluArguments&, std::int64_t begin, std::int64_t end);
  void (*dense)(const DenseArguments&, std::int64_t begin, std::int64_t end);             // outputs
  void (*dense_dgrad)(const DenseDgradArguments&, std::int64_t begin, std::int64_t end);  // inputs
  void (*channel_sum)(const ChannelSumArguments&, std::int64_t begin, std::int64_t end);
  void (*max_pool)(const MaxPoolArguments&, std::int64_t begin, std::int64_t end);
  void (*pool_dgrad)(const PoolDgradArguments&, std::int64_t begin, std::int64_t end);
  void (*winograd)(const WinogradArguments<float>&, Pieces&);
  void (*winograd_bfloat16)(const WinogradArguments<std::uint16_t>&, Pieces&);
  void (*winograd_filters)(const FilterArguments&, std::int64_t begin, std::int64_t end);  // panels of 32 filters
  void (*pointwise)(const PointwiseArguments<float>&, Pieces&);
  void (*pointwise_bfloat16)(const PointwiseArguments<std::uint16_t>&, Pieces&);
  void (*convolution)(const ConvolutionArguments&, Pieces&);
  void (*depthwise)(const DepthwiseArguments&, std::int64_t begin, std::int64_t end);  // rows
};

extern const Kernels kernels_default;
#if defined(LRPFAST_X86_VARIANTS)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
// Where the compiler knows AVX512-BF16: LRPFAST_AVX512_BF16.
void winograd_avx512_bf16(const WinogradArguments<std::uint16_t>&, Pieces&);
void pointwise_avx512_bf16(const PointwiseArguments<std::uint16_t>&, Pieces&);
#endif

}  // namespace lrpfast
