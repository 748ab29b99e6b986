// How much work a block gets, decided by the vocabulary and the element type alone. Plain C++, so
// that the tests without a GPU launch as the library does.
#pragma once

#include <cstdint>

namespace rlkern {

// With at most 64 registers a thread, four blocks of 256 fit on a multiprocessor: 1024 threads with
// four 16-byte loads each are 64 KiB in flight. An H200 asks for 29 KiB to keep 4.8 TB/s busy over
// 132 multiprocessors at an assumed latency of 0.8 us. Four, so that three stay at work while one
// begins or ends.
constexpr int kMaxThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kUnroll = 4;
// 64 KiB, four full batches of every thread. Shorter slices would pay more for starting blocks,
// longer ones leave multiprocessors idle when there are few rows.
constexpr int64_t kSliceVectors = 4096;
// The grid's limit; more work is launched in several grids.
constexpr int64_t kMaxBlocks = 2147483647;

struct RowPlan {
  int64_t slices;
  int64_t vectors_per_slice;
  int threads;
};

inline RowPlan plan_rows(int64_t vocab, int lanes) {
  const int64_t vectors = (vocab + lanes - 1) / lanes;
  RowPlan plan;
  plan.slices = (vectors + kSliceVectors - 1) / kSliceVectors;
  // The last slice is the short one: cut evenly, every slice would end in a partial batch.
  plan.vectors_per_slice = vectors < kSliceVectors ? vectors : kSliceVectors;
  plan.threads = 32;
  while (plan.threads < kMaxThreads && plan.threads * kUnroll < plan.vectors_per_slice) {
    plan.threads *= 2;
  }
  return plan;
}

// Launches over `items` blocks, in several grids where one may not be so large: calls
// launch(blocks, first item).
template <typename Launch>
void for_grids(int64_t items, int64_t max_blocks, const Launch& launch) {
  for (int64_t first = 0; first < items; first += max_blocks) {
    const int64_t blocks = items - first < max_blocks ? items - first : max_blocks;
    launch(static_cast<unsigned>(blocks), first);
  }
}

}  // namespace rlkern
