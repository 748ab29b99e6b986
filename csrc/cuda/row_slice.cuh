// How rows of logits are cut into slices for thread blocks, and read in vectors of 16 bytes at any
// alignment.
//
// Everything here depends on the vocabulary and the element type alone, never on the number of rows
// or on where a row lies: so a row's sums come out the same whatever stands around it.
#pragma once

#include "logit_types.cuh"
#include "row_plan.h"

namespace rlkern {

struct SliceIndex {
  int64_t row;
  int64_t slice;
};

RLKERN_INLINE SliceIndex slice_index(int64_t item, int64_t slices) {
  if (slices == 1) return {item, 0};
  if (((item | slices) >> 32) == 0) {  // a 64-bit division is a long routine on a GPU
    const uint32_t i = static_cast<uint32_t>(item), n = static_cast<uint32_t>(slices);
    return {i / n, i % n};
  }
  return {item / slices, item % slices};
}

// Consecutive elements of one row that a block reads as vectors.
template <typename Type>
struct Slice {
  const typename Type::Scalar* x;
  int count;       // elements in the slice
  int room;        // elements from x to the end of the row, or a large number
  unsigned shift;  // bytes from the 16-byte boundary at or below x to x
  bool outside;    // that boundary lies before the row: x is less than `shift` bytes into it

  RLKERN_HD Slice(const typename Type::Scalar* row, int64_t vocab, int64_t begin, int64_t end)
      : x(row + begin),
        count(static_cast<int>((end < vocab ? end : vocab) - begin)),
        room(static_cast<int>(vocab - begin < (1 << 30) ? vocab - begin : 1 << 30)),
        shift(static_cast<unsigned>(reinterpret_cast<uintptr_t>(x) & 15u)),
        outside(begin < static_cast<int64_t>(shift / sizeof(*row))) {}

  // An element counted from x, or -1 where it is not in the slice.
  RLKERN_HD int place(int64_t element) const {
    return element >= 0 && element < count ? static_cast<int>(element) : -1;
  }
};

// 16 bytes at `shift` into 32, selected word by word: a run-time index would put them into memory.
RLKERN_INLINE Pack shifted_pack(const Pack& a, const Pack& b, unsigned shift) {
  uint32_t w[6];
  const bool two = shift & 8u, one = shift & 4u;
  const unsigned bits = (shift & 3u) * 8u;
  w[0] = two ? a.word[2] : a.word[0];
  w[1] = two ? a.word[3] : a.word[1];
  w[2] = two ? b.word[0] : a.word[2];
  w[3] = two ? b.word[1] : a.word[3];
  w[4] = two ? b.word[2] : b.word[0];
  w[5] = two ? b.word[3] : b.word[1];
  Pack out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.word[i] =
        funnel_shift(one ? w[i + 1] : w[i], one ? w[i + 2 < 6 ? i + 2 : 5] : w[i + 1], bits);
  }
  return out;
}

// Vector v of a slice, minus infinity beyond its end. Nothing outside the row is read.
template <typename Type, bool kStreamed>
RLKERN_INLINE Pack load_vector(const Slice<Type>& slice, int v) {
  constexpr int kLanes = Type::kLanes;
  const int begin = v * kLanes;
  if (slice.shift == 0 && begin + kLanes <= slice.count) {
    return kStreamed ? load_pack_streamed(slice.x + begin) : load_pack(slice.x + begin);
  }
  if (begin >= slice.count) return minus_infinity_pack<Type>();
  if (slice.shift != 0 && begin + 2 * kLanes <= slice.room && !(slice.outside && v == 0) &&
      begin + kLanes <= slice.count) {
    const char* aligned = reinterpret_cast<const char*>(slice.x + begin) - slice.shift;
    return shifted_pack(load_pack(aligned), load_pack(aligned + 16), slice.shift);
  }
  Pack out = minus_infinity_pack<Type>();
  constexpr int kPerWord = kLanes / 4;
  constexpr int kBits = 32 / kPerWord;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if (begin + i < slice.count) {
      const uint32_t bits = slice.x[begin + i];
      const unsigned at = i % kPerWord * kBits;
      const uint32_t keep = kPerWord == 1 ? 0u : ~(0xffffu << at);
      out.word[i / kPerWord] = (out.word[i / kPerWord] & keep) | bits << at;
    }
  }
  return out;
}

}  // namespace rlkern
