// lrpfast._C: the one module that exposes the kernels. Pointers arrive as integers; lrpfast/ops/native.py has checked what
// they point to. The interpreter is let go while a kernel runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu_capability.h"
#include "ops.h"
#include "parallel.h"
#if LRPFAST_CUDA_BUILT
#include "dense_cuda.h"
#include "ratio_cuda.h"
#endif

namespace py = pybind11;

namespace {

using lrpfast::AddReluArguments;
using lrpfast::ChannelSumArguments;
using lrpfast::ConvolutionArguments;
using lrpfast::DenseArguments;
using lrpfast::DenseDgradArguments;
using lrpfast::DepthwiseArguments;
using lrpfast::DType;
using lrpfast::Epilogue;
using lrpfast::FilterArguments;
using lrpfast::MaxPoolArguments;
using lrpfast::Operand;
using lrpfast::PairArguments;
using lrpfast::PointwiseArguments;
using lrpfast::PoolDgradArguments;
using lrpfast::RatioArguments;
using lrpfast::SelectArguments;
using lrpfast::WinogradArguments;
using lrpfast::Window;

// Below this many elements read a thread, waking another costs more than it saves.
constexpr std::int64_t kGrain = 16384;
// Elements that threads may be parted at: those of some cache lines.
constexpr std::int64_t kUnit = 64;

template <typename Function>
Function as_function(std::uintptr_t address) {
  return reinterpret_cast<Function>(address);
}

const float* floats(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

Operand operand(std::uintptr_t data, int dtype, bool broadcast) {
  return {reinterpret_cast<const void*>(data), static_cast<DType>(dtype), broadcast};
}

RatioArguments ratio_arguments(std::uintptr_t carrier, int carrier_dtype, bool carrier_broadcast,
                               std::uintptr_t message_a, std::uintptr_t message_b, int message_dtype,
                               std::uintptr_t denominator, int denominator_dtype, bool denominator_broadcast,
                               std::uintptr_t result, std::int64_t row_size, double eps) {
  return {operand(carrier, carrier_dtype, carrier_broadcast),
          operand(message_a, message_dtype, false),
          operand(message_b, message_dtype, false),
          operand(denominator, denominator_dtype, denominator_broadcast),
          reinterpret_cast<void*>(result),
          static_cast<DType>(message_dtype),
          row_size,
          static_cast<float>(eps)};
}

void ratio(std::uintptr_t carrier, int carrier_dtype, bool carrier_broadcast, std::uintptr_t message_a,
           std::uintptr_t message_b, int message_dtype, std::uintptr_t denominator, int denominator_dtype,
           bool denominator_broadcast, std::uintptr_t result, std::int64_t rows, std::int64_t row_size, double eps,
           int threads) {
  const RatioArguments arguments =
      ratio_arguments(carrier, carrier_dtype, carrier_broadcast, message_a, message_b, message_dtype, denominator,
                      denominator_dtype, denominator_broadcast, result, row_size, eps);
  lrpfast::parallel_for(
      rows * row_size, kGrain, kUnit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().ratio(*static_cast<const RatioArguments*>(context), begin, end);
      },
      &arguments);
}

#if LRPFAST_CUDA_BUILT
// The same, device pointers and a cudaStream_t in place of host pointers and threads. None, or what went wrong.
const char* cuda_ratio(std::uintptr_t carrier, int carrier_dtype, bool carrier_broadcast, std::uintptr_t message_a,
                       std::uintptr_t message_b, int message_dtype, std::uintptr_t denominator, int denominator_dtype,
                       bool denominator_broadcast, std::uintptr_t result, std::int64_t rows, std::int64_t row_size,
                       double eps, std::uintptr_t stream) {
  const RatioArguments arguments =
      ratio_arguments(carrier, carrier_dtype, carrier_broadcast, message_a, message_b, message_dtype, denominator,
                      denominator_dtype, denominator_broadcast, result, row_size, eps);
  return lrpfast::launch_ratio(arguments, rows * row_size, reinterpret_cast<void*>(stream));
}

const char* cuda_dense_pair(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t positive_bias,
                            std::uintptr_t z, std::uintptr_t z_plus, std::int64_t outputs, std::int64_t inputs, int dtype,
                            std::uintptr_t stream) {
  const lrpfast::DensePairArguments arguments = {
      reinterpret_cast<const void*>(x),
      reinterpret_cast<const void*>(weight),
      reinterpret_cast<const void*>(bias),
      reinterpret_cast<const void*>(positive_bias),
      reinterpret_cast<void*>(z),
      reinterpret_cast<void*>(z_plus),
      outputs,
      inputs,
      static_cast<lrpfast::CudaDType>(dtype)};
  return lrpfast::launch_dense_pair(arguments, reinterpret_cast<void*>(stream));
}

const char* cuda_dense_ratio_dgrad(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t carrier,
                                   std::uintptr_t message, std::uintptr_t partial, std::uintptr_t result,
                                   std::int64_t outputs, std::int64_t inputs, int blocks, int dtype, double eps,
                                   std::uintptr_t stream) {
  const lrpfast::CudaDenseArguments arguments = {
      reinterpret_cast<const void*>(x),
      reinterpret_cast<const void*>(weight),
      reinterpret_cast<const void*>(bias),
      reinterpret_cast<const void*>(carrier),
      reinterpret_cast<const void*>(message),
      reinterpret_cast<float*>(partial),
      reinterpret_cast<void*>(result),
      outputs,
      inputs,
      blocks,
      static_cast<lrpfast::CudaDType>(dtype),
      static_cast<float>(eps)};
  return lrpfast::launch_dense_ratio_dgrad(arguments, reinterpret_cast<void*>(stream));
}
#endif

void pair(std::uintptr_t carrier, int carrier_dtype, std::uintptr_t message, int message_dtype, std::uintptr_t first,
          int first_dtype, std::uintptr_t second, int second_dtype, std::uintptr_t upper, std::uintptr_t lower,
          std::int64_t size, bool gamma_rule, double gamma_or_alpha, double beta, double eps, int threads) {
  const PairArguments arguments = {operand(carrier, carrier_dtype, false),
                                   operand(message, message_dtype, false),
                                   operand(first, first_dtype, false),
                                   operand(second, second_dtype, false),
                                   {reinterpret_cast<void*>(upper), reinterpret_cast<void*>(lower)},
                                   static_cast<DType>(message_dtype),
                                   gamma_rule,
                                   static_cast<float>(gamma_or_alpha),
                                   static_cast<float>(beta),
                                   static_cast<float>(eps)};
  lrpfast::parallel_for(
      size, kGrain, kUnit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().pair(*static_cast<const PairArguments*>(context), begin, end);
      },
      &arguments);
}

