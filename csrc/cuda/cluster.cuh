// Blocks of a cluster: their barrier and each other's shared memory, on sm_90 and later. Under
// tests/cuda/shim.h the blocks of a cluster run on a CPU.
#pragma once

#include "intrinsics.cuh"

#if defined(__CUDACC__)
#define RLKERN_HAS_CLUSTERS (__CUDA_ARCH__ >= 900)
#else
#define RLKERN_HAS_CLUSTERS 1
#endif

namespace rlkern {

#if !defined(__CUDACC__)

RLKERN_DEVICE unsigned cluster_rank() { return shim_cluster_rank(); }
RLKERN_DEVICE void cluster_arrive() { shim_cluster_arrive(); }
RLKERN_DEVICE void cluster_wait() { shim_cluster_wait(); }
RLKERN_DEVICE Pack* dynamic_shared() { return static_cast<Pack*>(shim_dynamic_shared()); }
RLKERN_DEVICE Pack load_pack_of_rank(const Pack* own, unsigned rank) {
  return *static_cast<const Pack*>(shim_shared_of_rank(own, rank));
}

#elif RLKERN_HAS_CLUSTERS

RLKERN_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier in two halves, by all threads of all blocks: what a thread wrote before it arrives, to
// its own shared memory or to a device's, is seen by those that have waited.
RLKERN_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
RLKERN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

RLKERN_DEVICE Pack* dynamic_shared() {
  extern __shared__ Pack rlkern_dynamic_shared[];
  return rlkern_dynamic_shared;
}

// What lies in the block of that rank where `own` lies in this one's shared memory. The block must
// not have ended.
RLKERN_DEVICE Pack load_pack_of_rank(const Pack* own, unsigned rank) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  Pack p;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
               : "r"(remote)
               : "memory");
  return p;
}

#endif

}  // namespace rlkern
