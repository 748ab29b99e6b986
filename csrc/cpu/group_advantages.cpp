// Rewards normalised within their groups. A group's sums run in the order of its rewards, and those
// over the batch over fixed chunks: no result depends on the number of threads.

#include "group_advantages.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "../common/group_arguments.h"
#include "group_index.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One reward per row: float, or double where it is the sum of several.
template <typename T>
struct Column {
  const T* values;
  int64_t stride;
  double operator[](int64_t row) const { return values[row * stride]; }
};

// A group's best reward, the first of several, and the second best.
struct Best {
  double first = -kInfinity;
  double second = -kInfinity;
  int64_t row = -1;
  bool single = true;

  // What the advantage of a reward is taken of: the best one's lead, and nothing of the others.
  double subject(double x, int64_t at) const {
    if (single) return x;
    return at == row ? first - second : 0;
  }
  void add(double x, int64_t at) {
    single = row < 0;
    if (row < 0 || x > first) {
      second = first;
      first = x;
      row = at;
    } else if (x > second) {
      second = x;
    }
  }
};

template <typename T>
GroupSummary batch_summary(const GroupOptions& o, const Column<T>& x, int64_t rows) {
  const int64_t chunks = (rows + kTokenGrain - 1) / kTokenGrain;
  std::vector<GroupSums> sums(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t end = (c + 1) * kTokenGrain < rows ? (c + 1) * kTokenGrain : rows;
      GroupSums s = {};
      for (int64_t i = c * kTokenGrain; i < end; ++i) add_reward(&s, x[i]);
      sums[c] = s;
    }
  });
  GroupSums all = {};
  for (const GroupSums& s : sums) all = merged(all, s);
  return group_summary(o, all);
}

// Each group's form, from the sums of the batch's parts joined in order, and its best rewards where
// the baseline asks for them.
struct ScatteredGroups {
  std::unique_ptr<GroupForm[]> forms;
  std::vector<Best> best;
};

ScatteredGroups scattered_groups(const GroupArguments& g, const GroupNumbers& numbers, int64_t k,
                                 const GroupSummary& batch) {
  const GroupOptions& o = g.options;
  const Column<float> x = {g.rewards + k, g.columns};
  const ScatteredRewards scattered = numbers.of(g.rewards, g.columns, k);
  // With empty ones behind the last, which no reward is in.
  const int64_t steps = (numbers.count() + kGroupStep - 1) / kGroupStep;
  const int64_t groups = steps * kGroupStep;
  // Parts large enough that their own sums of all groups are the smaller work.
  const int64_t parts = std::clamp<int64_t>(g.rows / std::max(2 * groups, 2 * kTokenGrain), 1, 16);
  const std::unique_ptr<Rises[]> rises(new Rises[parts * groups]);
  const std::unique_ptr<Lengths[]> lengths(g.lengths != nullptr ? new Lengths[parts * groups]()
                                                                : nullptr);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      Rises* part = rises.get() + p * groups;
      const int64_t begin = g.rows * p / parts, end = g.rows * (p + 1) / parts;
      std::fill_n(part, groups, Rises{});
      group_kernels().add(scattered, begin, end, part);
      if (lengths == nullptr) continue;
      for (int64_t i = begin; i < end; ++i) {
        if (x[i] != x[i]) continue;
        const int64_t n = numbers[i];
        lengths[p * groups + n].length += g.lengths[i];
        lengths[p * groups + n].rise += g.lengths[i] * (x[i] - part[n].shift);
      }
    }
  });
  ScatteredGroups result = {std::unique_ptr<GroupForm[]>(new GroupForm[groups]), {}};
  const GroupParts all = {rises.get(), lengths.get(), parts, groups};
  torch::stable::parallel_for(0, steps, kTokenGrain / 64, [&](int64_t begin, int64_t end) {
    group_kernels().forms(o, batch, all, begin * kGroupStep, end * kGroupStep, result.forms.get());
  });
  if (o.baseline == GroupBaseline::kPassAtK) {
    result.best.resize(groups);
    for (int64_t i = 0; i < g.rows; ++i) {
      if (x[i] == x[i]) result.best[numbers[i]].add(x[i], i);
    }
  }
  return result;
}

// Calls put(row, advantage) for every reward of column k, 0 where it is NaN; the rewards of a group
// may lie anywhere.
template <typename Put>
void scattered(const GroupArguments& g, const GroupNumbers& numbers, int64_t k,
               const GroupSummary& batch, Put put) {
  const Column<float> x = {g.rewards + k, g.columns};
  const ScatteredGroups groups = scattered_groups(g, numbers, k, batch);
  torch::stable::parallel_for(0, g.rows, kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = numbers[i];
      double subject = x[i];
      if (g.given != nullptr) subject -= g.given[g.at(i, k)];
      if (!groups.best.empty()) subject = groups.best[n].subject(subject, i);
      put(i, x[i] == x[i] ? groups.forms[n].advantage(subject) : 0);
    }
  });
}