void select_by_sign(std::uintptr_t x, int x_dtype, std::uintptr_t upper, std::uintptr_t lower, int dtype,
                    std::uintptr_t result, std::int64_t size, int threads) {
  const SelectArguments arguments = {operand(x, x_dtype, false), operand(upper, dtype, false),
                                     operand(lower, dtype, false), reinterpret_cast<void*>(result)};
  lrpfast::parallel_for(
      size, kGrain, kUnit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().select_by_sign(*static_cast<const SelectArguments*>(context), begin, end);
      },
      &arguments);
}

void add_relu(std::uintptr_t a, std::uintptr_t b, int dtype, std::uintptr_t result, std::int64_t size, int threads) {
  const AddReluArguments arguments = {operand(a, dtype, false), operand(b, dtype, false),
                                      reinterpret_cast<void*>(result)};
  lrpfast::parallel_for(
      size, kGrain, kUnit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().add_relu(*static_cast<const AddReluArguments*>(context), begin, end);
      },
      &arguments);
}

// Rows (or columns) of a size that are worth a thread.
std::int64_t row_grain(std::int64_t row_size) { return row_size < kGrain ? kGrain / (row_size > 0 ? row_size : 1) : 1; }

using Pair = std::array<std::int64_t, 2>;
using Scales = std::array<double, 2>;

void dense(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t scaled_bias,
           std::uintptr_t result, std::uintptr_t scaled_result, std::int64_t batch, std::int64_t outputs,
           std::int64_t inputs, Scales scales, int threads) {
  const DenseArguments arguments = {floats(x),
                                    floats(weight),
                                    floats(bias),
                                    floats(scaled_bias),
                                    reinterpret_cast<float*>(result),
                                    reinterpret_cast<float*>(scaled_result),
                                    batch,
                                    outputs,
                                    inputs,
                                    {static_cast<float>(scales[0]), static_cast<float>(scales[1])}};
  lrpfast::parallel_for(
      outputs, row_grain(batch * inputs), 16, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().dense(*static_cast<const DenseArguments*>(context), begin, end);
      },
      &arguments);
}

