// Runs CUDA kernels on the CPU, as far as csrc/dense.cu needs it: a thread of the block is a thread of the machine, blocks run one after
// the other. It shows whether the arithmetic, the indices and the barriers are right; of memory on a GPU it shows nothing.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

struct Place {
  unsigned x;
};
inline thread_local Place threadIdx;
inline Place blockIdx, gridDim, blockDim;

struct uint4 {
  std::uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Half precision: stored as 16 bits, computed in float32, as on the GPU.
struct __nv_bfloat16 {
  std::uint16_t bits;
  explicit operator float() const {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half {
  _Float16 value;
  explicit operator float() const { return static_cast<float>(value); }
};
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

namespace emulation {

constexpr int kMostThreads = 512;
inline std::unique_ptr<std::barrier<>> block;
inline std::unique_ptr<std::barrier<>> warps[kMostThreads / 32];
inline float lanes[kMostThreads];
inline std::vector<uint4> dynamic_shared;

// kernel<<<blocks, threads, shared>>>(arguments...)
template <typename Kernel, typename Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, std::size_t shared, const Arguments& arguments) {
  gridDim = {blocks};
  blockDim = {threads};
  dynamic_shared.assign(shared / sizeof(uint4) + 1, uint4{0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0});  // NaN
  for (unsigned index = 0; index < blocks; ++index) {
    blockIdx = {index};
    block = std::make_unique<std::barrier<>>(threads);
    for (auto& warp : warps) {
      warp = std::make_unique<std::barrier<>>(32);
    }
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=, &arguments] {
        threadIdx = {thread};
        kernel(arguments);
      });
    }
    for (auto& thread : running) {
      thread.join();
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  auto& warp = *emulation::warps[threadIdx.x / 32];
  emulation::lanes[threadIdx.x] = value;
  warp.arrive_and_wait();
  const float other = emulation::lanes[threadIdx.x ^ distance];
  warp.arrive_and_wait();
  return other;
}

template <typename T>
T __ldg(const T* place) {
  return *place;
}
template <typename T>
T __ldcs(const T* place) {
  return *place;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }

// Copies are done when they are waited for, and not before: what is read too early is what lay there.
namespace emulation {
struct Copy {
  void* target;
  const void* source;
  std::size_t size;
};
inline thread_local std::vector<std::vector<Copy>> committed;
inline thread_local std::vector<Copy> open_copies;
}  // namespace emulation

inline void __pipeline_memcpy_async(void* target, const void* source, std::size_t size) {
  emulation::open_copies.push_back({target, source, size});
}
inline void __pipeline_commit() {
  emulation::committed.push_back(std::move(emulation::open_copies));
  emulation::open_copies.clear();
}
inline void __pipeline_wait_prior(std::size_t left) {
  auto& waiting = emulation::committed;
  while (waiting.size() > left) {
    for (const auto& copy : waiting.front()) {
      std::memcpy(copy.target, copy.source, copy.size);
    }
    waiting.erase(waiting.begin());
  }
}
