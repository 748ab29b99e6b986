// Moments over fixed chunks, merged in order, so that they do not depend on the number of threads;
// then one pass that whitens.

#include "whiten.h"

#include "../common/policy_rows.h"
#include "../common/whiten_arguments.h"
#include "isa.h"
#include "sequence_runs.h"

namespace rlkern {

Tensor masked_moments_cpu(Tensor x, std::optional<Tensor> mask) {
  const WhitenArguments given = whiten_arguments(x, mask);
  const auto kernel = whiten_kernels().moments;
  // A chunk is read twice, the second time from the cache.
  const int64_t chunks = (given.size + kTokenGrain - 1) / kTokenGrain;
  std::vector<Moments> parts(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kTokenGrain;
      const int64_t size = given.size - begin < kTokenGrain ? given.size - begin : kTokenGrain;
      const bool* counts = given.mask == nullptr ? nullptr : given.mask + begin;
      parts[c] = kernel(given.x + begin, flag_bytes(counts), size);
    }
  });
  Moments all = {0, 0, 0};
  for (const Moments& part : parts) all = merged(all, part);
  Tensor out = torch::stable::new_empty(x, {3}, ScalarType::Double);
  double* to = static_cast<double*>(out.data_ptr());
  to[0] = all.count;
  to[1] = all.mean;
  to[2] = all.squares;
  return out;
}

Tensor whiten_cpu(Tensor x, std::optional<Tensor> mask, Tensor moments,
                  std::vector<double> options) {
  const WhitenArguments given = whiten_arguments(x, mask);
  const double* m = moments_argument(moments, x);
  const Whitening w = whitening(checked_whiten_options(options), {m[0], m[1], m[2]});
  Tensor out = torch::stable::new_empty(x, x.sizes());
  float* to = static_cast<float*>(out.data_ptr());
  const auto kernel = whiten_kernels().whiten;
  torch::stable::parallel_for(0, given.size, kTokenGrain, [&](int64_t begin, int64_t end) {
    const bool* counts = given.mask == nullptr ? nullptr : given.mask + begin;
    kernel(w, given.x + begin, flag_bytes(counts), end - begin, to + begin);
  });
  return out;
}

}  // namespace rlkern
