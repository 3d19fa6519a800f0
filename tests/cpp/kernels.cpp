// The kernels alone, for the sanitizers: every operand in a heap block of exactly its size, threads that a sanitizer can see.
//
// Values are checked against one line of double arithmetic each; the thorough comparison is in tests/test_ops_*.py.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu_capability.h"
#include "ops.h"
#include "parallel.h"

namespace {

using namespace lrpfast;

int failures = 0;

void check(bool holds, const char* what, std::int64_t at) {
  if (!holds && ++failures < 20) {
    std::fprintf(stderr, "%s: wrong at %lld (%s)\n", what, static_cast<long long>(at), cpu_capability());
  }
}

bool near(double found, double expected) {
  return std::fabs(found - expected) <= 1e-5 * std::fabs(expected) + 1e-6 || (std::isnan(found) && std::isnan(expected));
}

// ---- A team of threads with the interface of libgomp -----------------------------------------------------------------

thread_local int member = 0;
thread_local int members = 1;

void team(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> started;
  for (unsigned i = 0; i < threads; ++i) {
    started.emplace_back([=] {
      member = static_cast<int>(i);
      members = static_cast<int>(threads);
      body(data);
    });
  }
  for (std::thread& thread : started) {
    thread.join();
  }
}

template <typename Arguments, void (*Kernels::*kKernel)(const Arguments&, std::int64_t, std::int64_t)>
void run(const Arguments& arguments, std::int64_t size, std::int64_t unit, int threads) {
  parallel_for(
      size, 1, unit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        (kernels().*kKernel)(*static_cast<const Arguments*>(context), begin, end);
      },
      &arguments);
}

template <typename Arguments, void (*Kernels::*kKernel)(const Arguments&, Pieces&)>
void run(const Arguments& arguments, int threads) {
  parallel_pieces(
      threads,
      [](const void* context, Pieces& pieces) { (kernels().*kKernel)(*static_cast<const Arguments*>(context), pieces); },
      &arguments);
}

// Each piece is given to one member; and where one is kept, the others take those that would have been its own.
void test_pieces(std::int64_t count, int threads) {
  struct Dealt {
    std::int64_t count;
    mutable std::vector<std::atomic<int>> times;
    mutable std::atomic<std::int64_t> done{0};
  };
  const Dealt dealt = {count, std::vector<std::atomic<int>>(static_cast<std::size_t>(count)), {}};
  parallel_pieces(
      threads,
      [](const void* context, Pieces& pieces) {
        const Dealt& all = *static_cast<const Dealt*>(context);
        const auto begin = std::chrono::steady_clock::now();
        for (std::int64_t i = pieces.next(all.count); i >= 0; i = pieces.next(all.count)) {
          ++all.times[i];
          const bool kept = pieces.member() == 0 && members > 1;
          while (kept && all.done < all.count - 1 && std::chrono::steady_clock::now() - begin < std::chrono::seconds(30)) {
            std::this_thread::yield();
          }
          check(!kept || all.done == all.count - 1, "pieces of a member that is kept", i);
          ++all.done;
        }
      },
      &dealt);
  for (std::int64_t i = 0; i < count; ++i) {
    check(dealt.times[i] == 1, "pieces", i);
  }
}

// ---- Operands --------------------------------------------------------------------------------------------------------

std::mt19937 generator(0);

std::vector<float> draw(std::int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) {
    value = normal(generator);
  }
  return values;
}

std::vector<float> poison(std::int64_t size) {
  return std::vector<float>(static_cast<std::size_t>(size), std::numeric_limits<float>::quiet_NaN());
}

Operand of(const std::vector<float>& values) { return {values.data(), DType::kFloat32, false}; }

double stable(double z, double eps) { return z >= 0 ? z + eps : z - eps; }

// ---- The kernels -----------------------------------------------------------------------------------------------------

void test_ratio(std::int64_t size, int threads) {
  const auto carrier = draw(size), a = draw(size), b = draw(size), z = draw(size);
  auto result = poison(size);
  const RatioArguments arguments = {of(carrier), of(a), of(b), of(z), result.data(), DType::kFloat32, size, 0.1f};
  run<RatioArguments, &Kernels::ratio>(arguments, size, 64, threads);
  for (std::int64_t i = 0; i < size; ++i) {
    check(near(result[i], carrier[i] * (double(a[i]) + b[i]) / stable(z[i], 0.1)), "ratio", i);
  }
}

