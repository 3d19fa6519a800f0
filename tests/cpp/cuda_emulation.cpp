// The kernels of csrc/dense_kernels.cuh, on the CPU, against float64. Prints the number of failures.

#include <cstdio>
#include <random>

#include "cuda_emulation.h"

#define LRPFAST_DYNAMIC_SHARED(name) uint4* name = emulation::dynamic_shared.data()
#include "../../csrc/dense_kernels.cuh"

namespace {

using namespace lrpfast;

int failures = 0;

void expect(bool holds, const char* what, const char* type, long outputs, long inputs) {
  if (!holds) {
    std::fprintf(stderr, "%s, %s, %ld x %ld\n", what, type, outputs, inputs);
    ++failures;
  }
}

template <typename T>
std::vector<T> drawn(std::size_t count, unsigned seed, bool positive_only) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values;
  for (std::size_t i = 0; i < count; ++i) {
    const float value = normal(generator);
    values.push_back(narrow<T>(positive_only ? std::fabs(value) : value));
  }
  return values;
}

template <typename T>
bool close(const std::vector<T>& found, const std::vector<double>& exact, double rounding) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double off = wide(found[i]) - exact[i];
    error += off * off;
    size += exact[i] * exact[i];
  }
  return std::sqrt(error) <= rounding * std::sqrt(size);  // false for NaN
}

template <typename T>
void pair(const char* type, long outputs, long inputs, bool with_bias, double rounding) {
  const auto x = drawn<T>(inputs, 1, true), weight = drawn<T>(outputs * inputs, 2, false), bias = drawn<T>(outputs, 3, true);
  std::vector<T> z(outputs, narrow<T>(NAN)), z_plus(outputs, narrow<T>(NAN));
  const void* given = with_bias ? bias.data() : nullptr;
  const DensePairArguments arguments = {x.data(), weight.data(), given, given, z.data(), z_plus.data(), outputs, inputs, {}};
  emulation::launch(dense_pair_kernel<T>, (outputs + kWarps - 1) / kWarps, kThreads, 0, arguments);
  std::vector<double> exact(outputs), exact_plus(outputs);
  for (long o = 0; o < outputs; ++o) {
    exact[o] = exact_plus[o] = with_bias ? wide(bias[o]) : 0.0;
    for (long i = 0; i < inputs; ++i) {
      const double w = wide(weight[o * inputs + i]);
      exact[o] += w * wide(x[i]);
      exact_plus[o] += (w > 0 ? w : 0) * wide(x[i]);
    }
  }
  expect(close(z, exact, rounding), "dense_pair: z", type, outputs, inputs);
  expect(close(z_plus, exact_plus, rounding), "dense_pair: z of the positive weight", type, outputs, inputs);
}

template <typename T, int kChunks>
void ratio_dgrad(const char* type, long outputs, long inputs, int blocks, bool optional, float eps, double rounding) {
  auto x = drawn<T>(inputs, 1, true);
  const auto weight = drawn<T>(outputs * inputs, 2, true), bias = drawn<T>(outputs, 3, true);
  auto carrier = drawn<T>(outputs, 4, true);
  const auto message = drawn<T>(outputs, 5, false);
  for (auto& value : carrier) {
    value = narrow<T>(64 * wide(value));  // so that no result is subnormal in half precision
  }
  if (eps == 0.0f) {
    x.assign(inputs, narrow<T>(0.0f));  // every denominator is 0, and so are all ratios
  }
  std::vector<float> partial(blocks * inputs, NAN);
  std::vector<T> result(inputs, narrow<T>(NAN));
  const CudaDenseArguments arguments = {x.data(), weight.data(), optional ? bias.data() : nullptr,
                                    optional ? carrier.data() : nullptr, message.data(), partial.data(), result.data(),
                                    outputs, inputs, blocks, {}, eps};
  emulation::launch(dense_ratio_dgrad_kernel<T, kChunks>, blocks, kThreads, 2 * inputs * sizeof(T), arguments);
  emulation::launch(dense_total_kernel<T>, (inputs + 255) / 256, 256, 0, arguments);
  std::vector<double> exact(inputs, 0.0);
  for (long o = 0; o < outputs; ++o) {
    double z = optional ? wide(bias[o]) : 0.0;
    for (long i = 0; i < inputs; ++i) {
      z += static_cast<double>(wide(weight[o * inputs + i])) * wide(x[i]);
    }
    const double s = eps == 0.0f && z == 0 ? 0 : (optional ? wide(carrier[o]) : 1.0) * wide(message[o]) / (z + eps);
    for (long i = 0; i < inputs; ++i) {
      exact[i] += s * wide(weight[o * inputs + i]);
    }
  }
  expect(close(result, exact, rounding), "dense_ratio_dgrad", type, outputs, inputs);
}

template <typename T, int kMost>
void all(const char* type, double rounding) {
  constexpr long kStep = kVector<T> * kThreads;
  pair<T>(type, 19, 40 * kVector<T>, true, rounding);
  pair<T>(type, 16, kVector<T>, false, rounding);
  ratio_dgrad<T, 1>(type, 3, 8 * kVector<T>, 3, true, 1e-6f, rounding);
  ratio_dgrad<T, 1>(type, 5, kStep, 2, false, 1e-6f, rounding);           // several rows a block, a last one that is short
  ratio_dgrad<T, 2>(type, 4, kStep + 3 * kVector<T>, 3, true, 0.5f, rounding);
  ratio_dgrad<T, kMost>(type, 3, kMost * kStep - kVector<T>, 2, true, 1e-6f, rounding);
}

}  // namespace

int main() {
  all<float, 14>("float32", 2e-6);
  all<__nv_bfloat16, 7>("bfloat16", 4e-3);
  pair<__half>("float16", 5, 320, true, 5e-4);
  ratio_dgrad<__half, 7>("float16", 3, 7 * 8 * kThreads - 8, 2, true, 1e-6f, 5e-4);
  ratio_dgrad<float, 1>("float32", 5, 64, 2, false, 0.0f, 0.0);  // LRP-0 drops zeros
  std::printf("%d failures\n", failures);
  return failures != 0;
}
