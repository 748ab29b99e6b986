#include "isa.h"

#include <cstdlib>
#include <string>

#include "../common/checks.h"

namespace rlkern {
namespace {

bool supported(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == "portable";
}

enum class Isa { kPortable, kAvx2, kAvx512 };

Isa best() {
  if (supported("avx512")) return Isa::kAvx512;
  if (supported("avx2")) return Isa::kAvx2;
  return Isa::kPortable;
}

Isa chosen_isa() {
  static const Isa automatic = best();
  // Read at every call, so that one process can compare the builds.
  const char* chosen = std::getenv("RLKERN_CPU_ISA");
  if (chosen == nullptr || *chosen == '\0' || std::string(chosen) == "auto") return automatic;
  const std::string isa = chosen;
  check(isa == "avx512" || isa == "avx2" || isa == "portable",
        "RLKERN_CPU_ISA: expected auto, avx512, avx2 or portable, got '", isa, "'");
  check(supported(isa), "RLKERN_CPU_ISA: this machine has no ", isa);
  if (isa == "avx512") return Isa::kAvx512;
  return isa == "avx2" ? Isa::kAvx2 : Isa::kPortable;
}

}  // namespace

#if defined(__x86_64__)
#define RLKERN_PICK(kernels)     \
  switch (chosen_isa()) {        \
    case Isa::kAvx512:           \
      return kernels##_avx512;   \
    case Isa::kAvx2:             \
      return kernels##_avx2;     \
    default:                     \
      return kernels##_portable; \
  }
#else
#define RLKERN_PICK(kernels) \
  chosen_isa();              \
  return kernels##_portable;
#endif

const RowKernels& row_kernels() { RLKERN_PICK(rlkern_row_kernels) }

const TokenKernels& token_kernels() { RLKERN_PICK(rlkern_token_kernels) }

const ReturnKernels& return_kernels() { RLKERN_PICK(rlkern_return_kernels) }

const SumKernels& sum_kernels() { RLKERN_PICK(rlkern_sum_kernels) }

const ValueKernels& value_kernels() { RLKERN_PICK(rlkern_value_kernels) }

const GroupKernels& group_kernels() { RLKERN_PICK(rlkern_group_kernels) }

const WhitenKernels& whiten_kernels() { RLKERN_PICK(rlkern_whiten_kernels) }

const DivergenceKernels& divergence_kernels() { RLKERN_PICK(rlkern_divergence_kernels) }

}  // namespace rlkern

#define RLKERN_EXPORT extern "C" __attribute__((visibility("default")))

// For rlkern.info: the instruction set in use, or the error's text.
RLKERN_EXPORT const char* rlkern_cpu_isa() {
  static thread_local std::string text;
  try {
    text = rlkern::row_kernels().name;
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

RLKERN_EXPORT int rlkern_cpu_supports(const char* isa) { return rlkern::supported(isa); }