void dense_dgrad(std::uintptr_t s, std::uintptr_t weight, std::uintptr_t result, std::int64_t batch,
                 std::int64_t outputs, std::int64_t inputs, bool scaled, Scales scales, int threads) {
  const DenseDgradArguments arguments = {floats(s),
                                         floats(weight),
                                         reinterpret_cast<float*>(result),
                                         batch,
                                         outputs,
                                         inputs,
                                         scaled,
                                         {static_cast<float>(scales[0]), static_cast<float>(scales[1])}};
  lrpfast::parallel_for(
      inputs, row_grain(batch * outputs), kUnit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().dense_dgrad(*static_cast<const DenseDgradArguments*>(context), begin, end);
      },
      &arguments, 1);  // memory gives longer pieces of rows sooner
}

void channel_sum(std::uintptr_t carrier, int carrier_dtype, bool carrier_broadcast, std::uintptr_t message,
                 int message_dtype, std::uintptr_t result, std::int64_t rows, std::int64_t channels,
                 std::int64_t groups, std::int64_t positions, bool channels_last, int threads) {
  const ChannelSumArguments arguments = {operand(carrier, carrier_dtype, carrier_broadcast),
                                         operand(message, message_dtype, false),
                                         reinterpret_cast<void*>(result),
                                         channels,
                                         groups,
                                         positions,
                                         channels_last};
  lrpfast::parallel_for(
      rows * groups * positions, row_grain(channels / groups), kUnit, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().channel_sum(*static_cast<const ChannelSumArguments*>(context), begin, end);
      },
      &arguments);
}

Window window(Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation, std::int64_t channels) {
  return {{size[0], size[1]},       {out_size[0], out_size[1]}, {kernel[0], kernel[1]}, {stride[0], stride[1]},
          {padding[0], padding[1]}, {dilation[0], dilation[1]}, channels};
}

void max_pool(std::uintptr_t input, int dtype, std::uintptr_t result, std::uintptr_t winners, std::int64_t images,
              Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation, std::int64_t channels,
              int threads) {
  const MaxPoolArguments arguments = {operand(input, dtype, false), reinterpret_cast<void*>(result),
                                      reinterpret_cast<std::uint8_t*>(winners),
                                      window(size, out_size, kernel, stride, padding, dilation, channels)};
  lrpfast::parallel_for(
      images * out_size[0], row_grain(out_size[1] * channels), 1, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().max_pool(*static_cast<const MaxPoolArguments*>(context), begin, end);
      },
      &arguments);
}

void pool_dgrad(std::uintptr_t message, int dtype, std::uintptr_t winners, std::uintptr_t result, std::int64_t images,
                Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation, std::int64_t channels,
                std::int64_t divisor, bool count_padding, int threads) {
  const PoolDgradArguments arguments = {operand(message, dtype, false),
                                        reinterpret_cast<const std::uint8_t*>(winners),
                                        reinterpret_cast<void*>(result),
                                        window(size, out_size, kernel, stride, padding, dilation, channels),
                                        divisor,
                                        count_padding};
  lrpfast::parallel_for(
      images * size[0], row_grain(size[1] * channels), 1, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().pool_dgrad(*static_cast<const PoolDgradArguments*>(context), begin, end);
      },
      &arguments);
}

template <typename Arguments, void (*lrpfast::Kernels::*kKernel)(const Arguments&, lrpfast::Pieces&)>
void run_pieces(const Arguments& arguments, int threads) {
  lrpfast::parallel_pieces(
      threads,
      [](const void* context, lrpfast::Pieces& pieces) {
        (lrpfast::kernels().*kKernel)(*static_cast<const Arguments*>(context), pieces);
      },
      &arguments);
}

// bias, add, clamp, low, high, carrier, message_a, message_b, eps
using EpilogueTuple = std::tuple<std::uintptr_t, bool, bool, double, double, std::uintptr_t, std::uintptr_t,
                                 std::uintptr_t, double>;

template <typename T = float>
lrpfast::EpilogueOf<T> epilogue(const EpilogueTuple& given) {
  const auto& [bias, add, clamp, low, high, carrier, message_a, message_b, eps] = given;
  return {floats(bias),
          add,
          clamp,
          static_cast<float>(low),
          static_cast<float>(high),
          reinterpret_cast<const T*>(carrier),
          reinterpret_cast<const T*>(message_a),
          reinterpret_cast<const T*>(message_b),
          static_cast<float>(eps)};
}