GroupNumbers numbers_of(const GroupArguments& g) {
  if (g.ids == nullptr) return GroupNumbers(g.group_size, g.rows);
  return GroupNumbers(g.ids, g.rows, id_span(g.ids, g.rows));
}

GroupSummary batch_of(const GroupArguments& g, int64_t k) {
  return g.options.uses_batch()
             ? batch_summary(g.options, Column<float>{g.rewards + k, g.columns}, g.rows)
             : GroupSummary{};
}

// Each advantage is of the reward itself, by its group's sums without lengths.
bool is_plain(const GroupOptions& o) {
  return !o.joined && o.baseline != GroupBaseline::kPassAtK &&
         o.baseline != GroupBaseline::kLengthWeighted && o.baseline != GroupBaseline::kGiven;
}

// Whether the groups may be consecutive, by the first few ids.
bool may_rise(const int64_t* ids, int64_t rows) {
  for (int64_t i = 1; ids != nullptr && i < rows && i < 256; ++i) {
    if (ids[i] < ids[i - 1]) return false;
  }
  return true;
}

// Where groups are consecutive and ids rise; false where they do not after all.
bool consecutive_groups(const GroupArguments& g, const GroupSummary& batch, float* out) {
  const GroupedRewards groups = {g.rewards, id_words(g.ids), g.rows, g.group_size, out};
  std::atomic<bool> rises{true};
  torch::stable::parallel_for(0, g.rows, kTokenGrain, [&](int64_t begin, int64_t end) {
    if (!group_kernels().advantages(g.options, batch, groups, begin, end)) rises = false;
  });
  return rises;
}

void one_reward(const GroupArguments& g, float* out) {
  const GroupSummary batch = batch_of(g, 0);
  const bool plain = is_plain(g.options);
  if (plain && may_rise(g.ids, g.rows) && consecutive_groups(g, batch, out)) return;
  const GroupNumbers numbers = numbers_of(g);
  if (plain) {
    const ScatteredGroups groups = scattered_groups(g, numbers, 0, batch);
    const ScatteredRewards rewards = numbers.of(g.rewards, 1, 0);
    torch::stable::parallel_for(0, g.rows, kTokenGrain, [&](int64_t begin, int64_t end) {
      group_kernels().write(rewards, groups.forms.get(), begin, end, out);
    });
    return;
  }
  scattered(g, numbers, 0, batch,
            [&](int64_t i, double advantage) { out[i] = static_cast<float>(advantage); });
}

// The weighted sum of the columns' advantages, normalised over the batch where that is asked for.
void several_rewards(const GroupArguments& g, float* out) {
  const GroupNumbers numbers = numbers_of(g);
  std::vector<double> total(g.rows);
  for (int64_t k = 0; k < g.columns; ++k) {
    const double weight = g.weights != nullptr ? g.weights[k] : 1.0;
    scattered(g, numbers, k, batch_of(g, k),
              [&](int64_t i, double advantage) { total[i] += weight * advantage; });
  }
  GroupForm form = {0, 1};
  if (g.options.normalized) {
    for (int64_t i = 0; i < g.rows; ++i) {
      bool scored = false;
      for (int64_t k = 0; k < g.columns; ++k) {
        const float x = g.rewards[g.at(i, k)];
        scored |= x == x;
      }
      // NaN says that the row is left out; a sum that is NaN counts, and spoils the batch.
      if (!scored) {
        total[i] = kNaN;
      } else if (total[i] != total[i]) {
        total[i] = kInfinity;
      }
    }
    const GroupOptions o = over_batch(g.options);
    form = group_form(o, batch_summary(o, Column<double>{total.data(), 1}, g.rows), {});
  }
  for (int64_t i = 0; i < g.rows; ++i) {
    const bool left_out = g.options.normalized && total[i] != total[i];
    out[i] = left_out ? 0 : static_cast<float>(form.advantage(total[i]));
  }
}

}  // namespace

Tensor group_advantages_cpu(Tensor rewards, int64_t group_size, std::optional<Tensor> group_ids,
                            std::optional<Tensor> lengths, std::optional<Tensor> given,
                            std::optional<Tensor> weights, std::vector<double> options) {
  const GroupArguments g =
      group_arguments(rewards, group_size, group_ids, lengths, given, weights, options);
  Tensor out = torch::stable::new_empty(rewards, {g.rows}, ScalarType::Float);
  if (g.rows == 0) return out;
  float* to = static_cast<float*>(out.data_ptr());
  if (g.options.joined) {
    several_rewards(g, to);
  } else {
    one_reward(g, to);
  }
  return out;
}

}  // namespace rlkern
