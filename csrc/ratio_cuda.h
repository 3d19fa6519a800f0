#pragma once

#include "ops.h"

namespace lrpfast {

// Enqueues the ratio of `size` elements on a CUDA stream of the current device. Pointers are device pointers. Returns
// null, or what went wrong in launching.
const char* launch_ratio(const RatioArguments& arguments, std::int64_t size, void* stream);

}  // namespace lrpfast