// given, filter_stride, channel_stride, tap_strides, filters, channels, factors, factor_of_channel, scales
using FilterTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, Pair, std::int64_t, std::int64_t,
                               std::uintptr_t, bool, Scales>;

FilterArguments filters_of(const FilterTuple& tuple, std::uintptr_t result, bool strided) {
  const auto& [given, filter_stride, channel_stride, tap_strides, filters, channels, factors, of_channel, scales] = tuple;
  return {floats(given),
          filter_stride,
          channel_stride,
          {tap_strides[0], tap_strides[1]},
          filters,
          channels,
          floats(factors),
          of_channel,
          scales != Scales{1.0, 1.0},
          {static_cast<float>(scales[0]), static_cast<float>(scales[1])},
          reinterpret_cast<float*>(result),
          strided};
}

template <typename T, void (*lrpfast::Kernels::*kKernel)(const WinogradArguments<T>&, lrpfast::Pieces&)>
void winograd(std::uintptr_t input, std::uintptr_t weight, const std::optional<FilterTuple>& given, std::uintptr_t result,
              std::uintptr_t workspace, std::int64_t images, Pair size, Pair out_size, Pair padding, std::int64_t channels,
              std::int64_t filters, std::int64_t block, std::int64_t chunk, int form, EpilogueTuple then, int threads) {
  run_pieces<WinogradArguments<T>, kKernel>(
      {reinterpret_cast<const T*>(input),
       reinterpret_cast<const T*>(weight),
       given ? filters_of(*given, 0, form != static_cast<int>(lrpfast::WinogradForm::kUnitStride)) : FilterArguments(),
       reinterpret_cast<T*>(result),
       reinterpret_cast<float*>(workspace),
       images,
       {size[0], size[1]},
       {out_size[0], out_size[1]},
       {padding[0], padding[1]},
       channels,
       filters,
       block,
       chunk,
       static_cast<lrpfast::WinogradForm>(form),
       epilogue<T>(then)},
      threads);
}

void winograd_filters(FilterTuple given, std::uintptr_t result, bool strided, int threads) {
  const FilterArguments arguments = filters_of(given, result, strided);
  lrpfast::parallel_for(
      arguments.filters / 32, row_grain(32 * arguments.channels), 1, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().winograd_filters(*static_cast<const FilterArguments*>(context), begin, end);
      },
      &arguments);
}

void convolution(std::uintptr_t input, FilterTuple weight, std::uintptr_t result, std::uintptr_t workspace,
                 std::int64_t images, Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation,
                 bool transposed, std::int64_t block, std::int64_t depth, EpilogueTuple then, int threads) {
  const FilterArguments filters = filters_of(weight, 0, false);
  run_pieces<ConvolutionArguments, &lrpfast::Kernels::convolution>(
      {floats(input),
       filters,
       reinterpret_cast<float*>(result),
       reinterpret_cast<float*>(workspace),
       images,
       {size[0], size[1]},
       {out_size[0], out_size[1]},
       {kernel[0], kernel[1]},
       {stride[0], stride[1]},
       {padding[0], padding[1]},
       {dilation[0], dilation[1]},
       filters.channels,
       filters.filters,
       transposed,
       block,
       depth,
       epilogue(then)},
      threads);
}

template <typename T, void (*lrpfast::Kernels::*kKernel)(const PointwiseArguments<T>&, lrpfast::Pieces&)>
void pointwise(std::uintptr_t input, std::uintptr_t weight, bool by_sign, std::uintptr_t sign, std::uintptr_t result,
               std::uintptr_t workspace, std::int64_t images, Pair size, Pair out_size, Pair stride,
               std::int64_t channels, std::int64_t filters, std::int64_t block, EpilogueTuple then, int threads) {
  using lrpfast::BySign;
  run_pieces<PointwiseArguments<T>, kKernel>(
      {reinterpret_cast<const T*>(input),
       reinterpret_cast<const T*>(weight),
       sign ? BySign::kGiven : by_sign ? BySign::kInput : BySign::kNone,
       reinterpret_cast<const T*>(sign),
       reinterpret_cast<T*>(result),
       reinterpret_cast<float*>(workspace),
       images,
       {size[0], size[1]},
       {out_size[0], out_size[1]},
       {stride[0], stride[1]},
       channels,
       filters,
       block,
       epilogue<T>(then)},
      threads);
}

