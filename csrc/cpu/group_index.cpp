// Ids in a narrow range are numbers already; others get theirs from a hash table, in the order in
// which they appear.

#include "group_index.h"

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {
namespace {

// The range of ids that are used as they are, in numbers of rewards: an empty group costs a
// fraction of what a look-up does.
constexpr uint64_t kRange = 2;

// The finaliser of MurmurHash3: every bit of the id moves every bit of the result.
inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdULL;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

int64_t numbered(const int64_t* ids, int64_t rows, int64_t* numbers) {
  struct Slot {
    int64_t id;
    int64_t number;  // from 1 on; 0 where the slot is empty
  };
  uint64_t capacity = 16;
  while (capacity < 2 * static_cast<uint64_t>(rows)) capacity *= 2;
  const std::unique_ptr<Slot[]> table(new Slot[capacity]());
  // An address, which is another in every process, so that no ids are sure to collide. The numbers
  // go by the order of appearance: the seed does not show in them.
  const uint64_t seed = mixed(reinterpret_cast<uintptr_t>(table.get()));
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (i > 0 && ids[i] == ids[i - 1]) {
      numbers[i] = numbers[i - 1];
      continue;
    }
    uint64_t at = mixed(static_cast<uint64_t>(ids[i]) ^ seed) & (capacity - 1);
    while (table[at].number != 0 && table[at].id != ids[i]) at = (at + 1) & (capacity - 1);
    if (table[at].number == 0) table[at] = {ids[i], ++count};
    numbers[i] = table[at].number - 1;
  }
  return count;
}

}  // namespace

IdSpan id_span(const int64_t* ids, int64_t rows) {
  const auto kernel = group_kernels().span;
  const int64_t chunks = (rows + kTokenGrain - 1) / kTokenGrain;
  std::vector<IdSpan> spans(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kTokenGrain;
      const int64_t size = rows - begin < kTokenGrain ? rows - begin : kTokenGrain;
      spans[c] = kernel(id_words(ids) + begin, size);
    }
  });
  IdSpan all = spans[0];
  for (int64_t c = 1; c < chunks; ++c) {
    all.least = spans[c].least < all.least ? spans[c].least : all.least;
    all.most = spans[c].most > all.most ? spans[c].most : all.most;
  }
  return all;
}

GroupNumbers::GroupNumbers(const int64_t* ids, int64_t rows, const IdSpan& span) : ids_(ids) {
  // As uint64, which the width of all of int64's range fits into.
  const uint64_t width = static_cast<uint64_t>(span.most) - static_cast<uint64_t>(span.least);
  if (width < kRange * static_cast<uint64_t>(rows)) {
    base_ = span.least;
    count_ = static_cast<int64_t>(width) + 1;
    return;
  }
  numbers_.resize(rows);
  count_ = numbered(ids, rows, numbers_.data());
  ids_ = numbers_.data();
}

GroupNumbers::GroupNumbers(int64_t group_size, int64_t rows)
    : count_(rows / group_size), numbers_(rows) {
  for (int64_t i = 0; i < rows; ++i) numbers_[i] = i / group_size;
  ids_ = numbers_.data();
}

}  // namespace rlkern
