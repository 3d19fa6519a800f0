// ratio and ratio_sum on an NVIDIA GPU: kernel, then launcher. The arithmetic is that of ratio_cpu.h.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "ratio_cuda.h"

namespace lrpfast {
namespace {

__device__ float load(const Operand& operand, std::int64_t at) {
  return operand.dtype == DType::kFloat32 ? static_cast<const float*>(operand.data)[at]
                                          : __bfloat162float(static_cast<const __nv_bfloat16*>(operand.data)[at]);
}

// One element a thread and step: neighbouring threads read neighbouring elements. The branches on dtype and presence are
// the same in all threads. Divisions are rounded to nearest (__fdiv_rn), whatever the build's floating-point flags.
__global__ void ratio_kernel(RatioArguments a, std::int64_t size) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    const float z = load(a.denominator, a.denominator.broadcast ? i % a.row_size : i);
    float value = load(a.message_a, i);
    if (a.message_b.data) {
      value = __fadd_rn(value, load(a.message_b, i));
    }
    const float stable = z + (z >= 0.0f ? a.eps : -a.eps);
    if (a.carrier.data) {
      value = __fmul_rn(value, __fdiv_rn(load(a.carrier, a.carrier.broadcast ? i % a.row_size : i), stable));
    } else {
      value = __fdiv_rn(value, stable);
    }
    if (a.eps == 0.0f && z == 0.0f) {
      value = 0.0f;
    }
    if (a.result_dtype == DType::kFloat32) {
      static_cast<float*>(a.result)[i] = value;
    } else {
      static_cast<__nv_bfloat16*>(a.result)[i] = __float2bfloat16_rn(value);
    }
  }
}

}  // namespace

const char* launch_ratio(const RatioArguments& arguments, std::int64_t size, void* stream) {
  constexpr int kThreads = 256;
  constexpr std::int64_t kMostBlocks = 65536;
  if (size == 0) {
    return nullptr;
  }
  const std::int64_t blocks = (size + kThreads - 1) / kThreads;
  ratio_kernel<<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(arguments, size);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lrpfast