void test_ratio_rows(std::int64_t rows, std::int64_t row_size, int threads) {
  const auto carrier = draw(row_size), a = draw(rows * row_size), z = draw(row_size);
  auto result = poison(rows * row_size);
  const RatioArguments arguments = {{carrier.data(), DType::kFloat32, true}, of(a), {nullptr, DType::kFloat32, false},
                                    {z.data(), DType::kFloat32, true}, result.data(), DType::kFloat32, row_size, 0.1f};
  run<RatioArguments, &Kernels::ratio>(arguments, rows * row_size, 64, threads);
  for (std::int64_t i = 0; i < rows * row_size; ++i) {
    const std::int64_t j = i % row_size;
    check(near(result[i], carrier[j] * double(a[i]) / stable(z[j], 0.1)), "ratio by rows", i);
  }
}

void test_bfloat16(std::int64_t size, int threads) {
  // 1.5 is a bfloat16: the results are exact.
  const std::vector<std::uint16_t> values(static_cast<std::size_t>(size), 0x3fc0);
  std::vector<std::uint16_t> result(static_cast<std::size_t>(size), 0x7fc0);
  const Operand operand = {values.data(), DType::kBFloat16, false};
  const RatioArguments arguments = {operand, operand, {nullptr, DType::kFloat32, false}, operand, result.data(),
                                    DType::kBFloat16, size, 0.0f};
  run<RatioArguments, &Kernels::ratio>(arguments, size, 64, threads);
  for (std::int64_t i = 0; i < size; ++i) {
    check(result[i] == 0x3fc0, "ratio in bfloat16", i);
  }
}

void test_pair(std::int64_t size, int threads) {
  const auto message = draw(size), z = draw(size);
  auto z_plus = draw(size);
  for (float& value : z_plus) {
    value = std::fabs(value);
  }
  auto upper = poison(size), lower = poison(size);
  const Operand none = {nullptr, DType::kFloat32, false};
  const PairArguments gamma = {none, of(message), of(z), of(z_plus), {upper.data(), lower.data()}, DType::kFloat32,
                               true, 0.25f, 0.0f, 0.1f};
  run<PairArguments, &Kernels::pair>(gamma, size, 64, threads);
  for (std::int64_t i = 0; i < size; ++i) {
    const double above = message[i] / stable(z[i] + 0.25 * z_plus[i], 0.1);
    const double below = message[i] / stable(1.25 * z[i] - 0.25 * z_plus[i], 0.1);
    check(near(upper[i], z[i] > 0 ? above : 0), "gamma pair, upper", i);
    check(near(lower[i], z[i] < 0 ? below : 0), "gamma pair, lower", i);
  }
  const PairArguments alpha_beta = {none, of(message), of(z_plus), of(z), {upper.data(), lower.data()},
                                    DType::kFloat32, false, 2.0f, 1.0f, 0.1f};
  run<PairArguments, &Kernels::pair>(alpha_beta, size, 64, threads);
  for (std::int64_t i = 0; i < size; ++i) {
    check(near(upper[i], 2 * double(message[i]) / stable(z_plus[i], 0.1)), "alpha-beta pair, upper", i);
    check(near(lower[i], -double(message[i]) / stable(z[i], 0.1)), "alpha-beta pair, lower", i);
  }
}

void test_select(std::int64_t size, int threads) {
  const auto x = draw(size), lower = draw(size);
  auto upper = draw(size);
  const auto given = upper;
  const SelectArguments arguments = {of(x), of(upper), of(lower), upper.data()};  // in place
  run<SelectArguments, &Kernels::select_by_sign>(arguments, size, 64, threads);
  for (std::int64_t i = 0; i < size; ++i) {
    check(upper[i] == (x[i] >= 0 ? given[i] : lower[i]), "select", i);
  }
}

void test_add_relu(std::int64_t size, int threads) {
  const auto a = draw(size), b = draw(size);
  auto result = poison(size);
  run<AddReluArguments, &Kernels::add_relu>({of(a), of(b), result.data()}, size, 64, threads);
  for (std::int64_t i = 0; i < size; ++i) {
    check(result[i] == std::fmax(a[i] + b[i], 0.0f), "add_relu", i);
  }
}

