// GAE, discounted returns and V-trace over one sequence, and the backward of the first two;
// compiled once per instruction set (see CMakeLists.txt).

#include "return_kernels.h"

#include "block_scan.h"

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

template <bool kTrace>
RLKERN_INLINE Pair walk(const ReturnOptions& o, const ReturnSequence& s, long long begin,
                        long long end, Pair next) {
  for (long long t = end - 1; t >= begin; --t) {
    const bool counts = s.mask == nullptr || s.mask[t] != 0;
    ReturnToken token = {0, 0, 0, false};
    if (counts) {
      token.reward = s.rewards[t];
      token.value = s.values != nullptr ? s.values[t] : 0;
      token.log_ratio = kTrace ? s.log_ratios[t] : 0;
      token.done = s.dones != nullptr && s.dones[t] != 0;
    }
    const Pair here = before_token(o, s.lam, token, next);
    const double sum = here.w + here.u;
    s.first[t] = counts ? (float)(kTrace ? sum : here.w) : 0.0f;
    if (s.second != nullptr) {
      const double second = kTrace ? trace_advantage(o, s.lam, token, next) : sum;
      s.second[t] = counts ? (float)second : 0.0f;
    }
    if (counts || o.breaks) next = here;
  }
  return next;
}

// Whether a block's tokens all count and none ends an episode.
RLKERN_INLINE bool is_plain(const ReturnSequence& s, long long begin) {
  constexpr unsigned char kOnes[8] = {1, 1, 1, 1, 1, 1, 1, 1}, kZeros[8] = {};
  return (s.mask == nullptr || __builtin_memcmp(s.mask + begin, kOnes, kSteps) == 0) &&
         (s.dones == nullptr || __builtin_memcmp(s.dones + begin, kZeros, kSteps) == 0);
}

RLKERN_INLINE Pair plain_block(double gamma, const BlockScan& scan, const ReturnSequence& s,
                               long long begin, Pair next) {
  const vdouble rewards = load_widened(s.rewards + begin);
  if (s.values == nullptr) {
    const vdouble x = scan(rewards + gamma * shifted<1>(vdouble{}, next.u), next.w);
    store_narrowed(s.first + begin, x);
    return {0, x[0]};
  }
  const vdouble values = load_widened(s.values + begin);
  const vdouble x = scan(rewards + gamma * shifted<1>(values, next.u) - values, next.w);
  store_narrowed(s.first + begin, x);
  store_narrowed(s.second + begin, x + values);
  return {values[0], x[0]};
}

void scan(const ReturnOptions& o, const ReturnSequence& s) {
  const long long end = counting_end(s.mask, s.size);
  fill_zeros(s.first, end, s.size);
  fill_zeros(s.second, end, s.size);
  Pair next = {s.bootstrap_value, 0};
  if (s.log_ratios != nullptr) {
    walk<true>(o, s, 0, end, next);
    return;
  }
  const BlockScan block(o.gamma * s.lam);
  for (long long left = end; left > 0; left -= kSteps) {
    const long long begin = left > kSteps ? left - kSteps : 0;
    const bool plain = left >= kSteps && is_plain(s, begin);
    next =
        plain ? plain_block(o.gamma, block, s, begin, next) : walk<false>(o, s, begin, left, next);
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
      const double gamma = done ? 0 : o.gamma;
      before = {gamma * s.lam * slope, gamma * slope};
    }
  }
  *s.grad_bootstrap = (float)before.w;
}

}  // namespace
}  // namespace rlkern

#define RLKERN_JOIN_(a, b) a##b
#define RLKERN_JOIN(a, b) RLKERN_JOIN_(a, b)

extern "C" const rlkern::ReturnKernels RLKERN_JOIN(rlkern_return_kernels_, RLKERN_ISA) = {
    rlkern::scan,
    rlkern::scan_bwd,
};