void depthwise(std::uintptr_t input, std::uintptr_t weight, std::uintptr_t result, std::int64_t images, Pair size,
               Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation, std::int64_t channels,
               bool transposed, EpilogueTuple then, int threads) {
  const DepthwiseArguments arguments = {floats(input),
                                        floats(weight),
                                        reinterpret_cast<float*>(result),
                                        images,
                                        {size[0], size[1]},
                                        {out_size[0], out_size[1]},
                                        {kernel[0], kernel[1]},
                                        {stride[0], stride[1]},
                                        {padding[0], padding[1]},
                                        {dilation[0], dilation[1]},
                                        channels,
                                        transposed,
                                        epilogue(then)};
  lrpfast::parallel_for(
      images * out_size[0], row_grain(out_size[1] * channels), 1, threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        lrpfast::kernels().depthwise(*static_cast<const DepthwiseArguments*>(context), begin, end);
      },
      &arguments);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["version"] = LRPFAST_VERSION;
  info["cuda"] = LRPFAST_CUDA_STATUS;
  info["cuda_built"] = static_cast<bool>(LRPFAST_CUDA_BUILT);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lrpfast. Takes raw pointers: call it through lrpfast.ops.";
  m.def("ratio", &ratio, py::call_guard<py::gil_scoped_release>());
  m.def("pair", &pair, py::call_guard<py::gil_scoped_release>());
  m.def("select_by_sign", &select_by_sign, py::call_guard<py::gil_scoped_release>());
  m.def("add_relu", &add_relu, py::call_guard<py::gil_scoped_release>());
  m.def("dense", &dense, py::call_guard<py::gil_scoped_release>());
  m.def("dense_dgrad", &dense_dgrad, py::call_guard<py::gil_scoped_release>());
  m.def("channel_sum", &channel_sum, py::call_guard<py::gil_scoped_release>());
  m.def("max_pool", &max_pool, py::call_guard<py::gil_scoped_release>());
  m.def("pool_dgrad", &pool_dgrad, py::call_guard<py::gil_scoped_release>());
  m.def("depthwise", &depthwise, py::call_guard<py::gil_scoped_release>());
  m.def("pointwise", &pointwise<float, &lrpfast::Kernels::pointwise>, py::call_guard<py::gil_scoped_release>());
  m.def("pointwise_bfloat16", &pointwise<std::uint16_t, &lrpfast::Kernels::pointwise_bfloat16>,
        py::call_guard<py::gil_scoped_release>());
  m.def("winograd", &winograd<float, &lrpfast::Kernels::winograd>, py::call_guard<py::gil_scoped_release>());
  m.def("winograd_bfloat16", &winograd<std::uint16_t, &lrpfast::Kernels::winograd_bfloat16>,
        py::call_guard<py::gil_scoped_release>());
  m.def("winograd_filters", &winograd_filters, py::call_guard<py::gil_scoped_release>());
  m.def("convolution", &convolution, py::call_guard<py::gil_scoped_release>());
#if LRPFAST_CUDA_BUILT
  m.def("cuda_ratio", &cuda_ratio, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_dense_pair", &cuda_dense_pair, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_dense_ratio_dgrad", &cuda_dense_ratio_dgrad, py::call_guard<py::gil_scoped_release>());
#endif
  m.def("build_info", &build_info, "Compiler, version, and whether CUDA was built in, or why not.");
  m.def("cpu_capability", &lrpfast::cpu_capability, "The instruction set in use: default, avx2, avx512 or avx512_bf16.");
  m.def("limit_cpu_capability", &lrpfast::limit_cpu_capability, py::arg("limit").none(true),
        "Use no instruction set above this one. False if there is none of that name.");
  m.def(
      "bind_openmp",
      [](std::uintptr_t parallel, std::uintptr_t thread_num, std::uintptr_t num_threads) {
        lrpfast::bind_openmp({as_function<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel),
                              as_function<int (*)()>(thread_num), as_function<int (*)()>(num_threads)});
      },
      "Hand in the addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads of torch's OpenMP runtime.");
  m.def("openmp_bound", &lrpfast::openmp_bound);
}
