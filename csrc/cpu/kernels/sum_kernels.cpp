// One read of the part, one read and one write of the sum, compiled once per instruction set (see
// CMakeLists.txt).

#include "sum_kernels.h"

#include "leaf.h"
#include "simd.h"

namespace rlkern {
namespace {

// A page ahead of what is added: the hardware's own look-ahead ends with the page.
constexpr long long kAhead = 1024;

template <typename Type>
void add(float* sum, const void* part, long long size) {
  const auto* x = static_cast<const typename Type::Scalar*>(part);
  constexpr int kUnroll = 4;
  long long i = 0;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const long long j = i + u * kLanes;
      __builtin_prefetch(sum + j + kAhead, 1);
      __builtin_prefetch(x + j + kAhead);
      FloatType::store(sum + j, FloatType::load(sum + j) + Type::load(x + j));
    }
  }
  for (; i < size; ++i) {
    typename Type::Scalar padded[kLanes] = {x[i]};
    sum[i] += Type::load(padded)[0];
  }
}

}  // namespace
}  // namespace rlkern

extern "C" const rlkern::SumKernels RLKERN_LEAF(rlkern_sum_kernels) = {
    {rlkern::add<rlkern::FloatType>, rlkern::add<rlkern::HalfType>,
     rlkern::add<rlkern::BFloat16Type>},
};
