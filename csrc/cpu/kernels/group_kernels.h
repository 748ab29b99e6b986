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
};

// Rewards of which each group's are consecutive.
struct GroupedRewards {
  const float* rewards;
  const long long* ids;  // sorted; null: groups of `group_size`
  long long rows;
  long long group_size;
  float* out;
};

// Rewards whose groups may lie anywhere: row i's group is ids[i] - base, from 0 on.
struct ScatteredRewards {
  const float* rewards;  // `stride` apart
  long long stride;
  const long long* ids;
  long long base;
};

// The sums of a group whose rewards come one by one: what most baselines need fits into half a
// cache line, and what the lengths add has a place of its own.
struct alignas(32) Rises {
  double size, shift, rise, rise_squared;
};

struct Lengths {
  double length, rise;
};

// The most groups that a vector has room for: tables of groups are multiples of it.
constexpr long long kGroupStep = 8;

// The sums of `groups` groups, a multiple of kGroupStep, in each of `parts` parts of the batch,
// [parts, groups].
struct GroupParts {
  const Rises* rises;
  const Lengths* lengths;  // null: not needed
  long long parts;
  long long groups;
};

struct GroupKernels {
  // Of at least one id.
  IdSpan (*span)(const long long* ids, long long count);
  // The advantages of all groups that begin in [begin, end); false, and not all of them, where an
  // id is less than the one before it.
  bool (*advantages)(const GroupOptions&, const GroupSummary& batch, const GroupedRewards&,
                     long long begin, long long end);
  // Adds the rewards of rows [begin, end) that are not NaN to the sums of their groups.
  void (*add)(const ScatteredRewards&, long long begin, long long end, Rises* groups);
  // The forms of groups [begin, end), multiples of kGroupStep, their parts joined in order.
  void (*forms)(const GroupOptions&, const GroupSummary& batch, const GroupParts&, long long begin,
                long long end, GroupForm* out);
  // The advantages of rows [begin, end), 0 for a NaN.
  void (*write)(const ScatteredRewards&, const GroupForm* forms, long long begin, long long end,
                float* out);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::GroupKernels rlkern_group_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::GroupKernels rlkern_group_kernels_avx2;
extern const rlkern::GroupKernels rlkern_group_kernels_avx512;
#endif
}