// A dense layer with its own weight and with the positive part and 1.5 times the negative one, and the transposes.
void test_dense(std::int64_t batch, std::int64_t outputs, std::int64_t inputs, int threads) {
  const auto s = draw(batch * outputs), x = draw(batch * inputs), weight = draw(outputs * inputs);
  const auto bias = draw(outputs), scaled_bias = draw(outputs);
  auto z = poison(batch * outputs), scaled_z = poison(batch * outputs);
  const auto scaled = [&](std::int64_t at) { return weight[at] * (weight[at] > 0 ? 1.0 : 1.5); };
  const DenseArguments both = {x.data(), weight.data(), bias.data(), scaled_bias.data(), z.data(),
                               scaled_z.data(), batch, outputs, inputs, {1.0f, 1.5f}};
  run<DenseArguments, &Kernels::dense>(both, outputs, 16, threads);
  for (std::int64_t i = 0; i < batch * outputs; ++i) {
    double plain = bias[i % outputs], other = scaled_bias[i % outputs];
    for (std::int64_t k = 0; k < inputs; ++k) {
      plain += double(x[i / outputs * inputs + k]) * weight[i % outputs * inputs + k];
      other += x[i / outputs * inputs + k] * scaled(i % outputs * inputs + k);
    }
    check(std::fabs(z[i] - plain) < 1e-3 && std::fabs(scaled_z[i] - other) < 1e-3, "dense", i);
  }
  for (const bool is_scaled : {false, true}) {
    auto result = poison(batch * inputs);
    const DenseDgradArguments arguments = {s.data(), weight.data(), result.data(), batch,
                                           outputs, inputs, is_scaled, {1.0f, 1.5f}};
    run<DenseDgradArguments, &Kernels::dense_dgrad>(arguments, inputs, 64, threads);
    for (std::int64_t i = 0; i < batch * inputs; ++i) {
      double sum = 0;
      for (std::int64_t o = 0; o < outputs; ++o) {
        const std::int64_t at = o * inputs + i % inputs;
        sum += s[i / inputs * outputs + o] * (is_scaled ? scaled(at) : double(weight[at]));
      }
      check(std::fabs(result[i] - sum) < 1e-3, "dense_dgrad", i);
    }
  }
}

void test_channel_sum(std::int64_t channels, std::int64_t groups, std::int64_t positions, bool last, int threads) {
  const std::int64_t rows = 3, width = channels / groups;
  const auto carrier = draw(rows * channels * positions), message = draw(rows * channels * positions);
  auto result = poison(rows * groups * positions);
  const ChannelSumArguments arguments = {of(carrier), of(message), result.data(), channels, groups, positions, last};
  run<ChannelSumArguments, &Kernels::channel_sum>(arguments, rows * groups * positions, 64, threads);
  for (std::int64_t i = 0; i < rows * groups * positions; ++i) {
    const std::int64_t row = i / (groups * positions), group = i / positions % groups, position = i % positions;
    double sum = 0;
    for (std::int64_t c = group * width; c < (group + 1) * width; ++c) {
      const std::int64_t at = last ? (row * positions + position) * channels + c : (row * channels + c) * positions + position;
      sum += double(carrier[at]) * message[at];
    }
    check(std::fabs(result[i] - sum) < 1e-4, "channel_sum", i);
  }
}

void test_pools(std::int64_t channels, std::int64_t kernel, std::int64_t stride, std::int64_t padding, int threads) {
  const std::int64_t images = 2, height = 7, width = 9;
  const Window window = {{height, width},
                         {(height + 2 * padding - kernel) / stride + 1, (width + 2 * padding - kernel) / stride + 1},
                         {kernel, kernel}, {stride, stride}, {padding, padding}, {1, 1}, channels};
  const std::int64_t out = images * window.out_size[0] * window.out_size[1] * channels;
  const auto x = draw(images * height * width * channels), q = draw(out);
  auto pooled = poison(out), back = poison(images * height * width * channels);
  std::vector<std::uint8_t> winners(static_cast<std::size_t>(out), 255);
  run<MaxPoolArguments, &Kernels::max_pool>({of(x), pooled.data(), winners.data(), window},
                                            images * window.out_size[0], 1, threads);
  std::vector<double> expected(back.size(), 0.0);
  for (std::int64_t i = 0; i < out; ++i) {
    const std::int64_t c = i % channels, column = i / channels % window.out_size[1];
    const std::int64_t row = i / channels / window.out_size[1] % window.out_size[0];
    const std::int64_t image = i / channels / window.out_size[1] / window.out_size[0];
    float best = -std::numeric_limits<float>::infinity();
    std::int64_t place = -1;
    for (std::int64_t tap = 0; tap < kernel * kernel; ++tap) {
      const std::int64_t y = row * stride - padding + tap / kernel, z = column * stride - padding + tap % kernel;
      if (y >= 0 && y < height && z >= 0 && z < width) {
        const std::int64_t at = ((image * height + y) * width + z) * channels + c;
        if (x[at] > best) {
          best = x[at];
          place = at;
        }
      }
    }
    check(pooled[i] == best, "max_pool", i);
    expected[place] += q[i];
  }
  const PoolDgradArguments to_winners = {of(q), winners.data(), back.data(), window, 0, false};
  run<PoolDgradArguments, &Kernels::pool_dgrad>(to_winners, images * height, 1, threads);
  for (std::size_t i = 0; i < back.size(); ++i) {
    check(near(back[i], expected[i]), "max pool's way back", static_cast<std::int64_t>(i));
  }
  const PoolDgradArguments shares = {of(q), nullptr, back.data(), window, 0, true};
  run<PoolDgradArguments, &Kernels::pool_dgrad>(shares, images * height, 1, threads);
  double sent = 0, received = 0;
  for (float value : back) {
    received += value;
  }
  for (float value : q) {
    sent += value;
  }
  check(padding != 0 || (height - kernel) % stride != 0 || std::fabs(sent - received) < 1e-3, "average's way back", 0);
}

