#pragma once

#include <cstdint>

namespace lrpfast {

enum class CudaDType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A dense layer for one sample: `weight` [outputs, inputs], row by row, and vectors of its dtype. Pointers are device pointers.
struct CudaDenseArguments {
  const void* x;        // [inputs]
  const void* weight;   // rows start at multiples of 16 bytes
  const void* bias;     // [outputs], or null
  const void* carrier;  // [outputs], or null for ones
  const void* message;  // [outputs]
  float* partial;       // [blocks, inputs]: memory to work in
  void* result;         // [inputs]
  std::int64_t outputs, inputs;
  std::int32_t blocks;
  CudaDType dtype;
  float eps;
};

// The same without relevance: z = Wx + b, and z of the weight and bias without their negative entries.
struct DensePairArguments {
  const void* x;
  const void* weight;
  const void* bias;           // or null
  const void* positive_bias;  // or null
  void* z;                    // [outputs]
  void* z_plus;               // [outputs]
  std::int64_t outputs, inputs;
  CudaDType dtype;
};

// Enqueue on a CUDA stream of the current device. Return null, or what went wrong in launching.
const char* launch_dense_pair(const DensePairArguments& arguments, void* stream);
const char* launch_dense_ratio_dgrad(const CudaDenseArguments& arguments, void* stream);

}  // namespace lrpfast
