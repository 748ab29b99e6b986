// Loops over group ids and over the rewards of consecutive groups. Plain C types only.
#pragma once

#include "../../common/group_advantages.h"

namespace rlkern {

// int64_t is `long` or `long long`, as the system has it; leaf files have no <cstdint> to say
// which.
RLKERN_INLINE const long long* id_words(const void* ids) {
  return static_cast<const long long*>(ids);
}

struct IdSpan {
  long long least;
  long long most;
  bool rises;  // no id is less than the one before it
};

// Rewards of which each group's are consecutive.
struct GroupedRewards {
  const float* rewards;
  const long long* ids;  // sorted; null: groups of `group_size`
  long long rows;
  long long group_size;
  float* out;
};

struct GroupKernels {
  // Of at least one id.
  IdSpan (*span)(const long long* ids, long long count);
  // The advantages of all groups that begin in [begin, end).
  void (*advantages)(const GroupOptions&, const GroupSummary& batch, const GroupedRewards&,
                     long long begin, long long end);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::GroupKernels rlkern_group_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::GroupKernels rlkern_group_kernels_avx2;
extern const rlkern::GroupKernels rlkern_group_kernels_avx512;
#endif
}