// One value of a convolution of channels-last images, in double.
double convolved(const std::vector<float>& x, const std::vector<float>& weight, const std::int64_t size[2], std::int64_t channels,
                 std::int64_t kernel, std::int64_t image, std::int64_t y, std::int64_t z, std::int64_t filter) {
  double sum = 0;
  for (std::int64_t tap = 0; tap < kernel * kernel; ++tap) {
    const std::int64_t row = y + tap / kernel, column = z + tap % kernel;
    for (std::int64_t c = 0; c < channels && row >= 0 && row < size[0] && column >= 0 && column < size[1]; ++c) {
      sum += double(x[((image * size[0] + row) * size[1] + column) * channels + c]) *
             weight[(filter * channels + c) * kernel * kernel + tap];
    }
  }
  return sum;
}

// G g G' of a filter that lies row by row.
double transformed(const float* g, int point, bool strided) {
  const double unit[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  const double phases[4][3] = {{1, 0, 0}, {1, 0, 1}, {0, 0, 1}, {0, 1, 0}};
  double sum = 0;
  for (int tap = 0; tap < 9; ++tap) {
    const double *row = (strided ? phases : unit)[point / 4], *column = (strided ? phases : unit)[point % 4];
    sum += row[tap / 3] * g[tap] * column[tap % 3];
  }
  return sum;
}

// A layer that Winograd's filtering is for: 2 images of 16 channels.
struct Filtered {
  static constexpr std::int64_t filters = 96;  // three panels: the last chunk of them is a part

  WinogradForm form;
  std::int64_t size[2], padding;

  bool strided() const { return form != WinogradForm::kUnitStride; }

  // Of the result; of a transpose one place more than its input reaches along the first axis.
  std::int64_t out(int axis) const {
    if (form == WinogradForm::kStridedTranspose) {
      return 2 * size[axis] + 1 - 2 * padding + (axis == 0 ? 1 : 0);
    }
    return (size[axis] + 2 * padding - 3) / (strided() ? 2 : 1) + 1;
  }

  // One value of the result, in double. The taps of a transpose are in reverse.
  double value(const std::vector<float>& x, const std::vector<float>& weight, std::int64_t i) const {
    const std::int64_t filter = i % filters, z = i / filters % out(1), y = i / filters / out(1) % out(0);
    const std::int64_t image = i / filters / out(1) / out(0);
    const std::int64_t stride = strided() ? 2 : 1;
    if (form != WinogradForm::kStridedTranspose) {
      return convolved(x, weight, size, 16, 3, image, y * stride - padding, z * stride - padding, filter);
    }
    double sum = 0;
    for (std::int64_t row = 0; row < size[0]; ++row) {
      for (std::int64_t column = 0; column < size[1]; ++column) {
        const std::int64_t tap[2] = {y + padding - 2 * row, z + padding - 2 * column};
        for (std::int64_t c = 0; c < 16 && tap[0] >= 0 && tap[0] < 3 && tap[1] >= 0 && tap[1] < 3; ++c) {
          sum += double(x[((image * size[0] + row) * size[1] + column) * 16 + c]) *
                 weight[(filter * 16 + c) * 9 + 8 - (tap[0] * 3 + tap[1])];
        }
      }
    }
    return sum;
  }
};

void test_winograd(const Filtered& layer, int threads) {
  const std::int64_t images = 2, channels = 16, filters = Filtered::filters, block = 5, chunk = 64, padding = layer.padding;
  const std::int64_t size[2] = {layer.size[0], layer.size[1]}, out[2] = {layer.out(0), layer.out(1)};
  const std::int64_t height = size[0], width = size[1];
  const auto x = draw(images * height * width * channels), weight = draw(filters * channels * 9);
  std::vector<float> laid_out(static_cast<std::size_t>(16 * filters * channels));
  for (std::int64_t i = 0; i < filters * channels; ++i) {
    const std::int64_t filter = i / channels, channel = i % channels;
    for (int point = 0; point < 16; ++point) {
      laid_out[((point * filters / 32 + filter / 32) * channels + channel) * 32 + filter % 32] =
          static_cast<float>(transformed(&weight[i * 9], point, layer.strided()));
    }
  }
  auto in_one_call = poison(16 * filters * channels);
  const FilterArguments given = {weight.data(), channels * 9, 9, {3, 1}, filters, channels, nullptr, false, false, {1, 1},
                                 in_one_call.data(), layer.strided()};
  run<FilterArguments, &Kernels::winograd_filters>(given, filters / 32, 1, threads);
  for (std::size_t i = 0; i < laid_out.size(); ++i) {
    check(std::fabs(in_one_call[i] - laid_out[i]) < 1e-6, "winograd_filters", static_cast<std::int64_t>(i));
  }
  const auto message = draw(images * out[0] * out[1] * filters);
  const Epilogue epilogue = {nullptr, false, false, 0, 0, nullptr, message.data(), nullptr, 0.5f};
  for (const float* ready : {static_cast<const float*>(laid_out.data()), static_cast<const float*>(nullptr)}) {
    auto result = poison(static_cast<std::int64_t>(message.size()));
    auto workspace = poison(threads * (25 * block * (channels + chunk + 32) + 16 * chunk * channels));
    const WinogradArguments<float> arguments = {x.data(), ready, given, result.data(), workspace.data(), images,
                                                {size[0], size[1]}, {out[0], out[1]}, {padding, padding}, channels, filters,
                                                block, chunk, layer.form, epilogue};
    run<WinogradArguments<float>, &Kernels::winograd>(arguments, threads);
    for (std::size_t i = 0; i < result.size(); ++i) {
      const double sum = layer.value(x, weight, static_cast<std::int64_t>(i));
      const double stable = sum + (sum >= 0 ? 0.5 : -0.5);
      check(std::fabs(result[i] * stable - message[i]) < 1e-4 || std::fabs(sum) < 1e-4, "winograd", static_cast<std::int64_t>(i));
    }
  }
}

// Of a value that has no more digits.
std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

float widened(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Integers, in place of draws from [-1, 1].
std::vector<float> integers(std::int64_t size, float most) {
  auto values = draw(size);
  for (float& value : values) {
    value = std::round(value * most);
  }
  return values;
}

// Integers that nothing rounds but the end.
void test_winograd_bfloat16(const Filtered& layer, int threads) {
  const std::int64_t images = 2, channels = 16, filters = Filtered::filters, block = 5, chunk = 64, padding = layer.padding;
  const std::int64_t size[2] = {layer.size[0], layer.size[1]}, out[2] = {layer.out(0), layer.out(1)};
  const std::int64_t height = size[0], width = size[1];
  const auto x = integers(images * height * width * channels, 2);
  auto weight = integers(filters * channels * 9, 1);
  for (float& value : weight) {
    value *= 4;
  }
  std::vector<std::uint16_t> narrow_x(x.size()), laid_out(static_cast<std::size_t>(16 * filters * channels));
  std::transform(x.begin(), x.end(), narrow_x.begin(), narrow);
  for (std::int64_t i = 0; i < filters * channels; ++i) {
    const std::int64_t filter = i / channels, channel = i % channels;
    for (int point = 0; point < 16; ++point) {
      const std::int64_t row = (point * filters / 32 + filter / 32) * channels / 2 + channel / 2;
      laid_out[(row * 32 + filter % 32) * 2 + channel % 2] = narrow(static_cast<float>(transformed(&weight[i * 9], point, layer.strided())));
    }
  }
  auto workspace = poison(threads * 25 * block * (channels / 2 + chunk + 32));
  std::vector<std::uint16_t> result(static_cast<std::size_t>(images * out[0] * out[1] * filters), 0x7fc0);
  const WinogradArguments<std::uint16_t> arguments = {
      narrow_x.data(), laid_out.data(), {}, result.data(), workspace.data(), images, {size[0], size[1]}, {out[0], out[1]},
      {padding, padding}, channels, filters, block, chunk, layer.form, {}};
  run<WinogradArguments<std::uint16_t>, &Kernels::winograd_bfloat16>(arguments, threads);
  for (std::size_t i = 0; i < result.size(); ++i) {
    const double sum = layer.value(x, weight, static_cast<std::int64_t>(i));
    check(std::fabs(widened(result[i]) - sum) <= std::fabs(sum) / 256, "winograd_bfloat16", static_cast<std::int64_t>(i));
  }
}

void test_pointwise(std::int64_t channels, std::int64_t filters, std::int64_t stride, BySign by_sign, int threads) {
  const bool by_input = by_sign == BySign::kInput, by_given = by_sign == BySign::kGiven;
  const std::int64_t images = 2, block = 9, width = (filters + 31) / 32 * 32, signs = by_input || by_given ? 2 : 1;
  const std::int64_t size[2] = {5, 7}, out[2] = {(4 + stride) / stride, (6 + stride) / stride};
  const std::int64_t depth = signs * channels, results = images * out[0] * out[1] * filters;
  const auto x = draw(images * size[0] * size[1] * channels), weight = draw(filters * depth), bias = draw(filters);
  const auto given = draw(results);
  std::vector<float> laid_out(static_cast<std::size_t>(width * depth), 0.0f);
  for (std::int64_t i = 0; i < filters * depth; ++i) {
    const std::int64_t filter = i / depth, sign = i % depth / channels, channel = i % channels;
    laid_out[((filter / 32 * channels + channel) * signs + sign) * 32 + filter % 32] = weight[i];
  }
  auto result = poison(results), workspace = poison(threads * block * (channels + 16 + (by_given ? 2 : 1) * width));
  const Epilogue epilogue = {bias.data(), false, true, 0, 1, nullptr, nullptr, nullptr, 0.0f};
  const PointwiseArguments<float> arguments = {x.data(), laid_out.data(), by_sign, by_given ? given.data() : nullptr,
                                        result.data(), workspace.data(), images, {size[0], size[1]},
                                        {out[0], out[1]}, {stride, stride}, channels, filters, block, epilogue};
  run<PointwiseArguments<float>, &Kernels::pointwise>(arguments, threads);
  for (std::size_t i = 0; i < result.size(); ++i) {
    const std::int64_t filter = i % filters, z = i / filters % out[1], y = i / filters / out[1] % out[0];
    const float* row = &x[((i / filters / out[1] / out[0] * size[0] + y * stride) * size[1] + z * stride) * channels];
    double sum = bias[filter];
    for (std::int64_t c = 0; c < channels; ++c) {
      const bool second = (by_input && row[c] < 0) || (by_given && given[i] < 0);
      sum += double(row[c]) * weight[filter * depth + (second ? channels + c : c)];
    }
    check(std::fabs(result[i] - std::fmin(std::fmax(sum, 0), 1)) < 1e-3, "pointwise", i);
  }
}

void test_pointwise_bfloat16(std::int64_t channels, std::int64_t filters, std::int64_t stride, int threads) {
  const std::int64_t images = 2, block = 9, width = (filters + 31) / 32 * 32;
  const std::int64_t size[2] = {5, 7}, out[2] = {(4 + stride) / stride, (6 + stride) / stride};
  const auto x = integers(images * size[0] * size[1] * channels, 2), weight = integers(filters * channels, 2);
  std::vector<std::uint16_t> narrow_x(x.size()), laid_out(static_cast<std::size_t>(width * channels));
  std::transform(x.begin(), x.end(), narrow_x.begin(), narrow);
  for (std::int64_t i = 0; i < filters * channels; ++i) {
    const std::int64_t filter = i / channels, channel = i % channels;
    laid_out[((filter / 32 * channels + channel) / 2 * 32 + filter % 32) * 2 + channel % 2] = narrow(weight[i]);
  }
  std::vector<std::uint16_t> result(static_cast<std::size_t>(images * out[0] * out[1] * filters), 0x7fc0);
  auto workspace = poison(threads * block * (channels / 2 + 16 + width));
  const PointwiseArguments<std::uint16_t> arguments = {
      narrow_x.data(), laid_out.data(), BySign::kNone, nullptr, result.data(), workspace.data(), images,
      {size[0], size[1]}, {out[0], out[1]}, {stride, stride}, channels, filters, block, {}};
  run<PointwiseArguments<std::uint16_t>, &Kernels::pointwise_bfloat16>(arguments, threads);
  for (std::size_t i = 0; i < result.size(); ++i) {
    const std::int64_t filter = i % filters, z = i / filters % out[1], y = i / filters / out[1] % out[0];
    const float* row = &x[((i / filters / out[1] / out[0] * size[0] + y * stride) * size[1] + z * stride) * channels];
    double sum = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
      sum += double(row[c]) * weight[filter * channels + c];
    }
    check(std::fabs(widened(result[i]) - sum) <= std::fabs(sum) / 256, "pointwise_bfloat16", static_cast<std::int64_t>(i));
  }
}

// A depthwise layer, and its transpose: the sums that send each place of the input to the results that it takes part in.
void test_depthwise(std::int64_t channels, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                    std::int64_t dilation, int threads) {
  const std::int64_t images = 2, size[2] = {9, 23}, reach = dilation * (kernel - 1);
  const std::int64_t out[2] = {(size[0] + 2 * padding - reach - 1) / stride + 1,
                               (size[1] + 2 * padding - reach - 1) / stride + 1};
  const auto x = draw(images * size[0] * size[1] * channels), s = draw(images * out[0] * out[1] * channels);
  const auto weight = draw(kernel * kernel * channels), bias = draw(channels);
  std::vector<double> forward(s.size()), back(x.size());
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(s.size()); ++i) {
    const std::int64_t c = i % channels, z = i / channels % out[1], y = i / channels / out[1] % out[0];
    const std::int64_t image = i / channels / out[1] / out[0];
    for (std::int64_t tap = 0; tap < kernel * kernel; ++tap) {
      const std::int64_t row = y * stride - padding + tap / kernel * dilation;
      const std::int64_t column = z * stride - padding + tap % kernel * dilation;
      if (row >= 0 && row < size[0] && column >= 0 && column < size[1]) {
        const std::int64_t place = ((image * size[0] + row) * size[1] + column) * channels + c;
        forward[i] += double(x[place]) * weight[tap * channels + c];
        back[place] += double(s[i]) * weight[tap * channels + c];
      }
    }
  }
  const auto compare = [&](const std::vector<float>& from, const std::int64_t from_size[2], const std::int64_t to_size[2],
                           const std::vector<double>& expected, bool transposed) {
    auto result = poison(static_cast<std::int64_t>(expected.size()));
    const Epilogue epilogue = {bias.data(), false, true, -0.5f, 0.75f, nullptr, nullptr, nullptr, 0.0f};
    const DepthwiseArguments arguments = {from.data(), weight.data(), result.data(), images,
                                          {from_size[0], from_size[1]}, {to_size[0], to_size[1]}, {kernel, kernel},
                                          {stride, stride}, {padding, padding}, {dilation, dilation}, channels,
                                          transposed, epilogue};
    run<DepthwiseArguments, &Kernels::depthwise>(arguments, images * to_size[0], 1, threads);
    for (std::size_t i = 0; i < result.size(); ++i) {
      const double sum = expected[i] + bias[i % channels];
      check(std::fabs(result[i] - std::fmin(std::fmax(sum, -0.5), 0.75)) < 1e-4, "depthwise", static_cast<std::int64_t>(i));
    }
  };
  compare(x, size, out, forward, false);
  compare(s, out, size, back, true);
}

