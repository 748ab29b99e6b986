// Runs kernel bodies on a CPU: one std::thread per CUDA thread, a barrier for __syncthreads, a lane
// buffer for shuffles, static storage for __shared__, relaxed atomics for atomics. Blocks run one
// after another, so statics are shared by the threads of one block only. Slow, and as strict as the
// sanitizers it runs under.
#pragma once

#include <atomic>
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
  uint64_t lane[32];
};

struct ShimBlock {
  explicit ShimBlock(unsigned threads) : barrier(threads), warps(threads / 32) {
    for (auto& warp : warps) warp = std::make_unique<ShimWarp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<ShimWarp>> warps;
};
inline thread_local ShimBlock* shim_block = nullptr;

inline void __syncthreads() { shim_block->barrier.arrive_and_wait(); }

// What a lane of this warp gives.
template <typename T>
T shim_lane(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  ShimWarp& warp = *shim_block->warps[threadIdx.x / 32];
  std::memcpy(&warp.lane[threadIdx.x % 32], &value, sizeof value);
  warp.barrier.arrive_and_wait();
  T other;
  std::memcpy(&other, &warp.lane[from], sizeof other);
  // Nobody overwrites a lane that another still reads.
  warp.barrier.arrive_and_wait();
  return other;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return shim_lane(value, threadIdx.x % 32 ^ lanes);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % 32;
  return shim_lane(value, lane < lanes ? lane : lane - lanes);
}

template <typename T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}

template <typename T>
T atomicCAS(T* at, T expected, T desired) {
  std::atomic_ref<T>(*at).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
  return expected;
}

template <typename T>
T atomicMax(T* at, T value) {
  T seen = std::atomic_ref<T>(*at).load(std::memory_order_relaxed);
  while (seen < value &&
         !std::atomic_ref<T>(*at).compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}

template <typename T>
T atomicMin(T* at, T value) {
  T seen = std::atomic_ref<T>(*at).load(std::memory_order_relaxed);
  while (value < seen &&
         !std::atomic_ref<T>(*at).compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}

// kernel<<<blocks, threads>>>(...), where run() calls the kernel.
template <typename Run>
void shim_launch(unsigned blocks, unsigned threads, const Run& run) {
  ShimBlock block(threads);
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      shim_block = &block;
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
