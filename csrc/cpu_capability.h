// Which instruction set's kernels run.
#pragma once

#include "ops.h"

namespace lrpfast {

// Chooses the best set that this machine has and that is not above `limit` ("default", "avx2", "avx512", "avx512_bf16"; null:
// no limit). False, and nothing changed, if there is no set of that name.
bool limit_cpu_capability(const char* limit);
const char* cpu_capability();
const Kernels& kernels();

}  // namespace lrpfast