// Straight from the weight, which lies [filter, channel, tap] or [filter, tap, channel], and its transpose.
void test_convolution(std::int64_t channels, std::int64_t filters, std::int64_t kernel, std::int64_t stride,
                      std::int64_t padding, std::int64_t dilation, bool channels_last, int threads) {
  const std::int64_t images = 2, block = 9, size[2] = {7, 10}, reach = dilation * (kernel - 1), window = kernel * kernel;
  const std::int64_t out[2] = {(size[0] + 2 * padding - reach - 1) / stride + 1,
                               (size[1] + 2 * padding - reach - 1) / stride + 1};
  const std::int64_t tap_stride = channels_last ? channels : 1, channel_stride = channels_last ? 1 : window;
  const auto x = draw(images * size[0] * size[1] * channels), s = draw(images * out[0] * out[1] * filters);
  const auto weight = draw(filters * channels * window);
  const std::int64_t padded = (filters + 31) / 32 * 32;
  std::vector<float> factors(static_cast<std::size_t>(2 * padded), 1.0f);
  std::vector<double> forward(s.size()), back(x.size());
  for (std::int64_t f = 0; f < filters; ++f) {
    factors[f] = static_cast<float>(f % 3) - 1.0f;  // some negative: the positive values are those of the product
    factors[padded + f] = 0.25f;
  }
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(s.size()); ++i) {
    const std::int64_t f = i % filters, z = i / filters % out[1], y = i / filters / out[1] % out[0];
    const std::int64_t image = i / filters / out[1] / out[0];
    for (std::int64_t tap = 0; tap < window; ++tap) {
      const std::int64_t row = y * stride - padding + tap / kernel * dilation;
      const std::int64_t column = z * stride - padding + tap % kernel * dilation;
      for (std::int64_t c = 0; c < channels && row >= 0 && row < size[0] && column >= 0 && column < size[1]; ++c) {
        const double product = weight[(f * channels * window) + tap * tap_stride + c * channel_stride] * (factors[f] + factors[padded + f]);
        const double value = product * (product > 0 ? 1.25 : 0.5);
        const std::int64_t place = ((image * size[0] + row) * size[1] + column) * channels + c;
        forward[i] += x[place] * value;
        back[place] += s[i] * value;
      }
    }
  }
  const auto compare = [&](const std::vector<float>& from, const std::int64_t from_size[2], const std::int64_t to_size[2],
                           const std::vector<double>& expected, bool transposed) {
    const std::int64_t inputs = transposed ? filters : channels, outputs = transposed ? channels : filters;
    const std::int64_t filter_stride = transposed ? channel_stride : channels * window;
    const std::int64_t depth = 48, rows = window * (depth + 16) * ((inputs + depth - 1) / depth);
    auto result = poison(static_cast<std::int64_t>(expected.size()));
    auto workspace = poison(threads * (block * (rows + 32) + depth * 32));
    const auto bias = draw(outputs);
    const FilterArguments given = {weight.data(), filter_stride, transposed ? channels * window : channel_stride,
                                   {kernel * tap_stride, tap_stride}, outputs, inputs, factors.data(), transposed, true,
                                   {1.25f, 0.5f}, nullptr};
    const Epilogue epilogue = {bias.data(), false, true, -0.5f, 0.75f, nullptr, nullptr, nullptr, 0.0f};
    const ConvolutionArguments arguments = {from.data(), given, result.data(), workspace.data(), images,
                                            {from_size[0], from_size[1]}, {to_size[0], to_size[1]}, {kernel, kernel},
                                            {stride, stride}, {padding, padding}, {dilation, dilation}, inputs, outputs,
                                            transposed, block, depth, epilogue};
    run<ConvolutionArguments, &Kernels::convolution>(arguments, threads);
    for (std::size_t i = 0; i < result.size(); ++i) {
      const double sum = expected[i] + bias[i % outputs];
      check(std::fabs(result[i] - std::fmin(std::fmax(sum, -0.5), 0.75)) < 1e-3, "convolution", static_cast<std::int64_t>(i));
    }
  };
  compare(x, size, out, forward, false);
  compare(s, out, size, back, true);
}

}  // namespace

