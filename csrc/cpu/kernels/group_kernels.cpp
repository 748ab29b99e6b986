// Loops over group ids and over the rewards of consecutive groups, compiled once per instruction
// set (see CMakeLists.txt).

#include "group_kernels.h"

#include "leaf.h"
#include "simd_double.h"

namespace rlkern {
namespace {

IdSpan span(const long long* ids, long long count) {
  const auto load = [ids](long long i) __attribute__((always_inline)) {
    vlong v;
    __builtin_memcpy(&v, ids + i, sizeof v);
    return v;
  };
  IdSpan s = {ids[0], ids[0], true};
  vlong least = vlong{} + ids[0], most = least, falls = {};
  long long i = 1;
  for (; i + kDoubles <= count; i += kDoubles) {
    const vlong v = load(i);
    falls |= v < load(i - 1);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  for (int lane = 0; lane < kDoubles; ++lane) {
    s.rises &= falls[lane] == 0;
    s.least = least[lane] < s.least ? least[lane] : s.least;
    s.most = most[lane] > s.most ? most[lane] : s.most;
  }
  for (; i < count; ++i) {
    s.rises &= ids[i] >= ids[i - 1];
    s.least = ids[i] < s.least ? ids[i] : s.least;
    s.most = ids[i] > s.most ? ids[i] : s.most;
  }
  return s;
}

// Two vectors side by side: with the widest ones most groups fit into one block.
constexpr int kBlock = 2 * kDoubles;

// The sums of a group, or with rise NaN where a reward is. `limit`: how many rewards may be read.
GroupSums sums_of_numbers(const float* x, long long size, long long limit) {
  const double shift = x[0];
  vdouble rise = {}, squared = {};
  long long i = 0;
  for (; i < size && i + kBlock <= limit; i += kBlock) {
    for (int half = 0; half < kBlock; half += kDoubles) {
      const vdouble r =
          lanes_under(size - i - half) ? load_widened(x + i + half) - shift : vdouble{};
      rise += r;
      squared += r * r;
    }
  }
  GroupSums s = {(double)size, shift, lane_sum(rise), lane_sum(squared), 0, 0};
  for (; i < size; ++i) {
    const double r = x[i] - shift;
    s.rise += r;
    s.rise_squared += r * r;
  }
  return s;
}

GroupSums sums_without_nan(const float* x, long long size) {
  long long first = 0;
  while (first < size && x[first] != x[first]) ++first;
  GroupSums s = {0, first < size ? x[first] : 0.0, 0, 0, 0, 0};
  for (long long i = first; i < size; ++i) {
    if (x[i] != x[i]) continue;
    const double rise = x[i] - s.shift;
    s.size += 1;
    s.rise += rise;
    s.rise_squared += rise * rise;
  }
  return s;
}

// `limit`: how many values may be written, of which those behind the group are written again.
void write(const GroupForm& form, const float* x, long long size, long long limit, float* out) {
  const vdouble zero = {};
  long long i = 0;
  for (; i < size && i + kBlock <= limit; i += kBlock) {
    for (int half = 0; half < kBlock; half += kDoubles) {
      const vdouble v = load_widened(x + i + half);
      const vdouble a = form.factor == 0 ? zero : (v - form.centre) * form.factor;
      store_narrowed(out + i + half, v == v ? a : zero);
    }
  }
  for (; i < size; ++i) out[i] = x[i] == x[i] ? (float)form.advantage(x[i]) : 0;
}

struct Groups {
  const GroupedRewards& of;

  // Whether a group begins at a row that is not the first.
  bool begins(long long at) const {
    return of.ids == nullptr ? at % of.group_size == 0 : of.ids[at] != of.ids[at - 1];
  }
  // The first group from `at` on.
  long long first(long long at) const {
    while (0 < at && at < of.rows && !begins(at)) ++at;
    return at;
  }
  // The ends of some of the groups from `at` to `stop`, both ends of groups. Without a branch that
  // depends on where they are, which would be guessed wrong once a group.
  int ends(long long at, long long stop, long long* found, int most) const {
    int count = 0;
    long long i = at + 1;
    if (of.ids == nullptr) {
      for (i = at + of.group_size; i <= stop && count < most; i += of.group_size) {
        found[count++] = i;
      }
      return count;
    }
    for (; i < stop && i < at + most; ++i) {
      found[count] = i;
      count += of.ids[i] != of.ids[i - 1];
    }
    if (count > 0 && i < stop) return count;
    while (i < stop && of.ids[i] == of.ids[i - 1]) ++i;
    found[count++] = i;
    return count;
  }
};

void advantages(const GroupOptions& o, const GroupSummary& batch, const GroupedRewards& g,
                long long begin, long long end) {
  const Groups groups = {g};
  const long long stop = groups.first(end);
  constexpr int kMost = 512;
  long long ends[kMost];
  for (long long at = groups.first(begin); at < stop;) {
    const int count = groups.ends(at, stop, ends, kMost);
    for (int i = 0; i < count; ++i) {
      const long long size = ends[i] - at;
      GroupSums sums = sums_of_numbers(g.rewards + at, size, g.rows - at);
      if (sums.rise != sums.rise) sums = sums_without_nan(g.rewards + at, size);
      const GroupForm form = group_form(o, group_summary(o, sums), batch);
      write(form, g.rewards + at, size, stop - at, g.out + at);
      at = ends[i];
    }
  }
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::GroupKernels RLKERN_LEAF(rlkern_group_kernels) = {
    rlkern::span,
    rlkern::advantages,
};
