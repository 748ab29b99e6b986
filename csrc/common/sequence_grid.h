// Where the tokens of a sequence lie, padded or packed. No torch in here, so that kernels and
// their tests without a GPU use it too.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rlkern {

struct SequenceGrid {
  int64_t sequences = 0;
  int64_t length = 0;                // of a padded row, or the total of the packed ones
  const int64_t* offsets = nullptr;  // [sequences + 1] where packed

  RLKERN_HD int64_t size(int64_t i) const {
    return offsets == nullptr ? length : offsets[i + 1] - offsets[i];
  }
};

// One value of type T per token, consecutive along a sequence.
template <typename T>
struct TokenRows {
  T* data = nullptr;
  int64_t row_stride = 0;

  RLKERN_HD T* row(const SequenceGrid& grid, int64_t i) const {
    if (data == nullptr) return nullptr;
    return data + (grid.offsets == nullptr ? i * row_stride : grid.offsets[i]);
  }
};

}  // namespace rlkern