int main() {
  bind_openmp({team, [] { return member; }, [] { return members; }});
  for (int threads : {1, 2, 3}) {
    for (std::int64_t count : {0, 1, 2, 3, 10, 100}) {
      test_pieces(count, threads);
    }
    test_winograd_bfloat16({WinogradForm::kUnitStride, {5, 8}, 1}, threads);  // by the best set there is: all others' kernels are in the sets below
    test_pointwise_bfloat16(18, 40, 2, threads);
  }
  for (const char* capability : {"avx512", "avx2", "default"}) {
    limit_cpu_capability(capability);
    if (std::strcmp(cpu_capability(), capability) != 0) {
      continue;  // not built, or not of this processor: another one's kernels took its place
    }
    for (int threads : {1, 2, 3}) {
      for (std::int64_t size : {0, 1, 7, 64, 511, 513, 2050}) {
        test_ratio(size, threads);
        test_bfloat16(size, threads);
        test_pair(size, threads);
        test_select(size, threads);
        test_add_relu(size, threads);
      }
      for (std::int64_t padding : {0, 1, 2}) {
        for (WinogradForm form : {WinogradForm::kUnitStride, WinogradForm::kStrided, WinogradForm::kStridedTranspose}) {
          test_winograd({form, {5, 8}, padding}, threads);
          test_winograd({form, {4, 4}, padding}, threads);
          test_winograd_bfloat16({form, {5, 8}, padding}, threads);
        }
      }
      for (BySign by_sign : {BySign::kNone, BySign::kInput, BySign::kGiven}) {
        test_pointwise(3, 5, 1, by_sign, threads);
        test_pointwise(17, 40, 2, by_sign, threads);
        test_pointwise(300, 72, 1, by_sign, threads);
      }
      test_pointwise_bfloat16(6, 5, 1, threads);
      test_pointwise_bfloat16(600, 40, 1, threads);
      test_depthwise(5, 3, 1, 1, 1, threads);
      test_depthwise(40, 3, 2, 1, 1, threads);
      test_depthwise(33, 5, 3, 4, 2, threads);
      test_depthwise(16, 8, 1, 0, 1, threads);
      for (bool channels_last : {false, true}) {
        test_convolution(5, 40, 3, 1, 1, 1, channels_last, threads);
        test_convolution(80, 33, 3, 2, 1, 2, channels_last, threads);
        test_convolution(300, 64, 1, 2, 0, 1, channels_last, threads);
      }
      test_ratio_rows(3, 5, threads);
      test_ratio_rows(5, 515, threads);
      for (std::int64_t batch : {1, 5}) {
        test_dense(batch, 1, 1, threads);
        test_dense(batch, 37, 1030, threads);
      }
      for (bool last : {false, true}) {
        test_channel_sum(6, 2, 35, last, threads);
        test_channel_sum(1030, 1, 3, last, threads);
      }
      for (std::int64_t channels : {1, 17, 515}) {
        test_pools(channels, 2, 2, 0, threads);
        test_pools(channels, 3, 2, 1, threads);
        test_pools(channels, 3, 1, 0, threads);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
