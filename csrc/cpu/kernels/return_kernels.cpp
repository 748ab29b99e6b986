// GAE, discounted returns and V-trace over one sequence, and the backward of the first two;
// compiled once per instruction set (see CMakeLists.txt).

#include "return_kernels.h"

#include "block_scan.h"
#include "leaf.h"

namespace rlkern {
namespace {

// One behind the last token that counts. What is masked after it does nothing, in both modes.
long long counting_end(const unsigned char* mask, long long size) {
  if (mask == nullptr) return size;
  while (size > 0 && mask[size - 1] == 0) --size;
  return size;
}

void fill_zeros(float* p, long long begin, long long end) {
  if (p == nullptr) return;
  for (long long t = begin; t < end; ++t) p[t] = 0;
}

// One token after the other.
RLKERN_INLINE Pair walk(const ReturnOptions& o, const ReturnSequence& s, long long begin,
                        long long end, Pair next) {
  const bool trace = s.log_ratios != nullptr;
  for (long long t = end - 1; t >= begin; --t) {
    const bool counts = s.mask == nullptr || s.mask[t] != 0;
    ReturnToken token = {0, 0, 0, false};
    if (counts) {
      token.reward = s.rewards[t];
      token.value = s.values != nullptr ? s.values[t] : 0;
      token.log_ratio = trace ? s.log_ratios[t] : 0;
      token.done = s.dones != nullptr && s.dones[t] != 0;
    }
    const Pair here = before_token(o, s.lam, token, next);
    const double sum = here.w + here.u;
    s.first[t] = counts ? (float)(trace ? sum : here.w) : 0.0f;
    if (s.second != nullptr) {
      const double second = trace ? trace_advantage(o, s.lam, token, next) : sum;
      s.second[t] = counts ? (float)second : 0.0f;
    }
    if (counts || o.breaks) next = here;
  }
  return next;
}

// Beyond it a token goes alone: e^80 for each of a vector's tokens is still a finite product.
constexpr double kModerateLogRatio = 80;

// Whether the tokens of a vector all count, and none ends an episode or has an extreme ratio.
RLKERN_INLINE bool is_plain(const ReturnSequence& s, long long begin) {
  constexpr unsigned char kOnes[8] = {1, 1, 1, 1, 1, 1, 1, 1}, kZeros[8] = {};
  return (s.mask == nullptr || __builtin_memcmp(s.mask + begin, kOnes, kDoubles) == 0) &&
         (s.dones == nullptr || __builtin_memcmp(s.dones + begin, kZeros, kDoubles) == 0) &&
         (s.log_ratios == nullptr ||
          all_within(load_widened(s.log_ratios + begin), kModerateLogRatio));
}

struct ReturnsBlock {
  double gamma;
  BlockScan scan;

  __attribute__((always_inline)) ReturnsBlock(const ReturnOptions& o, double lam)
      : gamma(o.gamma), scan(o.gamma * lam) {}
  __attribute__((always_inline)) Pair operator()(const ReturnSequence& s, long long at,
                                                 Pair next) const {
    const vdouble rewards = load_widened(s.rewards + at);
    const vdouble x = scan(rewards + gamma * shifted<1>(vdouble{}, next.u), next.w);
    store_narrowed(s.first + at, x);
    return {0, x[0]};
  }
};

struct GaeBlock {
  double gamma;
  BlockScan scan;

  __attribute__((always_inline)) GaeBlock(const ReturnOptions& o, double lam)
      : gamma(o.gamma), scan(o.gamma * lam) {}
  __attribute__((always_inline)) Pair operator()(const ReturnSequence& s, long long at,
                                                 Pair next) const {
    const vdouble rewards = load_widened(s.rewards + at), values = load_widened(s.values + at);
    const vdouble x = scan(rewards + gamma * shifted<1>(values, next.u) - values, next.w);
    store_narrowed(s.first + at, x);
    store_narrowed(s.second + at, x + values);
    return {values[0], x[0]};
  }
};

struct TraceBlock {
  ReturnOptions o;
  double lam;

  __attribute__((always_inline)) TraceBlock(const ReturnOptions& options, double own_lam)
      : o(options), lam(own_lam) {}
  __attribute__((always_inline)) Pair operator()(const ReturnSequence& s, long long at,
                                                 Pair next) const {
    const vdouble ratio = exp_moderate(load_widened(s.log_ratios + at));
    const vdouble rewards = load_widened(s.rewards + at), values = load_widened(s.values + at);
    const vdouble target = rewards + o.gamma * shifted<1>(values, next.u) - values;
    const double both = o.gamma * lam;
    const vdouble x =
        block_scan(at_most(ratio, o.rho_bar) * target, both * at_most(ratio, o.c_bar), next.w);
    store_narrowed(s.first + at, x + values);
    const vdouble onward = target + both * shifted<1>(x, next.w);
    store_narrowed(s.second + at, at_most(ratio, o.rho_pg_bar) * onward);
    return {values[0], x[0]};
  }
};

// In vectors from the last token that counts on, so that the result depends on nothing but the
// sequence; vectors that are not plain, and the first tokens, go one by one.
template <typename Block>
void scan_by(const ReturnOptions& o, const ReturnSequence& sequence) {
  // A copy, whose pointers no store of a result can have changed.
  const ReturnSequence s = sequence;
  const long long end = counting_end(s.mask, s.size);
  fill_zeros(s.first, end, s.size);
  fill_zeros(s.second, end, s.size);
  const Block block(o, s.lam);
  Pair next = {s.bootstrap_value, 0};
  long long left = end;
  while (left > 0) {
    // A loop of its own, so that the state stays in registers.
    for (; left >= kDoubles && is_plain(s, left - kDoubles); left -= kDoubles) {
      next = block(s, left - kDoubles, next);
    }
    const long long at = left > kDoubles ? left - kDoubles : 0;
    next = walk(o, s, at, left, next);
    left = at;
  }
}

void scan(const ReturnOptions& o, const ReturnSequence& s) {
  if (s.log_ratios != nullptr) {
    scan_by<TraceBlock>(o, s);
  } else if (s.values != nullptr) {
    scan_by<GaeBlock>(o, s);
  } else {
    scan_by<ReturnsBlock>(o, s);
  }
}

void scan_bwd(const ReturnOptions& o, const ReturnGradSequence& s) {
  const long long end = counting_end(s.mask, s.size);
  fill_zeros(s.grad_rewards, end, s.size);
  fill_zeros(s.grad_values, end, s.size);
  Pair before = {0, 0};
  for (long long t = 0; t < end; ++t) {
    const bool counts = s.mask == nullptr || s.mask[t] != 0;
    const bool done = counts && s.dones != nullptr && s.dones[t] != 0;
    const double second = counts && s.grad_second != nullptr ? s.grad_second[t] : 0;
    const double upstream = counts ? s.grad_first[t] + second : 0;
    const double slope = upstream + before.u;
    s.grad_rewards[t] = counts ? (float)slope : 0.0f;
    if (s.grad_values != nullptr) {
      s.grad_values[t] = counts ? (float)(second - slope + before.w) : 0.0f;
    }
    if (counts || o.breaks) {
      before = done ? Pair{0, 0} : Pair{o.gamma * s.lam * slope, o.gamma * slope};
    }
  }
  *s.grad_bootstrap = (float)before.w;
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::ReturnKernels RLKERN_LEAF(rlkern_return_kernels) = {
    rlkern::scan,
    rlkern::scan_bwd,
};
