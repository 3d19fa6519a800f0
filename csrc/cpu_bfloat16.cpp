// The kernels that AVX512-BF16 makes faster, beside those of AVX-512.

#include "pointwise_cpu.h"
#include "winograd_cpu.h"

namespace lrpfast {

void winograd_avx512_bf16(const WinogradArguments<std::uint16_t>& arguments, Pieces& pieces) {
  winograd(arguments, pieces);
}

void pointwise_avx512_bf16(const PointwiseArguments<std::uint16_t>& arguments, Pieces& pieces) {
  pointwise(arguments, pieces);
}

}  // namespace lrpfast
