// The kernels of masked_moments and whiten: sixteen values a thread, in four loads of 16 bytes.
//
// A thread takes the moments of its values in two passes over registers; those of threads, warps
// and blocks are joined two by two in a fixed order, so that the same call gives the same bits, on
// any GPU.
#pragma once

#include "../common/whitening.h"
#include "block_sums.cuh"
#include "intrinsics.cuh"

namespace rlkern {

constexpr int kWhitenThreads = 256;
constexpr int kVectors = 4;  // of a thread
constexpr int kVectorValues = 4;
constexpr int64_t kBlockValues = kWhitenThreads * kVectors * kVectorValues;

struct MaskedValues {
  int64_t size;
  const float* x;
  const bool* mask;  // null where all count
  bool aligned;      // x to 16 bytes, the mask to 4
};

inline bool is_aligned(const void* pointer, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline MaskedValues masked_values(int64_t size, const float* x, const bool* mask) {
  return {size, x, mask, is_aligned(x, sizeof(Pack)) && is_aligned(mask, kVectorValues)};
}

// The values of vector v of this thread in a block's share, and which of them count.
struct ValueVector {
  int64_t begin;
  float x[kVectorValues];
  bool counts[kVectorValues];
};

RLKERN_DEVICE ValueVector load_values(const MaskedValues& from, int64_t block, int v) {
  ValueVector out;
  const int64_t place = block * kWhitenThreads * kVectors + v * kWhitenThreads + threadIdx.x;
  out.begin = place * kVectorValues;
  if (from.aligned && out.begin + kVectorValues <= from.size) {
    const Pack pack = load_pack_streamed(from.x + out.begin);
    uint32_t flags = 0x01010101u;
    if (from.mask != nullptr) flags = load_word(from.mask + out.begin);
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      out.x[i] = bits_to_float(pack.word[i]);
      out.counts[i] = (flags >> (8 * i) & 0xffu) != 0;
    }
    return out;
  }
#pragma unroll
  for (int i = 0; i < kVectorValues; ++i) {
    const bool inside = out.begin + i < from.size;
    out.counts[i] = inside && (from.mask == nullptr || from.mask[out.begin + i]);
    out.x[i] = inside ? from.x[out.begin + i] : 0.0f;
  }
  return out;
}

// ---- moments ----------------------------------------------------------------------------------

using MomentsOfWarp = Moments[kFinishThreads / kLanes];

// Of all threads of a block, in the first one.
RLKERN_DEVICE Moments merge_block(Moments m, MomentsOfWarp& of_warp) {
  constexpr unsigned kAll = 0xffffffffu;
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const Moments other = {__shfl_xor_sync(kAll, m.count, apart),
                           __shfl_xor_sync(kAll, m.mean, apart),
                           __shfl_xor_sync(kAll, m.squares, apart)};
    m = merged(m, other);
  }
  if (threadIdx.x % kLanes == 0) of_warp[threadIdx.x / kLanes] = m;
  __syncthreads();
  if (threadIdx.x != 0) return m;
  for (unsigned w = 1; w < blockDim.x / kLanes; ++w) m = merged(m, of_warp[w]);
  return m;
}

struct MomentsArgs {
  MaskedValues values;
  Moments* parts;  // one per block
};

__global__ void __launch_bounds__(kWhitenThreads, 4)
    moments_of_blocks(const __grid_constant__ MomentsArgs args, int64_t first_block) {
  __shared__ MomentsOfWarp of_warp;
  const int64_t block = first_block + blockIdx.x;
  ValueVector vectors[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) vectors[v] = load_values(args.values, block, v);
  Moments m = {0, 0, 0};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      m.count += vectors[v].counts[i] ? 1 : 0;
      m.mean += vectors[v].counts[i] ? static_cast<double>(vectors[v].x[i]) : 0;
    }
  }
  if (m.count > 0) m.mean /= m.count;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      const double off = vectors[v].counts[i] ? vectors[v].x[i] - m.mean : 0;
      m.squares += off * off;
    }
  }
  m = merge_block(m, of_warp);
  if (threadIdx.x == 0) args.parts[block] = m;
}

__global__ void __launch_bounds__(kFinishThreads)
    moments_finish(const Moments* parts, int64_t count, Moments* out) {
  __shared__ MomentsOfWarp of_warp;
  Moments m = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) m = merged(m, parts[i]);
  m = merge_block(m, of_warp);
  if (threadIdx.x == 0) *out = m;
}

// ---- whitening --------------------------------------------------------------------------------

struct WhitenArgs {
  WhitenOptions options;
  MaskedValues values;
  const Moments* moments;
  float* out;
  bool aligned;  // out to 16 bytes
};

__global__ void __launch_bounds__(kWhitenThreads, 4)
    whiten_values(const __grid_constant__ WhitenArgs args, int64_t first_block) {
  __shared__ Whitening shared;
  ValueVector vectors[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    vectors[v] = load_values(args.values, first_block + blockIdx.x, v);
  }
  // By one thread, while the loads are under way: a division and a square root in double.
  if (threadIdx.x == 0) shared = whitening(args.options, *args.moments);
  __syncthreads();
  const Whitening w = shared;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      pack.word[i] = float_to_bits(vectors[v].counts[i] ? whitened(w, vectors[v].x[i]) : 0.0f);
    }
    const int64_t begin = vectors[v].begin;
    if (args.aligned && begin + kVectorValues <= args.values.size) {
      store_pack(args.out + begin, pack);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kVectorValues; ++i) {
      if (begin + i < args.values.size) args.out[begin + i] = bits_to_float(pack.word[i]);
    }
  }
}

}  // namespace rlkern
