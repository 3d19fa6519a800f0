// A product of matrices small enough to stay in the caches: what larger products are made of.
//
// The right factor lies in panels of kPanel columns ([columns / kPanel][depth][kPanel]), so that the inner loop reads it in
// order; the left one is read where it lies, row by row. There may be two right factors, of which one is taken by a sign: that of
// the left factor's value, or one that is given for each place of the result (RULES §2: contributions of one sign). It costs
// little more than one product. Their panels are [depth][2][kPanel], the row for a positive sign first.
//
// Values may be pairs of bfloat16, two neighbours in depth each, whose products are summed in float32: where a processor has an
// instruction for that (AVX512-BF16) it does twice the work. Depth and strides count pairs then.
//
// A block of results stays in registers while the depth is summed up, and is handed over from there. Multiply-adds are fused where
// the instruction set has them: results agree between sets to rounding, not bit by bit.
#pragma once

#include <type_traits>

#include "lanes_cpu.h"

namespace lrpfast {
namespace {

constexpr std::int64_t kPanel = 32;
// Rows that differ by a power of two would meet in the same few lines of the first-level cache.
constexpr std::int64_t kSkew = 16;

#if defined(__AVX512F__)
constexpr int kBlockRows = 14, kBlockLanes = 2, kChosenRows = 7;  // as many masks as registers hold
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockLanes = 2, kChosenRows = 5;
#else
constexpr int kBlockRows = 4, kBlockLanes = 2, kChosenRows = 4;
#endif

inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// c + the products of both values of each pair.
inline Lanes multiply_add_pairs(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const Bits x = reinterpret_cast<Bits>(a), y = reinterpret_cast<Bits>(b), upper = 0xffff0000u - Bits{};
  c = multiply_add(reinterpret_cast<Lanes>(x << 16), reinterpret_cast<Lanes>(y << 16), c);
  return multiply_add(reinterpret_cast<Lanes>(x & upper), reinterpret_cast<Lanes>(y & upper), c);
#endif
}

// A pair everywhere, its bits as they are.
inline Lanes pair_lanes(const float* p) {
  std::uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Lanes>(bits - Bits{});
}

// What a product's factors are: see above.
enum class Factors { kValues, kBySign, kPairs };

// Values of a factor that take the place of one float: one, or a pair.
template <typename T>
constexpr std::int64_t kValuesAFloat = sizeof(float) / sizeof(T);
template <typename T>
constexpr Factors kFactorsOf = kValuesAFloat<T> == 1 ? Factors::kValues : Factors::kPairs;

// Memory that is asked for while products are computed, a little at a time: in bursts it would keep them waiting.
constexpr std::int64_t kLine = 16;   // floats a cache line
constexpr std::int64_t kFetch = 8;   // steps in depth from one time to the next
class Fetch {
 public:
  // `size` values, all of which are asked for within `times` times.
  template <typename T>
  void add(const T* given, std::int64_t size, std::int64_t times) {
    const float* from = reinterpret_cast<const float*>(given);
    size /= kValuesAFloat<T>;
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

inline bool sign_bit(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 31;
}

// sink(row, column, lanes) takes `kRows` rows by `kVectors` vectors of the product a b.
template <Factors kFactors, int kRows, int kVectors, typename Sink, typename Fetcher>
inline void multiply_block(const float* a, std::int64_t a_stride, const float* b, std::int64_t depth, Sink&& sink,
                           Fetcher&& fetch) {
  constexpr bool kBySign = kFactors == Factors::kBySign;
  Lanes sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = Lanes{};
    }
  }
  // Three rows are addressed from one register: with one each they do not all fit, and compilers load them from the stack at each step.
  constexpr int kTogether = 3, kGroups = (kRows + kTogether - 1) / kTogether;
  const float* at[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    at[g] = a + g * kTogether * a_stride;
  }
  for (std::int64_t k = 0; k < depth; ++k, b += kBySign ? 2 * kPanel : kPanel) {
    if (k % kFetch == 0) {
      fetch();
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      asm("" : "+r"(at[g]));  // or compilers make fourteen of them again
    }
    Lanes right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      right[j] = lanes(b + j * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kFactors == Factors::kPairs) {
        const Lanes left = pair_lanes(at[i / kTogether] + i % kTogether * a_stride);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          sum[i][j] = multiply_add_pairs(left, right[j], sum[i][j]);
        }
      } else {
        const float value = at[i / kTogether][i % kTogether * a_stride];
        const Lanes left = lanes(value);
        const float* own = b + (sign_bit(value) ? kPanel : 0);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          sum[i][j] = multiply_add(left, kBySign ? lanes(own + j * kLanes) : right[j], sum[i][j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      ++at[g];
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

// Where a value is not negative, as `choose` takes it.
#if defined(__AVX512F__)
typedef __mmask16 Choice;
inline Choice not_negative(Lanes v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline Lanes choose(Choice choice, Lanes yes, Lanes no) { return _mm512_mask_blend_ps(choice, no, yes); }
#else
typedef std::int32_t Choice __attribute__((vector_size(4 * kLanes)));
inline Choice not_negative(Lanes v) { return v >= Lanes{}; }
inline Lanes choose(Choice choice, Lanes yes, Lanes no) { return choice ? yes : no; }
#endif

// sink(row, lanes) takes `kRows` rows by one vector of the product of a and, for each place, one of two b.
template <int kRows, typename Sink, typename Fetcher>
inline void multiply_chosen_block(const float* a, std::int64_t a_stride, const float* b, std::int64_t depth,
                                  const float* signs, std::int64_t sign_stride, Sink&& sink, Fetcher&& fetch) {
  Lanes sum[kRows];
  Choice choice[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    sum[i] = Lanes{};
    choice[i] = not_negative(lanes(signs + i * sign_stride));
  }
  for (std::int64_t k = 0; k < depth; ++k, b += 2 * kPanel) {
    if (k % kFetch == 0) {
      fetch();
    }
    const Lanes yes = lanes(b), no = lanes(b + kPanel);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      sum[i] = multiply_add(lanes(a[i * a_stride + k]), choose(choice[i], yes, no), sum[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    sink(i, sum[i]);
  }
}

// block(number, row) for blocks of kRows rows, from `row` on, then for the rest in one smaller block.
template <int kRows, typename Block>
void in_blocks(std::int64_t row, std::int64_t rows, Block&& block) {
  if constexpr (kRows > 0) {
    for (; row + kRows <= rows; row += kRows) {
      block(std::integral_constant<int, kRows>{}, row);
    }
    in_blocks<kRows - 1>(row, rows, block);
  }
}

// The columns of b that kVectors vectors hold.
template <Factors kFactors, int kVectors, typename Sink, typename Fetcher>
void multiply_columns(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b, std::int64_t depth,
                      Sink&& sink, Fetcher&& fetch) {
  in_blocks<kBlockRows>(0, rows, [&](auto number, std::int64_t row) {
    const auto shifted = [&](int i, std::int64_t j, Lanes sum) { sink(row + i, j, sum); };
    multiply_block<kFactors, number(), kVectors>(a + row * a_stride, a_stride, b, depth, shifted, fetch);
  });
}

// a b for one panel of b: `rows` rows, kPanel columns, of which those from `columns` on are not wanted.
template <Factors kFactors = Factors::kValues, typename Sink, typename Fetcher = NoFetch>
void multiply_panel(std::int64_t rows, const float* a, std::int64_t a_stride, const float* panel, std::int64_t depth,
                    std::int64_t columns, Sink&& sink, Fetcher&& fetch = {}) {
  for (std::int64_t column = 0; column < columns; column += kBlockLanes * kLanes) {
    const auto shifted = [&](std::int64_t i, std::int64_t j, Lanes sum) { sink(i, column + j, sum); };
    if (column + kLanes < columns) {
      multiply_columns<kFactors, kBlockLanes>(rows, a, a_stride, panel + column, depth, shifted, fetch);
    } else {
      multiply_columns<kFactors, 1>(rows, a, a_stride, panel + column, depth, shifted, fetch);
    }
  }
}

// The same for the product of a and, for each place, one of two b; `signs` lie in rows of whole panels.
template <typename Sink, typename Fetcher>
void multiply_chosen_panel(std::int64_t rows, const float* a, std::int64_t a_stride, const float* panel,
                           std::int64_t depth, std::int64_t columns, const float* signs, std::int64_t sign_stride,
                           Sink&& sink, Fetcher&& fetch) {
  for (std::int64_t column = 0; column < columns; column += kLanes) {
    in_blocks<kChosenRows>(0, rows, [&](auto number, std::int64_t row) {
      const auto shifted = [&](int i, Lanes sum) { sink(row + i, column, sum); };
      multiply_chosen_block<number()>(a + row * a_stride, a_stride, panel + column, depth,
                                      signs + row * sign_stride + column, sign_stride, shifted, fetch);
    });
  }
}

}  // namespace
}  // namespace lrpfast
