// Launches the kernels of dense_kernels.cuh.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include "dense_kernels.cuh"

namespace lrpfast {
namespace {

const char* message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename T, int kChunks>
const char* launch_with(const CudaDenseArguments& a, cudaStream_t stream) {
  const std::size_t shared = 2 * a.inputs * sizeof(T);
  const cudaError_t allowed = cudaFuncSetAttribute(
      dense_ratio_dgrad_kernel<T, kChunks>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (allowed != cudaSuccess) {
    return cudaGetErrorString(allowed);
  }
  dense_ratio_dgrad_kernel<T, kChunks><<<a.blocks, kThreads, shared, stream>>>(a);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) {
    return cudaGetErrorString(launched);
  }
  constexpr int kTotal = 256;
  dense_total_kernel<T><<<static_cast<unsigned>((a.inputs + kTotal - 1) / kTotal), kTotal, 0, stream>>>(a);
  return message_of(cudaGetLastError());
}

// As many sums in registers as the layer needs.
template <typename T>
const char* launch(const CudaDenseArguments& a, cudaStream_t stream) {
  const std::int64_t chunks = (a.inputs / kVector<T> + kThreads - 1) / kThreads;
  constexpr int kMost = kSums / kVector<T>;
  if (chunks <= 1) {
    return launch_with<T, 1>(a, stream);
  }
  if (chunks <= 2) {
    return launch_with<T, 2>(a, stream);
  }
  if (chunks <= 4) {
    return launch_with<T, 4>(a, stream);
  }
  return chunks <= kMost ? launch_with<T, kMost>(a, stream) : "the layer has too many inputs";
}

}  // namespace

const char* launch_dense_pair(const DensePairArguments& a, void* stream) {
  const unsigned blocks = static_cast<unsigned>((a.outputs + kWarps - 1) / kWarps);
  const cudaStream_t own = static_cast<cudaStream_t>(stream);
  if (a.dtype == CudaDType::kFloat32) {
    dense_pair_kernel<float><<<blocks, kThreads, 0, own>>>(a);
  } else if (a.dtype == CudaDType::kBFloat16) {
    dense_pair_kernel<__nv_bfloat16><<<blocks, kThreads, 0, own>>>(a);
  } else {
    dense_pair_kernel<__half><<<blocks, kThreads, 0, own>>>(a);
  }
  return message_of(cudaGetLastError());
}

const char* launch_dense_ratio_dgrad(const CudaDenseArguments& a, void* stream) {
  const cudaStream_t own = static_cast<cudaStream_t>(stream);
  if (a.dtype == CudaDType::kFloat32) {
    return launch<float>(a, own);
  }
  return a.dtype == CudaDType::kBFloat16 ? launch<__nv_bfloat16>(a, own) : launch<__half>(a, own);
}

}  // namespace lrpfast
