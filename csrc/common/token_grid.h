// Where the values of a token lie: strides of up to two leading dimensions. No torch in here, so
// that kernels and their tests without a GPU use it too.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rlkern {

struct TokenIndex {
  int64_t outer;
  int64_t inner;
};

// Leading dimensions as [outer, inner], each with a stride: enough for [V], [N, V] and a sliced
// [B, T, V], read in place.
struct TokenGrid {
  int64_t outer = 1;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  RLKERN_HD int64_t size() const { return outer * inner; }
  // One division serves every tensor of the same leading shape.
  RLKERN_HD TokenIndex index(int64_t token) const {
    if (outer == 1) return {0, token};
    if (((token | inner) >> 32) == 0) {  // a 64-bit division is a long routine on a GPU
      const uint32_t t = static_cast<uint32_t>(token), n = static_cast<uint32_t>(inner);
      return {t / n, t % n};
    }
    return {token / inner, token % inner};
  }
  RLKERN_HD int64_t offset(TokenIndex at) const {
    return at.outer * outer_stride + at.inner * inner_stride;
  }
  RLKERN_HD int64_t offset(int64_t token) const { return offset(index(token)); }
};

// One value of type T per token, or none where the argument was not given.
template <typename T>
struct TokenSpan {
  TokenGrid grid;
  T* data = nullptr;

  RLKERN_HD explicit operator bool() const { return data != nullptr; }
  RLKERN_HD T& operator[](int64_t token) const { return data[grid.offset(token)]; }
  RLKERN_HD T& operator[](TokenIndex at) const { return data[grid.offset(at)]; }
};

}  // namespace rlkern
