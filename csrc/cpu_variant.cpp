// The kernels of one instruction set. CMake compiles this file once a set, each time with that set's flags and
// LRPFAST_VARIANT naming the table.

#include "channel_sum_cpu.h"
#include "convolution_cpu.h"
#include "dense_cpu.h"
#include "depthwise_cpu.h"
#include "elementwise_cpu.h"
#include "filters_cpu.h"
#include "pair_cpu.h"
#include "pointwise_cpu.h"
#include "pool_cpu.h"
#include "ratio_cpu.h"
#include "winograd_cpu.h"

namespace lrpfast {

const Kernels LRPFAST_VARIANT = {ratio,
                                 pair,
                                 select_by_sign,
                                 add_relu,
                                 dense,
                                 dense_dgrad,
                                 channel_sum,
                                 max_pool,
                                 pool_dgrad,
                                 winograd<float>,
                                 winograd<std::uint16_t>,
                                 winograd_filters,
                                 pointwise<float>,
                                 pointwise<std::uint16_t>,
                                 convolution,
                                 depthwise};

}  // namespace lrpfast
