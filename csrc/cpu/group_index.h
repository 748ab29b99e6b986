// Numbers for the groups of rewards, from ids of any values in any order.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/group_kernels.h"

namespace rlkern {

// Of at least one id.
IdSpan id_span(const int64_t* ids, int64_t rows);

// The number of each row's group, from 0 on. There may be numbers that no row has.
class GroupNumbers {
 public:
  GroupNumbers(const int64_t* ids, int64_t rows, const IdSpan& span);
  GroupNumbers(int64_t group_size, int64_t rows);

  int64_t count() const { return count_; }
  int64_t operator[](int64_t row) const { return ids_[row] - base_; }

  // Column k of the rewards with these numbers.
  ScatteredRewards of(const float* rewards, int64_t columns, int64_t k) const {
    return {rewards + k, columns, id_words(ids_), base_};
  }

 private:
  const int64_t* ids_;  // the caller's, or those in numbers_
  int64_t base_ = 0;
  int64_t count_;
  std::vector<int64_t> numbers_;
};

}  // namespace rlkern
