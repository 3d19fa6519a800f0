// Vectors as wide as the instruction set has them: float32 in registers, float32 or bfloat16 in memory.
//
// Elementwise kernels are one expression over vectors. Operands are most often of one dtype, and are then read, widened, worked on and
// narrowed without leaving the registers; other combinations take a branch a vector. (Blocks that are widened into buffers first leave
// memory idle while they are worked on: 25 to 40% slower in bfloat16.)
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <initializer_list>

#include "cpu_vector.h"

namespace lrpfast {
namespace {

#if defined(__AVX512F__)
constexpr std::int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr std::int64_t kLanes = 8;
#else
constexpr std::int64_t kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Lanes lanes(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Lanes lanes(const std::uint16_t* p) {
  Halves v;
  std::memcpy(&v, p, sizeof v);
  return reinterpret_cast<Lanes>(__builtin_convertvector(v, Bits) << 16);
}
inline Lanes lanes(float value) { return value - Lanes{}; }

inline void put(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// Rounds as narrow() in cpu_vector.h does; the instruction takes what is denormal for zero.
inline void put(std::uint16_t* p, Lanes v) {
#if defined(__AVX512BF16__)
  const __m256bh narrowed = _mm512_cvtneps_pbh(v);
#else
  const Bits bits = reinterpret_cast<Bits>(v), nan = reinterpret_cast<Bits>((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves narrowed = __builtin_convertvector((nan & (bits >> 16)) | (~nan & rounded), Halves);
#endif
  std::memcpy(p, &narrowed, sizeof narrowed);
}

// ---- Elementwise kernels ---------------------------------------------------------------------------------------------

// Ways to read an operand's vector from a place on, and to write a result's. All operands are of type T:
template <typename T>
struct Uniform {
  Lanes read(const Operand& operand, std::int64_t at) const { return lanes(static_cast<const T*>(operand.data) + at); }
  void write(void* result, DType, std::int64_t at, Lanes v) const { put(static_cast<T*>(result) + at, v); }
};

// Each is of its own dtype:
struct Mixed {
  Lanes read(const Operand& operand, std::int64_t at) const {
    return operand.dtype == DType::kFloat32 ? Uniform<float>().read(operand, at)
                                            : Uniform<std::uint16_t>().read(operand, at);
  }
  void write(void* result, DType dtype, std::int64_t at, Lanes v) const {
    dtype == DType::kFloat32 ? Uniform<float>().write(result, dtype, at, v)
                             : Uniform<std::uint16_t>().write(result, dtype, at, v);
  }
};

// There are `count` < kLanes values left; the other lanes are zero.
struct Rest {
  std::int64_t count;

  Lanes read(const Operand& operand, std::int64_t at) const {
    float buffer[kLanes] = {}, part[kLanes] = {};
    std::memcpy(part, load(operand, at, count, buffer), static_cast<std::size_t>(count) * sizeof(float));
    return lanes(static_cast<const float*>(part));
  }
  void write(void* result, DType dtype, std::int64_t at, Lanes v) const {
    float part[kLanes];
    put(part, v);
    store(result, dtype, at, part, count);
  }
};

// body(way, at) for the vectors of [begin, end). Absent operands are of any dtype.
template <typename Body>
void for_vectors(std::int64_t begin, std::int64_t end, DType result, std::initializer_list<Operand> operands, Body&& body) {
  const auto all = [&](DType dtype) {
    bool same = result == dtype;
    for (const Operand& operand : operands) {
      same = same && (operand.dtype == dtype || !operand.data);
    }
    return same;
  };
  const auto run = [&](auto way) {
    for (; begin + kLanes <= end; begin += kLanes) {
      body(way, begin);
    }
  };
  if (all(DType::kFloat32)) {
    run(Uniform<float>());
  } else if (all(DType::kBFloat16)) {
    run(Uniform<std::uint16_t>());
  } else {
    run(Mixed());
  }
  if (begin < end) {
    body(Rest{end - begin}, begin);
  }
}

}  // namespace
}  // namespace lrpfast
