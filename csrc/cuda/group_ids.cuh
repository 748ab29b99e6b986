// group_advantages where any number says to which group a reward belongs, in any order: one block,
// so that a barrier stands between the steps and the call is one launch.
//
// A hash table gives each group one of its rows, its leader, under whose number the group's sums
// stand. Which row that is may differ from run to run, and nothing depends on it: all sums are of
// integers, in which the order does not show. A reward enters as its rise above the group's
// smallest one, as a fraction of the largest rise, rounded to 2^-bits with bits =
// 62 - log2(rows), 52 at most, so that nothing overflows. So a mean is off by at most 2^-(bits + 1)
// of the largest rise R, and a sum of n squared deviations, which is at least R^2 / 2, by
// 3 n 2^-(bits + 1) R^2: a deviation by a share of 1.5 n 2^-bits, below the rounding to fp32 for
// groups of up to 2^18 rewards. Equal rewards rise by 0, which stays exact.
#pragma once

#include "group_rows.cuh"
#include "intrinsics.cuh"

namespace rlkern {

// Of a group, under its leader's number.
struct GroupCell {
  unsigned least, best, second;  // rewards as ordered integers
  unsigned longest;              // the largest length's bits
  int size;
  int first;  // row of the best reward, the first one of several
  unsigned long long rise, rise_squared, length, length_rise;
  GroupForm form;
  double lead;
};

struct GroupIdArgs {
  GroupRows rows;
  const int64_t* ids;
  int64_t slots;  // of the table, a power of two and at least twice the rows
  int bits;
  int* table;
  int* leader;       // [rows]
  GroupCell* cells;  // [rows]
};

inline int64_t group_slots(int64_t rows) {
  int64_t slots = 32;
  while (slots < 2 * rows) slots *= 2;
  return slots;
}

inline int fraction_bits(int64_t rows) {
  int bits = 62;
  while (bits > 0 && (int64_t{1} << (62 - bits)) < rows) --bits;
  return bits < 52 ? bits : 52;
}

// Integers in the order of the floats, of which 0 and -0 are one.
RLKERN_INLINE unsigned ordered(float x) {
  const unsigned bits = float_to_bits(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

RLKERN_INLINE double from_ordered(unsigned key) {
  return bits_to_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The power of two that brings numbers of at most `largest` below 2^bits; 0 where there is none.
RLKERN_INLINE double fixed_point(double largest, int bits) {
  if (!(largest > 0) || largest == __builtin_inf()) return 0;
  const int exponent = static_cast<int>(double_to_bits(largest) >> 52) - 1023;
  return bits_to_double(static_cast<uint64_t>(1023 + bits - 1 - exponent) << 52);
}

RLKERN_INLINE unsigned long long rounded(double x) {
  return static_cast<unsigned long long>(x + 0.5);
}

// A mix of all bits (Vigna's splitmix64): ids that are multiples of a power of two do not collide.
RLKERN_INLINE uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

RLKERN_DEVICE int find_leader(const GroupIdArgs& args, int row) {
  const int64_t id = args.ids[row];
  const uint64_t wrap = static_cast<uint64_t>(args.slots) - 1;
  for (uint64_t slot = mixed(static_cast<uint64_t>(id)) & wrap;; slot = (slot + 1) & wrap) {
    const int seen = atomicCAS(args.table + slot, -1, row);
    if (seen < 0) return row;
    if (args.ids[seen] == id) return seen;
  }
}

// Whole numbers back into sums.
RLKERN_DEVICE GroupSums cell_sums(const GroupCell& c, int bits) {
  const double least = from_ordered(c.least), range = from_ordered(c.best) - least;
  const double unit = fixed_point(range, bits),
               length_unit = fixed_point(bits_to_float(c.longest), bits);
  const double scale = bits_to_double(static_cast<uint64_t>(1023 + bits) << 52);
  GroupSums s = {static_cast<double>(c.size), least, 0, 0, 0, 0};
  if (length_unit > 0) s.length = static_cast<double>(c.length) / length_unit;
  if (unit > 0) {
    s.rise = static_cast<double>(c.rise) / unit;
    s.rise_squared = static_cast<double>(c.rise_squared) / unit / unit * scale;
    if (length_unit > 0) {
      s.length_rise = static_cast<double>(c.length_rise) / unit / length_unit * scale;
    }
  } else if (range != 0) {
    s.rise = range;  // infinite or NaN, as any sum with an infinite reward
  }
  return s;
}

__global__ void __launch_bounds__(kFinishThreads)
    group_ids(const __grid_constant__ GroupIdArgs args) {
  __shared__ OfWarp of_warp;
  const GroupRows& r = args.rows;
  const GroupOptions& o = r.options;
  const int rows = static_cast<int>(r.rows), thread = threadIdx.x, threads = blockDim.x;
  for (int64_t slot = thread; slot < args.slots; slot += threads) args.table[slot] = -1;
  __syncthreads();
  for (int i = thread; i < rows; i += threads) args.leader[i] = find_leader(args, i);
  // Calls body(row, reward, cell) for every reward, then waits for all threads.
  const auto for_scored = [&](int64_t k, const auto& body) {
    for (int i = thread; i < rows; i += threads) {
      const float x = r.rewards[i * r.columns + k];
      if (x == x) body(i, x, args.cells[args.leader[i]]);
    }
    __syncthreads();
  };
  const auto for_leaders = [&](const auto& body) {
    for (int i = thread; i < rows; i += threads) {
      if (args.leader[i] == i) body(args.cells[i]);
    }
    __syncthreads();
  };

  for (int64_t k = 0; k < r.columns; ++k) {
    const GroupSummary batch = batch_summary(r, k, of_warp);
    for_leaders([&](GroupCell& c) {
      c = {};
      c.least = 0xffffffffu;
      c.first = rows;
    });
    for_scored(k, [&](int i, float x, GroupCell& c) {
      const unsigned key = ordered(x);
      atomicMin(&c.least, key);
      atomicMax(&c.best, key);
      atomicAdd(&c.size, 1);
      if (r.lengths != nullptr && r.lengths[i] > 0) {
        atomicMax(&c.longest, float_to_bits(r.lengths[i]));
      }
    });
    const double shrink = bits_to_double(static_cast<uint64_t>(1023 - args.bits) << 52);
    for_scored(k, [&](int i, float x, GroupCell& c) {
      const double least = from_ordered(c.least);
      const double unit = fixed_point(from_ordered(c.best) - least, args.bits);
      const double rise = unit > 0 ? (x - least) * unit : 0;
      atomicAdd(&c.rise, rounded(rise));
      atomicAdd(&c.rise_squared, rounded(rise * rise * shrink));
      if (r.lengths != nullptr && r.lengths[i] > 0) {
        const double length_unit = fixed_point(bits_to_float(c.longest), args.bits);
        const double length = length_unit > 0 ? r.lengths[i] * length_unit : 0;
        atomicAdd(&c.length, rounded(length));
        atomicAdd(&c.length_rise, rounded(length * rise * shrink));
      }
      if (r.leads() && ordered(x) == c.best) atomicMin(&c.first, i);
    });
    if (r.leads()) {
      for_scored(k, [&](int i, float x, GroupCell& c) {
        if (i != c.first) atomicMax(&c.second, ordered(x));
      });
    }
    for_leaders([&](GroupCell& c) {
      const GroupSummary group = group_summary(o, cell_sums(c, args.bits));
      c.form = group_form(o, group, batch);
      c.lead = from_ordered(c.best) - from_ordered(c.second);
    });
    for (int i = thread; i < rows; i += threads) {
      const double x = r.reward(i, k);
      const GroupCell& c = args.cells[args.leader[i]];
      const GroupSummary group = {static_cast<double>(c.size), 0, 0, 0, 0};
      const double lead = i == c.first ? c.lead : 0;
      give(r, i, k,
           x == x ? c.form.advantage(group_subject(o, group, x, r.given_reward(i, k), lead)) : 0);
    }
    __syncthreads();  // the next column overwrites the cells
  }
  if (o.normalized) normalize_totals(r, of_warp);
}

}  // namespace rlkern
