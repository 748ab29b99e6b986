// Clusters of blocks under shim.h. The blocks of a cluster take turns, each up to its next wait at
// the cluster's barrier: all that one does before a barrier comes before anything that the next one
// does there, so a barrier that is missing gives a wrong result every time, and a read of the
// shared memory of a block that has ended, or not begun, ends the process.
//
// A block's dynamic shared memory is its own. Static storage (__shared__) is the running block's:
// it does not outlive the block's turn.
#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "shim.h"

inline void shim_require(bool ok, const char* message) {
  if (ok) return;
  std::fprintf(stderr, "shim: %s\n", message);
  std::abort();
}

struct ShimClusterBlock {
  ShimClusterBlock(unsigned threads, size_t bytes) : block(threads), shared(new char[bytes]) {}
  ShimBlock block;
  std::unique_ptr<char[]> shared;
  bool runs = false;
};

struct ShimCluster {
  std::vector<std::unique_ptr<ShimClusterBlock>> blocks;
  size_t shared_bytes;

  void wait_for_turn(unsigned rank) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == rank; });
  }
  void pass_on(unsigned rank) {
    const std::lock_guard<std::mutex> lock(mutex_);
    turn_ = (rank + 1) % static_cast<unsigned>(blocks.size());
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned turn_ = 0;
};
inline thread_local ShimCluster* shim_cluster = nullptr;
inline thread_local unsigned shim_rank = 0;
inline thread_local int shim_arrived = 0;

inline unsigned shim_cluster_rank() { return shim_rank; }

inline void shim_cluster_arrive() {
  shim_require(++shim_arrived == 1, "a thread arrived twice at the barrier of its cluster");
}

inline void shim_cluster_wait() {
  shim_require(--shim_arrived == 0, "a thread waited at a barrier at which it had not arrived");
  __syncthreads();
  if (threadIdx.x == 0) {
    shim_cluster->pass_on(shim_rank);
    shim_cluster->wait_for_turn(shim_rank);
  }
  __syncthreads();
}

inline void* shim_dynamic_shared() { return shim_cluster->blocks[shim_rank]->shared.get(); }

inline const void* shim_shared_of_rank(const void* own, unsigned rank) {
  const char* base = static_cast<const char*>(shim_dynamic_shared());
  const size_t offset = static_cast<size_t>(static_cast<const char*>(own) - base);
  shim_require(rank < shim_cluster->blocks.size() && offset < shim_cluster->shared_bytes,
               "there is no such block or no such shared memory in the cluster");
  const ShimClusterBlock& peer = *shim_cluster->blocks[rank];
  shim_require(peer.runs, "a block read the shared memory of one that had ended or not begun");
  return peer.shared.get() + offset;
}

// A kernel launched with a cluster size and dynamic shared memory, where run() calls the kernel.
template <typename Run>
void shim_launch_clusters(unsigned clusters, unsigned size, unsigned threads, size_t shared_bytes,
                          const Run& run) {
  ShimCluster cluster;
  cluster.shared_bytes = shared_bytes;
  for (unsigned rank = 0; rank < size; ++rank) {
    cluster.blocks.push_back(std::make_unique<ShimClusterBlock>(threads, shared_bytes));
  }
  const auto thread = [&](unsigned rank, unsigned t) {
    ShimClusterBlock& own = *cluster.blocks[rank];
    shim_cluster = &cluster;
    shim_rank = rank;
    shim_block = &own.block;
    threadIdx.x = t;
    blockDim.x = threads;
    for (unsigned c = 0; c < clusters; ++c) {
      blockIdx.x = c * size + rank;
      if (t == 0) {
        cluster.wait_for_turn(rank);
        own.runs = true;
        // What an earlier block left is not there on a GPU.
        std::memset(own.shared.get(), 0xff, shared_bytes);
      }
      __syncthreads();
      run();
      shim_require(shim_arrived == 0, "a thread ended between arriving and waiting");
      __syncthreads();
      if (t == 0) {
        own.runs = false;
        cluster.pass_on(rank);
      }
    }
  };
  std::vector<std::thread> pool;
  for (unsigned rank = 0; rank < size; ++rank) {
    for (unsigned t = 0; t < threads; ++t) pool.emplace_back(thread, rank, t);
  }
  for (auto& running : pool) running.join();
}
