// Dense layers of one sample on an NVIDIA GPU. They are bound by reading the weight, so it is read once:
//
// - dense_pair_kernel gives z and z of the positive weight from one read, the positive weight being made on chip;
// - dense_ratio_dgrad_kernel gives Wᵀs with s = carrier * message / S(Wx + b). A block takes a row into shared memory (a row of VGG-16's first
//   dense layer is 49 KiB in half precision), finds its z, and adds s times the row to its own sums, which lie in registers. Meanwhile the
//   next row is on its way.
//
// A block sums its rows in order, and the blocks' sums are added in order by a second kernel: every run gives the same bits.

#pragma once

#include "dense_cuda.h"

// Memory whose size the launch says; where kernels are run on a CPU (tests/cpp), memory of another kind.
#ifndef LRPFAST_DYNAMIC_SHARED
#define LRPFAST_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

namespace lrpfast {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSums = 56;  // of a thread, in registers; with kThreads that is the most inputs a layer may have

template <typename T>
__device__ float wide(T value) {
  return static_cast<float>(value);
}

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of an access of 16 bytes

// 16 bytes as float32.
template <typename T>
__device__ void unpack(const uint4& raw, float (&values)[kVector<T>]) {
  const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    values[i] = wide(elements[i]);
  }
}

template <typename T>
__device__ T narrow(float value);
template <>
__device__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

__device__ float positive(float weight) { return weight < 0.0f ? 0.0f : weight; }

// The sum over a warp, in every lane, always added in the same order.
__device__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// One warp a row: z and z_plus from one read of it.
template <typename T>
__global__ void __launch_bounds__(kThreads) dense_pair_kernel(DensePairArguments a) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.outputs) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const uint4* weight = reinterpret_cast<const uint4*>(static_cast<const T*>(a.weight) + row * a.inputs);
  const uint4* x = static_cast<const uint4*>(a.x);
  const int chunks = static_cast<int>(a.inputs / kVector<T>);
  float z = 0.0f, z_plus = 0.0f;
#pragma unroll 4
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    float w[kVector<T>], values[kVector<T>];
    unpack<T>(__ldcs(weight + chunk), w);  // read once: it need not stay in the cache
    unpack<T>(__ldg(x + chunk), values);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      z += w[i] * values[i];
      z_plus += positive(w[i]) * values[i];
    }
  }
  z = warp_sum(z);
  z_plus = warp_sum(z_plus);
  if (lane == 0) {
    z += a.bias ? wide(static_cast<const T*>(a.bias)[row]) : 0.0f;
    z_plus += a.positive_bias ? wide(static_cast<const T*>(a.positive_bias)[row]) : 0.0f;
    static_cast<T*>(a.z)[row] = narrow<T>(z);
    static_cast<T*>(a.z_plus)[row] = narrow<T>(z_plus);
  }
}

// s of one output. As in the reference: the quotient first, sgn(0) = +1, and with eps 0 nothing where z is 0.
template <typename T>
__device__ float ratio(const CudaDenseArguments& a, std::int64_t row, float z) {
  const float stable = z + (z >= 0.0f ? a.eps : -a.eps);
  const float message = wide(static_cast<const T*>(a.message)[row]);
  if (a.eps == 0.0f && z == 0.0f) {
    return 0.0f;
  }
  return a.carrier ? __fmul_rn(message, __fdiv_rn(wide(static_cast<const T*>(a.carrier)[row]), stable))
                   : __fdiv_rn(message, stable);
}

// Start copying a row into shared memory. A thread copies what it will read itself, so it has nobody to wait for.
template <typename T, int kChunks>
__device__ void fetch(const CudaDenseArguments& a, std::int64_t row, uint4* buffer, int chunks) {
  if (row < a.outputs) {
    const uint4* weight = reinterpret_cast<const uint4*>(static_cast<const T*>(a.weight) + row * a.inputs);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * kThreads + threadIdx.x;
      if (chunk < chunks) {
        __pipeline_memcpy_async(buffer + chunk, weight + chunk, sizeof(uint4));
      }
    }
  }
  __pipeline_commit();
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads) dense_ratio_dgrad_kernel(CudaDenseArguments a) {
  LRPFAST_DYNAMIC_SHARED(rows);  // two rows
  __shared__ float parts[2][kWarps];
  const int chunks = static_cast<int>(a.inputs / kVector<T>);
  const uint4* x = static_cast<const uint4*>(a.x);
  float sums[kChunks][kVector<T>] = {};
  int turn = 0;
  fetch<T, kChunks>(a, blockIdx.x, rows, chunks);
  for (std::int64_t row = blockIdx.x; row < a.outputs; row += gridDim.x, turn ^= 1) {
    const uint4* own = rows + turn * chunks;
    fetch<T, kChunks>(a, row + gridDim.x, rows + (turn ^ 1) * chunks, chunks);
    __pipeline_wait_prior(1);
    float z = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * kThreads + threadIdx.x;
      if (chunk < chunks) {
        float w[kVector<T>], values[kVector<T>];
        unpack<T>(own[chunk], w);
        unpack<T>(__ldg(x + chunk), values);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          z += w[i] * values[i];
        }
      }
    }
    z = warp_sum(z);
    if (threadIdx.x % 32 == 0) {
      parts[turn][threadIdx.x / 32] = z;
    }
    __syncthreads();  // one a row: the next row's parts lie in the other half
    z = a.bias ? wide(static_cast<const T*>(a.bias)[row]) : 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      z += parts[turn][warp];
    }
    const float s = ratio<T>(a, row, z);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * kThreads + threadIdx.x;
      if (chunk < chunks) {
        float w[kVector<T>];
        unpack<T>(own[chunk], w);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
          sums[c][i] += s * w[i];
        }
      }
    }
  }
  float4* partial = reinterpret_cast<float4*>(a.partial + blockIdx.x * a.inputs);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = c * kThreads + threadIdx.x;
    if (chunk < chunks) {
#pragma unroll
      for (int i = 0; i < kVector<T>; i += 4) {
        partial[(chunk * kVector<T> + i) / 4] = make_float4(sums[c][i], sums[c][i + 1], sums[c][i + 2], sums[c][i + 3]);
      }
    }
  }
}

// The blocks' sums, added in order.
template <typename T>
__global__ void dense_total_kernel(CudaDenseArguments a) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.inputs) {
    return;
  }
  float total = 0.0f;
#pragma unroll 8
  for (int block = 0; block < a.blocks; ++block) {
    total += a.partial[block * a.inputs + i];
  }
  static_cast<T*>(a.result)[i] = narrow<T>(total);
}

}  // namespace
}  // namespace lrpfast
