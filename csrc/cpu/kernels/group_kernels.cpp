// Loops over group ids and over the rewards of consecutive groups, compiled once per instruction
// set (see CMakeLists.txt).

#include "group_kernels.h"

#include "wide.h"

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
  for (; i + kWide <= count; i += kWide) {
    const vlong v = load(i);
    falls |= v < load(i - 1);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  for (int lane = 0; lane < kWide; ++lane) {
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

GroupSums sums_of(const float* x, long long size) {
  long long first = 0;
  while (first < size && x[first] != x[first]) ++first;
  GroupSums s = {0, first < size ? x[first] : 0.0, 0, 0, 0, 0};
  for (long long i = first; i < size; ++i) {
    const double rise = x[i] == x[i] ? (double)x[i] - s.shift : 0;
    s.size += x[i] == x[i];
    s.rise += rise;
    s.rise_squared += rise * rise;
  }
  return s;
}

void advantages(const GroupOptions& o, const GroupSummary& batch, const GroupedRewards& g,
                long long begin, long long end) {
  long long at = begin;
  if (g.ids == nullptr) {
    at = (begin + g.group_size - 1) / g.group_size * g.group_size;
  } else if (begin > 0) {
    while (at < end && g.ids[at] == g.ids[at - 1]) ++at;
  }
  while (at < end) {
    long long next = at + 1;
    if (g.ids == nullptr) {
      next = at + g.group_size;
    } else {
      while (next < g.rows && g.ids[next] == g.ids[at]) ++next;
    }
    const float* x = g.rewards + at;
    float* out = g.out + at;
    const GroupForm form = group_form(o, group_summary(o, sums_of(x, next - at)), batch);
    for (long long i = 0; i < next - at; ++i) {
      out[i] = x[i] == x[i] ? (float)form.advantage(x[i]) : 0;
    }
    at = next;
  }
}

}  // namespace
}  // namespace rlkern

#define RLKERN_JOIN_(a, b) a##b
#define RLKERN_JOIN(a, b) RLKERN_JOIN_(a, b)

extern "C" const rlkern::GroupKernels RLKERN_JOIN(rlkern_group_kernels_, RLKERN_ISA) = {
    rlkern::span,
    rlkern::advantages,
};
