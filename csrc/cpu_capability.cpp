#include "cpu_capability.h"

#include <cstring>

namespace lrpfast {
namespace {

struct Variant {
  const char* name;
  const Kernels* kernels;  // null where this build has none
  bool (*supported)();
};

#if defined(LRPFAST_X86_VARIANTS)
const Kernels* const avx2_kernels = &kernels_avx2;
const Kernels* const avx512_kernels = &kernels_avx512;
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
const Kernels* const avx2_kernels = nullptr;
const Kernels* const avx512_kernels = nullptr;
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif
#if defined(LRPFAST_AVX512_BF16)
Kernels with_bfloat16(Kernels kernels) {
  kernels.winograd_bfloat16 = winograd_avx512_bf16;
  kernels.pointwise_bfloat16 = pointwise_avx512_bf16;
  return kernels;
}
const Kernels with_bfloat16_kernels = with_bfloat16(kernels_avx512);
const Kernels* const avx512_bf16_kernels = &with_bfloat16_kernels;
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
const Kernels* const avx512_bf16_kernels = nullptr;
bool has_avx512_bf16() { return false; }
#endif
bool always() { return true; }

const Variant variants[] = {  // best first
    {"avx512_bf16", avx512_bf16_kernels, has_avx512_bf16},
    {"avx512", avx512_kernels, has_avx512},
    {"avx2", avx2_kernels, has_avx2},
    {"default", &kernels_default, always},
};

const Variant* best(const char* limit) {
  bool allowed = limit == nullptr;
  const Variant* found = nullptr;
  for (const Variant& variant : variants) {
    allowed = allowed || std::strcmp(limit, variant.name) == 0;
    if (allowed && found == nullptr && variant.supported()) {
      found = &variant;
    }
  }
  return found;
}

const Variant* chosen = best(nullptr);

}  // namespace

bool limit_cpu_capability(const char* limit) {
  const Variant* found = best(limit);
  if (found == nullptr) {
    return false;
  }
  chosen = found;
  return true;
}

const char* cpu_capability() { return chosen->name; }

const Kernels& kernels() { return *chosen->kernels; }

}  // namespace lrpfast
