// A product of matrices small enough to stay in the caches: what larger products are made of.
//
// The right factor lies in panels of kPanel columns ([columns / kPanel][depth][kPanel]), so that the inner loop reads it in
// order; the left one is read where it lies, row by row. A block of results stays in registers while the depth is summed up, and
// is handed over from there. Multiply-adds are fused where the instruction set has them: results agree between sets to rounding,
// not bit by bit.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu_vector.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kPanel = 32;
// Rows that differ by a power of two would meet in the same few lines of the first-level cache.
constexpr std::int64_t kSkew = 16;

#if defined(__AVX512F__)
constexpr std::int64_t kLanes = 16;
constexpr int kBlockRows = 14, kBlockLanes = 2;
#elif defined(__AVX2__)
constexpr std::int64_t kLanes = 8;
constexpr int kBlockRows = 6, kBlockLanes = 2;
#else
constexpr std::int64_t kLanes = 4;
constexpr int kBlockRows = 4, kBlockLanes = 2;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

inline Lanes lanes(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Lanes lanes(float value) { return value - Lanes{}; }
inline void put(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Memory that is asked for while products are computed, a little at a time: in bursts it would keep them waiting.
constexpr std::int64_t kLine = 16;   // floats a cache line
constexpr std::int64_t kFetch = 8;   // steps in depth from one time to the next
class Fetch {
 public:
  // `size` floats, all of which are asked for within `times` times.
  void add(const float* from, std::int64_t size, std::int64_t times) {
    if (from && size > 0) {
      streams_[count_++] = {from, from + size, ((size + kLine - 1) / kLine + times - 1) / times * kLine};
    }
  }

  void operator()() {
    for (int i = 0; i < count_; ++i) {
      Stream& stream = streams_[i];
      const float* end = stream.at + smaller(stream.step, stream.end - stream.at);
      for (; stream.at < end; stream.at += kLine) {
        __builtin_prefetch(stream.at, 0, 2);
      }
    }
  }

 private:
  struct Stream {
    const float *at, *end;
    std::int64_t step;
  };
  Stream streams_[6];
  int count_ = 0;
};

struct NoFetch {
  void operator()() {}
};

// sink(row, column, lanes) takes `kRows` rows by `kVectors` vectors of the product a b.
template <int kRows, int kVectors, typename Sink, typename Fetcher>
inline void multiply_block(const float* a, std::int64_t a_stride, const float* b, std::int64_t depth, Sink&& sink,
                           Fetcher&& fetch) {
  Lanes sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = Lanes{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k, b += kPanel) {
    if (k % kFetch == 0) {
      fetch();
    }
    Lanes right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      right[j] = lanes(b + j * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Lanes left = lanes(a[i * a_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = multiply_add(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sink(i, j * kLanes, sum[i][j]);
    }
  }
}

template <int kRows, int kVectors, typename Sink, typename Fetcher>
void multiply_rest(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b, std::int64_t depth,
                   Sink&& sink, Fetcher&& fetch) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_block<kRows, kVectors>(a, a_stride, b, depth, sink, fetch);
    } else {
      multiply_rest<kRows - 1, kVectors>(rows, a, a_stride, b, depth, sink, fetch);
    }
  }
}

// The columns of b that kVectors vectors hold.
template <int kVectors, typename Sink, typename Fetcher>
void multiply_columns(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b, std::int64_t depth,
                      Sink&& sink, Fetcher&& fetch) {
  std::int64_t row = 0;
  const auto shifted = [&](int i, std::int64_t j, Lanes sum) { sink(row + i, j, sum); };
  for (; row + kBlockRows <= rows; row += kBlockRows) {
    multiply_block<kBlockRows, kVectors>(a + row * a_stride, a_stride, b, depth, shifted, fetch);
  }
  multiply_rest<kBlockRows - 1, kVectors>(rows - row, a + row * a_stride, a_stride, b, depth, shifted, fetch);
}

// a b for one panel of b: `rows` rows, kPanel columns, of which those from `columns` on are not wanted.
template <typename Sink, typename Fetcher = NoFetch>
void multiply_panel(std::int64_t rows, const float* a, std::int64_t a_stride, const float* panel, std::int64_t depth,
                    std::int64_t columns, Sink&& sink, Fetcher&& fetch = {}) {
  for (std::int64_t column = 0; column < columns; column += kBlockLanes * kLanes) {
    const auto shifted = [&](std::int64_t i, std::int64_t j, Lanes sum) { sink(i, column + j, sum); };
    if (column + kLanes < columns) {
      multiply_columns<kBlockLanes>(rows, a, a_stride, panel + column, depth, shifted, fetch);
    } else {
      multiply_columns<1>(rows, a, a_stride, panel + column, depth, shifted, fetch);
    }
  }
}

}  // namespace
}  // namespace lrpfast
