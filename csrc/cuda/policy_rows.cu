// Launches policy_rows on the current stream: one kernel. Nothing waits for the GPU, and all memory
// comes from torch, so that a call can be captured into a CUDA graph.

#include "../common/policy_row_arguments.h"
#include "launch.h"
#include "logit_launch.h"
#include "policy_rows.cuh"
#include "policy_rows.h"

namespace rlkern {
namespace {

void check_cuda(cudaError_t error, const char* call) {
  check(error == cudaSuccess, "policy_rows, ", call, ": ", cudaGetErrorString(error));
}

// The dynamic shared memory that a block of the kernel can have here; 0 where the code that was
// loaded knows no clusters: compiled for an earlier architecture, be it as PTX for a later device.
template <typename Kernel>
int64_t cluster_shared_limit(Kernel* kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 90) return 0;
  int device = 0, limit = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  return limit - static_cast<int64_t>(attributes.sharedSizeBytes);
}

template <typename Type, typename Kernel>
void launch_cluster(Kernel* kernel, PolicyRowsArgs<Type> args, const RowPlan& plan,
                    int64_t shared_limit, cudaStream_t stream) {
  args.slices = plan.slices;
  args.vectors_per_slice = plan.vectors_per_slice;
  // Always the limit, since the attribute is the kernel's and calls may come from several threads.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_limit)),
             "the limit of shared memory");
  // The first-level cache holds nothing that is read again.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "the share of shared memory");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.slices), 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(cluster_shared_bytes(plan));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  for_grids(args.rows.grid.size(), kMaxBlocks / plan.slices, [&](unsigned rows, int64_t first) {
    config.gridDim = dim3(rows * static_cast<unsigned>(plan.slices));
    check_cuda(cudaLaunchKernelEx(&config, kernel, args, first), "a launch of clusters");
  });
}

template <typename Type, bool kCapped, bool kEntropy>
void launch(PolicyRowsArgs<Type> args, cudaStream_t stream) {
  const int64_t vocab = args.rows.vocab;
  auto* const cluster = &policy_rows_cluster<Type, kCapped, kEntropy>;
  const int64_t limit = cluster_shared_limit(cluster);
  const RowPlan in_cluster = plan_cluster(vocab, Type::kLanes, limit);
  if (in_cluster.slices > 0) return launch_cluster(cluster, args, in_cluster, limit, stream);
  const RowPlan plan = plan_two_reads(vocab, Type::kLanes);
  args.slices = plan.slices;
  args.vectors_per_slice = plan.vectors_per_slice;
  for_grids(args.rows.grid.size(), kMaxBlocks, [&](unsigned rows, int64_t first) {
    policy_rows_two_reads<Type, kCapped, kEntropy><<<rows, plan.threads, 0, stream>>>(args, first);
  });
  check_launch("policy_rows with two reads");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> policy_rows_cuda(
    Tensor logits, Tensor grad, Tensor token_ids, std::optional<Tensor> mask,
    std::optional<Tensor> token_temperature, double temperature, std::optional<double> softcap,
    Tensor advantages, std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> rollout_logprobs, std::optional<Tensor> token_weights,
    std::optional<Tensor> entropy_mask, Tensor scales, std::vector<double> options,
    bool return_entropy) {
  const OnDeviceOf on(logits);
  const SeparableTensors tensors = {advantages,    old_logprobs, ref_logprobs, rollout_logprobs,
                                    token_weights, entropy_mask, scales};
  const PolicyOptions o = separable_options(options, tensors, return_entropy);
  PolicyRowResults out;
  with_type(logits, [&](auto type) {
    using Type = decltype(type);
    PolicyRowsArgs<Type> args = {};
    args.rows = logit_rows<Type>(logits, token_ids, mask, token_temperature, temperature, softcap);
    check(args.rows.vocab <= kMaxRow, "logits: expected at most 2^30 values per row, got ",
          args.rows.vocab);
    args.options = o;
    args.tokens = token_inputs(tensors, logits, args.rows.grid.size());
    args.grad_grid = gradient_grid(grad, logits);
    args.grad = static_cast<typename Type::Scalar*>(grad.data_ptr());
    out = new_policy_row_results(logits, return_entropy);
    args.logprobs = static_cast<float*>(out.logprobs.data_ptr());
    args.entropy = return_entropy ? static_cast<float*>(out.entropy.data_ptr()) : nullptr;
    args.upstream = static_cast<float*>(out.upstream.data_ptr());
    if (args.rows.grid.size() == 0) return;
    with_flags(args.rows.softcap > 0, return_entropy, [&](auto capped, auto entropy) {
      launch<Type, decltype(capped)::value, decltype(entropy)::value>(args, on.stream());
    });
  });
  return {out.logprobs, out.entropy, out.upstream};
}

}  // namespace rlkern
