// Runs kernel bodies on a CPU: one std::thread per CUDA thread, a barrier for __syncthreads, a lane
// buffer for shuffles, static storage for __shared__. Blocks run one after another, so statics are
// shared by the threads of one block only. Slow, and as strict as the sanitizers it runs under.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__ static
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__

struct ShimDim {
  unsigned x = 0;
};
inline thread_local ShimDim threadIdx, blockIdx, blockDim;

struct ShimWarp {
  std::barrier<> barrier{32};
  uint32_t lane[32];
};

struct ShimBlock {
  explicit ShimBlock(unsigned threads) : barrier(threads), warps(threads / 32) {
    for (auto& warp : warps) warp = std::make_unique<ShimWarp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<ShimWarp>> warps;
};
inline ShimBlock* shim_block = nullptr;

inline void __syncthreads() { shim_block->barrier.arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  ShimWarp& warp = *shim_block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(&warp.lane[lane], &value, sizeof value);
  warp.barrier.arrive_and_wait();
  float other;
  std::memcpy(&other, &warp.lane[lane ^ lanes], sizeof other);
  // Nobody overwrites a lane that another still reads.
  warp.barrier.arrive_and_wait();
  return other;
}

// kernel<<<blocks, threads>>>(...), where run() calls the kernel.
template <typename Run>
void shim_launch(unsigned blocks, unsigned threads, const Run& run) {
  ShimBlock block(threads);
  shim_block = &block;
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      threadIdx.x = t;
      blockDim.x = threads;
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        run();
        // The next block's writes to static storage come after this one's reads.
        block.barrier.arrive_and_wait();
      }
    });
  }
  for (auto& thread : pool) thread.join();
}
