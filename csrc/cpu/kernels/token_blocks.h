// Walks over the tokens of one sequence in blocks of a vector, with sums: what the token-level
// leaf files share.
#pragma once

#include "simd.h"

namespace rlkern {
namespace {

constexpr int kChain = 32;

// Sums of N quantities side by side, of which those that a loss does not ask for stay 0.
template <int N>
struct Sums {
  double total[N] = {};
  vfloat chain[N] = {};

  __attribute__((always_inline)) void flush() {
    for (int i = 0; i < N; ++i) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += chain[i][lane];
      total[i] += sum;
      chain[i] = vfloat{};
    }
  }
};

RLKERN_INLINE vint lanes_below(long long count) {
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int)(count < kLanes ? count : kLanes);
}

// kLanes tokens from `at` on; those beyond the sequence, which only its last block has, do not
// count and are not read.
template <bool kFull>
struct Block {
  long long size;
  long long at;
  vint counts;

  __attribute__((always_inline)) Block(long long length, const unsigned char* mask, long long begin)
      : size(length), at(begin) {
    counts = kFull ? vint{} - 1 : lanes_below(size - at);
    if (mask != nullptr) counts &= flags(mask);
  }
  __attribute__((always_inline)) unsigned long long lanes() const {
    return kFull ? kLanes : size - at;
  }
  __attribute__((always_inline)) vint flags(const unsigned char* p) const {
    unsigned char bytes[kLanes] = {};
    if (kFull) return widen_bytes(p + at) != 0;
    __builtin_memcpy(bytes, p + at, lanes());
    return widen_bytes(bytes) != 0;
  }
  // Zeros where a token does not count, whatever stands there.
  __attribute__((always_inline)) vfloat load(const float* p) const {
    vfloat v = {};
    __builtin_memcpy(&v, p + at, lanes() * sizeof(float));
    return counts ? v : vfloat{};
  }
  __attribute__((always_inline)) void store(float* p, vfloat v) const {
    __builtin_memcpy(p + at, &v, lanes() * sizeof(float));
  }
};

// Calls `body` with every block of a sequence (its size and mask), and flushes the sums after each
// chain.
template <typename Sequence, int N, typename Body>
RLKERN_INLINE void for_blocks(const Sequence& s, Sums<N>* sums, Body body) {
  long long i = 0;
  while (i + kLanes <= s.size) {
    const long long chain = i + kChain * kLanes;
    const long long end = chain < s.size ? chain : s.size;
    for (; i + kLanes <= end; i += kLanes) body(Block<true>(s.size, s.mask, i));
    sums->flush();
  }
  if (i < s.size) {
    body(Block<false>(s.size, s.mask, i));
    sums->flush();
  }
}

template <typename Sequence>
long long count_tokens(const Sequence& s) {
  if (s.mask == nullptr) return s.size;
  long long count = 0;
  for (long long i = 0; i < s.size; ++i) count += s.mask[i] != 0;
  return count;
}

}  // namespace
}  // namespace rlkern
