// Walks over the tokens of one sequence in blocks of a vector, with sums: what the token-level
// leaf files share.
#pragma once

#include "simd_double.h"

namespace rlkern {
namespace {

constexpr int kChain = 32;
// Tokens between what is loaded and what is asked for: the processor itself stops at every page.
constexpr int kAhead = 512;

typedef float vpart __attribute__((vector_size(RLKERN_VECTOR_BYTES / 2)));

// Sums of N quantities side by side, of which those that a loss does not ask for stay 0: in floats
// over a chain of blocks, then in doubles.
template <int N>
struct Sums {
  vfloat chain[N] = {};
  vdouble wide[N] = {};

  __attribute__((always_inline)) void flush() {
    for (int i = 0; i < N; ++i) {
      vpart half[2];
      __builtin_memcpy(half, &chain[i], sizeof half);
      wide[i] += __builtin_convertvector(half[0], vdouble);
      wide[i] += __builtin_convertvector(half[1], vdouble);
      chain[i] = vfloat{};
    }
  }
  __attribute__((always_inline)) double total(int i) const {
    double sum = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) sum += wide[i][lane];
    return sum;
  }
};

RLKERN_INLINE vint lanes_below(long long count) {
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int)(count < kLanes ? count : kLanes);
}

// kLanes tokens from `at` on. kAll: each of them counts. Otherwise some do not, be it for the mask
// or because the sequence ends before; nothing beyond its end is read.
template <bool kAll>
struct Block {
  long long size;
  long long at;
  vint counts;

  __attribute__((always_inline)) Block(long long length, const unsigned char* mask, long long begin)
      : size(length), at(begin) {
    counts = kAll ? vint{} - 1 : lanes_below(size - at);
    if (!kAll && mask != nullptr) counts &= flags(mask);
  }
  // Written so that the usual size is a constant.
  __attribute__((always_inline)) void copy(void* to, const void* from, int width) const {
    if (kAll || size - at >= kLanes) {
      __builtin_memcpy(to, from, (unsigned long long)(kLanes * width));
    } else {
      __builtin_memcpy(to, from, (unsigned long long)((size - at) * width));
    }
  }
  __attribute__((always_inline)) vint flags(const unsigned char* p) const {
    unsigned char bytes[kLanes] = {};
    copy(bytes, p + at, 1);
    return widen_bytes(bytes) != 0;
  }
  // Zeros where a token does not count, whatever stands there.
  __attribute__((always_inline)) vfloat load(const float* p) const {
    vfloat v = {};
    copy(&v, p + at, sizeof(float));
    if (kAll) __builtin_prefetch(p + at + kAhead);
    return counts ? v : vfloat{};
  }
  // Asks for the memory that will be written, which may be null.
  __attribute__((always_inline)) void will_store(const float* p, int ahead) const {
    if (p != nullptr) __builtin_prefetch(p + at + ahead, 1);
  }
  __attribute__((always_inline)) void store(float* p, vfloat v) const {
    copy(p + at, &v, sizeof(float));
  }
};

// How many of the kLanes tokens from `p` on count, as far as one comparison tells: padding comes in
// long runs, and needs no arithmetic.
enum class Counting { kAll, kSome, kNone };

RLKERN_INLINE Counting counting(const unsigned char* p) {
  unsigned char ones[kLanes], zeros[kLanes] = {};
  for (unsigned char& one : ones) one = 1;
  if (__builtin_memcmp(p, ones, kLanes) == 0) return Counting::kAll;
  return __builtin_memcmp(p, zeros, kLanes) == 0 ? Counting::kNone : Counting::kSome;
}

// Calls `body` with every block of a sequence (its size and mask) that has a token that counts,
// writes zeros to the `outputs` that are not null where none does, and flushes the sums after each
// chain.
template <typename Sequence, int N, typename Body, typename... Outputs>
RLKERN_INLINE void for_blocks(const Sequence& s, Sums<N>* sums, Body body, Outputs... outputs) {
  long long i = 0;
  while (i + kLanes <= s.size) {
    const long long chain = i + kChain * kLanes;
    const long long end = chain < s.size ? chain : s.size;
    for (; i + kLanes <= end; i += kLanes) {
      const Counting count = s.mask != nullptr ? counting(s.mask + i) : Counting::kAll;
      if (count == Counting::kAll) {
        body(Block<true>(s.size, s.mask, i));
      } else if (count == Counting::kSome) {
        body(Block<false>(s.size, s.mask, i));
      } else {
        const auto clear = [i](float* p) __attribute__((always_inline)) {
          if (p != nullptr) __builtin_memset(p + i, 0, sizeof(vfloat));
        };
        (clear(outputs), ...);
        (void)clear;
      }
    }
    sums->flush();
  }
  if (i < s.size) {
    body(Block<false>(s.size, s.mask, i));
    sums->flush();
  }
}

// The tokens that both masks count; one that is null counts them all.
inline long long count_both(const unsigned char* a, const unsigned char* b, long long size) {
  if (a == nullptr) a = b;
  if (b == nullptr) b = a;
  if (a == nullptr) return size;
  constexpr long long kRun = 128;  // whose count fits a byte: the compiler then adds in bytes
  long long count = 0, i = 0;
  for (; i + kRun <= size; i += kRun) {
    unsigned char run = 0;
    for (long long j = 0; j < kRun; ++j) run += (a[i + j] != 0) & (b[i + j] != 0);
    count += run;
  }
  for (; i < size; ++i) count += (a[i] != 0) & (b[i] != 0);
  return count;
}

}  // namespace
}  // namespace rlkern
