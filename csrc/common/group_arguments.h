// The tensors of group_advantages, checked once for CPU and CUDA.
#pragma once

#include <optional>
#include <vector>

#include "flat_values.h"
#include "group_advantages.h"

namespace rlkern {

struct GroupArguments {
  GroupOptions options;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 0 where groups are told by ids
  const float* rewards;
  // Null where not given.
  const int64_t* ids;
  const float* lengths;
  const float* given;
  const float* weights;

  int64_t at(int64_t row, int64_t column) const { return row * columns + column; }
};

inline GroupArguments group_arguments(const Tensor& rewards, int64_t group_size,
                                      const std::optional<Tensor>& group_ids,
                                      const std::optional<Tensor>& lengths,
                                      const std::optional<Tensor>& given,
                                      const std::optional<Tensor>& weights,
                                      const std::vector<double>& options) {
  check(rewards.dim() == 2 && rewards.size(1) > 0, "rewards: expected [N, K]");
  check(options.size() == kGroupOptionCount, "options: expected ", kGroupOptionCount,
        " numbers, got ", options.size());
  const auto names = [&](int place, int count) {
    check(options[place] >= 0 && options[place] < count, "options: unknown number ", options[place],
          " at place ", place);
  };
  names(0, static_cast<int>(GroupBaseline::kNone) + 1);
  names(1, static_cast<int>(GroupScale::kNone) + 1);
  const int64_t rows = rewards.size(0), columns = rewards.size(1);
  const GroupOptions o = group_options(options.data());
  check(o.joined || columns == 1, "rewards: expected one column, got ", columns);
  check(group_ids.has_value() ? group_size == 0 : group_size > 0 && rows % group_size == 0,
        "group_size: expected a number that divides the ", rows, " rewards, got ", group_size);
  check(lengths.has_value() == (o.baseline == GroupBaseline::kLengthWeighted),
        "lengths: expected with the length-weighted baseline alone");
  check(given.has_value() == (o.baseline == GroupBaseline::kGiven),
        "given: expected with the given baseline alone");
  return {o,
          rows,
          columns,
          group_size,
          flat_values<float>(rewards, rewards, ScalarType::Float, "rewards"),
          flat_values<int64_t>(group_ids, rows, rewards, ScalarType::Long, "group_ids"),
          flat_values<float>(lengths, rows, rewards, ScalarType::Float, "lengths"),
          flat_values<float>(given, rows * columns, rewards, ScalarType::Float, "given"),
          flat_values<float>(weights, columns, rewards, ScalarType::Float, "weights")};
}

}  // namespace rlkern
