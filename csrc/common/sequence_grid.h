// Where the tokens of a sequence lie, padded or packed. No torch in here, so that kernels and
// their tests without a GPU use it too.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rlkern {

struct SequenceSpan {
  int64_t begin;  // in its row where padded
  int64_t size;
};

struct SequenceGrid {
  int64_t sequences = 0;
  int64_t length = 0;                // of a padded row, or the total of the packed ones
  const int64_t* offsets = nullptr;  // [sequences + 1] where packed

  // Inside the tensors whatever the offsets say: on a GPU nobody has looked at their values.
  RLKERN_HD SequenceSpan span(int64_t i) const {
    if (offsets == nullptr) return {0, length};
    const int64_t begin = bounded(offsets[i], 0);
    return {begin, bounded(offsets[i + 1], begin) - begin};
  }
  RLKERN_HD int64_t size(int64_t i) const { return span(i).size; }
  // The offsets around a sequence are as they must be: rising from 0 to the length.
  RLKERN_HD bool is_sound(int64_t i) const {
    if (offsets == nullptr) return true;
    const int64_t begin = offsets[i], end = offsets[i + 1];
    return 0 <= begin && begin <= end && end <= length && (i > 0 || begin == 0) &&
           (i + 1 < sequences || end == length);
  }

 private:
  RLKERN_HD int64_t bounded(int64_t offset, int64_t low) const {
    if (offset < low) return low;
    return offset > length ? length : offset;
  }
};

// One value of type T per token, consecutive along a sequence.
template <typename T>
struct TokenRows {
  T* data = nullptr;
  int64_t row_stride = 0;  // 0 where packed

  // The first token of sequence i, which lies at `at`.
  RLKERN_HD T* row(int64_t i, SequenceSpan at) const {
    return data == nullptr ? nullptr : data + i * row_stride + at.begin;
  }
  RLKERN_HD T* row(const SequenceGrid& grid, int64_t i) const { return row(i, grid.span(i)); }
};

// Flags as the leaf loops take them.
RLKERN_INLINE const unsigned char* flag_bytes(const bool* flags) {
  return reinterpret_cast<const unsigned char*>(flags);
}

}  // namespace rlkern
