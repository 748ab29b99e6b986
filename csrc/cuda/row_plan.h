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

inline int64_t vectors_of(int64_t vocab, int lanes) { return (vocab + lanes - 1) / lanes; }

inline int threads_for(int64_t vectors, int most) {
  int threads = 32;
  while (threads < most && threads * kUnroll < vectors) {
    threads = threads * 2 < most ? threads * 2 : most;
  }
  return threads;
}

inline RowPlan plan_rows(int64_t vocab, int lanes) {
  const int64_t vectors = vectors_of(vocab, lanes);
  RowPlan plan;
  plan.slices = (vectors + kSliceVectors - 1) / kSliceVectors;
  // The last slice is the short one: cut evenly, every slice would end in a partial batch.
  plan.vectors_per_slice = vectors < kSliceVectors ? vectors : kSliceVectors;
  plan.threads = threads_for(plan.vectors_per_slice, kMaxThreads);
  return plan;
}

// ---- a whole row, read and then written -------------------------------------------------------

// Of a multiprocessor: one block of as many threads, or three of kMaxThreads. They may take 80
// registers each, and have 48 KiB of loads in flight.
constexpr int kRowThreads = 3 * kMaxThreads;
// So that an element's place in a row, and as many more as a block reads at a time, is an int.
constexpr int64_t kMaxRow = int64_t{1} << 30;
// The largest cluster that every device with clusters takes.
constexpr int kMaxCluster = 8;
constexpr int64_t kVectorBytes = 16;
// With a row's slice of up to 74.5 KiB three blocks share a multiprocessor's 228 KiB: each has 76,
// of which the system takes one and the reduction less than half of one. Then one block's row is on
// its way while another's is folded and a third one's gradient is written. 152 thousand 16-bit
// logits are four such slices.
constexpr int64_t kSharedOfThree = 76288;

// A row by one block. Its second walk finds in the cache what the first one read if few rows are
// under way, so a large row gets as many threads as there are.
inline RowPlan plan_two_reads(int64_t vocab, int lanes) {
  const int64_t vectors = vectors_of(vocab, lanes);
  return {1, vectors, threads_for(vectors, kRowThreads)};
}

// What a block of a cluster keeps: its slice, and its state.
inline int64_t cluster_shared_bytes(const RowPlan& plan) {
  return (plan.vectors_per_slice + 1) * kVectorBytes;
}

// A row by a cluster of `blocks`, each with a slice of the row. Cut evenly: the shared memory is
// the bound.
inline RowPlan plan_cluster_of(int64_t vocab, int lanes, int blocks) {
  RowPlan plan;
  plan.slices = blocks;
  plan.vectors_per_slice = (vectors_of(vocab, lanes) + blocks - 1) / blocks;
  const bool three = cluster_shared_bytes(plan) <= kSharedOfThree;
  plan.threads = threads_for(plan.vectors_per_slice, three ? kMaxThreads : kRowThreads);
  return plan;
}

// The smallest cluster of which three blocks share a multiprocessor, or the largest one. A plan
// without slices where a row does not fit into `shared_bytes` a block.
inline RowPlan plan_cluster(int64_t vocab, int lanes, int64_t shared_bytes) {
  RowPlan plan = plan_cluster_of(vocab, lanes, 1);
  while (plan.slices < kMaxCluster && cluster_shared_bytes(plan) > kSharedOfThree) {
    plan = plan_cluster_of(vocab, lanes, static_cast<int>(plan.slices) * 2);
  }
  if (cluster_shared_bytes(plan) > shared_bytes) plan.slices = 0;
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
