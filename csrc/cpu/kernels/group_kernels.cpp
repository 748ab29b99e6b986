// Loops over group ids and over the rewards of consecutive groups, compiled once per instruction
// set (see CMakeLists.txt).

// clang-format off: the formulas find the vectors' square root by its declaration before them.
#include "simd_double.h"
#include "group_kernels.h"
// clang-format on
#include "leaf.h"

namespace rlkern {
namespace {

RLKERN_INLINE vlong load_ids(const long long* p) {
  vlong v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

IdSpan span(const long long* ids, long long count) {
  IdSpan s = {ids[0], ids[0]};
  vlong least = vlong{} + ids[0], most = least;
  long long i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    const vlong v = load_ids(ids + i);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  for (int lane = 0; lane < kDoubles; ++lane) {
    s.least = least[lane] < s.least ? least[lane] : s.least;
    s.most = most[lane] > s.most ? most[lane] : s.most;
  }
  for (; i < count; ++i) {
    s.least = ids[i] < s.least ? ids[i] : s.least;
    s.most = ids[i] > s.most ? ids[i] : s.most;
  }
  return s;
}

// Two vectors side by side: with the widest ones most groups fit into one block.
constexpr int kBlock = 2 * kDoubles;

// Sums of groups side by side, for their forms to be made a vector at a time.
constexpr int kMost = 256;
struct Sums {
  double size[kMost], shift[kMost], rise[kMost], rise_squared[kMost];

  void set(int i, double n, double at, double sum, double squared) {
    size[i] = n;
    shift[i] = at;
    rise[i] = sum;
    rise_squared[i] = squared;
  }
};

void add_without_nan(const float* x, long long size, Sums* sums, int at) {
  GroupSums s = {};
  for (long long i = 0; i < size; ++i) add_reward(&s, x[i]);
  sums->set(at, s.size, s.shift, s.rise, s.rise_squared);
}

// `limit`: how many rewards may be read.
RLKERN_INLINE void add_group(const float* x, long long size, long long limit, Sums* sums, int at) {
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
  double sum, square;
  lane_sums(rise, squared, &sum, &square);
  for (; i < size; ++i) {
    const double r = x[i] - shift;
    sum += r;
    square += r * r;
  }
  if (sum != sum) return add_without_nan(x, size, sums, at);  // of a NaN or of infinities
  sums->set(at, (double)size, shift, sum, square);
}

RLKERN_INLINE vdouble load_doubles(const double* p) {
  vdouble v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

struct Forms {
  double centre[kMost], factor[kMost];
};

void forms_of(const GroupOptions& o, const GroupSummary& batch, const Sums& s, int count,
              Forms* out) {
  for (int i = 0; i < count; i += kDoubles) {
    const GroupSumsOf<vdouble> sums = {load_doubles(s.size + i),
                                       load_doubles(s.shift + i),
                                       load_doubles(s.rise + i),
                                       load_doubles(s.rise_squared + i),
                                       {},
                                       {}};
    const GroupFormOf<vdouble> form = group_form(o, group_summary(o, sums), batch);
    __builtin_memcpy(out->centre + i, &form.centre, sizeof form.centre);
    __builtin_memcpy(out->factor + i, &form.factor, sizeof form.factor);
  }
}

// `limit`: how many values may be written, of which those behind the group are written again.
RLKERN_INLINE void write_group(const GroupForm& form, const float* x, long long size,
                               long long limit, float* out) {
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
  // The ends of at most `most` of the groups from `at` to `stop`, both ends of groups. Without a
  // branch that depends on where they are, which would be guessed wrong once a group. `rises`
  // becomes false where an id is less than the one before it.
  int ends(long long at, long long stop, long long* found, int most, bool* rises) const {
    int count = 0;
    long long i = at + 1;
    if (of.ids == nullptr) {
      for (i = at + of.group_size; i <= stop && count < most; i += of.group_size) {
        found[count++] = i;
      }
      return count;
    }
    vlong falls = {};
    for (; i + kDoubles <= stop && count + kDoubles <= most; i += kDoubles) {
      const vlong id = load_ids(of.ids + i), before = load_ids(of.ids + i - 1);
      falls |= id < before;
      count += store_selected(found + count, lane_numbers() + i, id != before);
    }
    for (int lane = 0; lane < kDoubles; ++lane) *rises &= falls[lane] == 0;
    for (; i < stop && count < most; ++i) {
      found[count] = i;
      count += of.ids[i] != of.ids[i - 1];
      *rises &= of.ids[i] >= of.ids[i - 1];
    }
    if (i == stop && count < most) found[count++] = stop;
    return count;
  }
};

bool advantages(const GroupOptions& o, const GroupSummary& batch, const GroupedRewards& g,
                long long begin, long long end) {
  const Groups groups = {g};
  const long long stop = groups.first(end);
  // The rows behind are other calls'.
  bool rises = g.ids == nullptr || stop == g.rows || stop == 0 || g.ids[stop] > g.ids[stop - 1];
  long long ends[kMost];
  Sums sums = {};
  Forms forms;
  for (long long at = groups.first(begin); at < stop;) {
    const int count = groups.ends(at, stop, ends, kMost, &rises);
    if (!rises) return false;
    for (int i = 0; i < count; ++i) {
      const long long first = i > 0 ? ends[i - 1] : at;
      add_group(g.rewards + first, ends[i] - first, g.rows - first, &sums, i);
    }
    forms_of(o, batch, sums, count, &forms);
    for (int i = 0; i < count; ++i) {
      const GroupForm form = {forms.centre[i], forms.factor[i]};
      write_group(form, g.rewards + at, ends[i] - at, stop - at, g.out + at);
      at = ends[i];
    }
  }
  return rises;
}

// A vector of numbers of a record: whether a group is still empty is no branch then, which would be
// guessed wrong once a group.
typedef double vtwo __attribute__((vector_size(16)));

RLKERN_INLINE void add_one(Rises* group, double x) {
  double* r = &group->size;
  vtwo head, tail;  // size and shift, rise and rise_squared
  __builtin_memcpy(&head, r, sizeof head);
  __builtin_memcpy(&tail, r + 2, sizeof tail);
  const vtwo sizes = {head[0], head[0]}, zero = {}, here = {x, x};
  const vtwo shift = sizes == zero ? here : vtwo{head[1], head[1]};
  const vtwo above = here - shift;
  head = vtwo{head[0], shift[1]} + vtwo{1, 0};
  tail += above * vtwo{1, above[1]};
  __builtin_memcpy(r, &head, sizeof head);
  __builtin_memcpy(r + 2, &tail, sizeof tail);
}

// A vector of rewards, `stride` apart.
RLKERN_INLINE vdouble load_rewards(const float* x, long long stride) {
  if (stride == 1) return load_widened(x);
  vdouble v;
  for (int i = 0; i < kDoubles; ++i) v[i] = x[i * stride];
  return v;
}

void add(const ScatteredRewards& of, long long begin, long long end, Rises* groups) {
  const ScatteredRewards g = of;  // a copy, which no store can change
  long long i = begin;
  for (; i + kDoubles <= end; i += kDoubles) {
    const vdouble v = load_rewards(g.rewards + i * g.stride, g.stride);
    if (has_nan(v)) {
      for (int lane = 0; lane < kDoubles; ++lane) {
        if (v[lane] == v[lane]) add_one(groups + (g.ids[i + lane] - g.base), v[lane]);
      }
      continue;
    }
    for (int lane = 0; lane < kDoubles; ++lane) {
      add_one(groups + (g.ids[i + lane] - g.base), v[lane]);
    }
  }
  for (; i < end; ++i) {
    const double x = g.rewards[i * g.stride];
    if (x == x) add_one(groups + (g.ids[i] - g.base), x);
  }
}

// A vector of groups' sums in one part.
RLKERN_INLINE GroupSumsOf<vdouble> sums_of_part(const GroupParts& g, long long at) {
  const Columns c = load_columns((const double (*)[4])(g.rises + at));
  GroupSumsOf<vdouble> s = {c.x[0], c.x[1], c.x[2], c.x[3], {}, {}};
  if (g.lengths == nullptr) return s;
  for (int i = 0; i < kDoubles; ++i) {
    s.length[i] = g.lengths[at + i].length;
    s.length_rise[i] = g.lengths[at + i].rise;
  }
  return s;
}

void forms(const GroupOptions& o, const GroupSummary& batch, const GroupParts& g, long long begin,
           long long end, GroupForm* out) {
  for (long long n = begin; n < end; n += kDoubles) {
    GroupSumsOf<vdouble> all = sums_of_part(g, n);
    for (long long p = 1; p < g.parts; ++p) all = merged(all, sums_of_part(g, p * g.groups + n));
    const GroupFormOf<vdouble> form = group_form(o, group_summary(o, all), batch);
    store_pairs((double (*)[2])(out + n), form.centre, form.factor);
  }
}

void write(const ScatteredRewards& g, const GroupForm* forms, long long begin, long long end,
           float* out) {
  long long i = begin;
  for (; i + kDoubles <= end; i += kDoubles) {
    const vdouble x = load_rewards(g.rewards + i * g.stride, g.stride), zero = {};
    GroupFormOf<vdouble> form;
    gather_pairs((const double (*)[2])forms, g.ids + i, g.base, &form.centre, &form.factor);
    store_narrowed(out + i, x == x ? form.advantage(x) : zero);
  }
  for (; i < end; ++i) {
    const double x = g.rewards[i * g.stride];
    out[i] = x == x ? (float)forms[g.ids[i] - g.base].advantage(x) : 0;
  }
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::GroupKernels RLKERN_LEAF(rlkern_group_kernels) = {
    rlkern::span, rlkern::advantages, rlkern::add, rlkern::forms, rlkern::write,
};
