// The kernels of csrc/cuda/policy_rows.cuh as a Python module that runs them on a CPU (shim.h,
// shim_cluster.h). Launches as policy_rows.cu does, with the kernel and the grid limit as
// arguments.

#include "shim.h"
#include "shim_cluster.h"
// The shim stands in for CUDA, so it comes first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/gradient_scale.cuh"
#include "cuda/policy_rows.cuh"
#include "emulated_logits.h"
#include "emulated_rows.h"

namespace py = pybind11;
using namespace rlkern;

namespace {

// `blocks`: of a cluster, or 0 for two reads.
template <typename Type, bool kCapped, bool kEntropy>
void launch(PolicyRowsArgs<Type> args, int blocks, int64_t max_blocks) {
  const int64_t vocab = args.rows.vocab;
  const RowPlan plan = blocks == 0 ? plan_two_reads(vocab, Type::kLanes)
                                   : plan_cluster_of(vocab, Type::kLanes, blocks);
  args.slices = plan.slices;
  args.vectors_per_slice = plan.vectors_per_slice;
  for_grids(args.rows.grid.size(), max_blocks / plan.slices, [&](unsigned rows, int64_t first) {
    if (blocks == 0) {
      shim_launch(rows, plan.threads,
                  [&] { policy_rows_two_reads<Type, kCapped, kEntropy>(args, first); });
    } else {
      shim_launch_clusters(rows, static_cast<unsigned>(blocks), plan.threads,
                           static_cast<size_t>(cluster_shared_bytes(plan)),
                           [&] { policy_rows_cluster<Type, kCapped, kEntropy>(args, first); });
    }
  });
}

void run(const Logits& logits, const Arguments& arguments, const Span& grad,
         const std::vector<double>& options, int blocks) {
  py::gil_scoped_release release;
  with_type(logits.dtype, [&](auto type) {
    using Type = decltype(type);
    PolicyRowsArgs<Type> args = {};
    args.rows = logit_rows<Type>(logits);
    args.options = policy_options(options.data());
    args.tokens = {pointer<const float>(arguments, "advantages"),
                   pointer<const float>(arguments, "old_logprobs"),
                   pointer<const float>(arguments, "ref_logprobs"),
                   pointer<const float>(arguments, "rollout_logprobs"),
                   pointer<const float>(arguments, "token_weights"),
                   pointer<const unsigned char>(arguments, "entropy_mask"),
                   pointer<const GradientScales>(arguments, "scales")};
    args.logprobs = pointer<float>(arguments, "logprobs");
    args.entropy = pointer<float>(arguments, "entropy");
    args.upstream = pointer<float>(arguments, "upstream");
    args.grad = reinterpret_cast<typename Type::Scalar*>(std::get<0>(grad));
    args.grad_grid = grid(logits, grad);
    const bool entropy = args.entropy != nullptr;
    if (logits.softcap > 0) {
      entropy ? launch<Type, true, true>(args, blocks, logits.max_blocks)
              : launch<Type, true, false>(args, blocks, logits.max_blocks);
    } else {
      entropy ? launch<Type, false, true>(args, blocks, logits.max_blocks)
              : launch<Type, false, false>(args, blocks, logits.max_blocks);
    }
  });
}

void scale(const std::string& dtype, const Span& x, int64_t outer, int64_t inner, int64_t width,
           uintptr_t factor, int64_t blocks) {
  py::gil_scoped_release release;
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    const RowPlan plan = plan_rows(width, Type::kLanes);
    const GradientScaleArgs<Type> args = {reinterpret_cast<typename Type::Scalar*>(std::get<0>(x)),
                                          {outer, inner, std::get<1>(x), std::get<2>(x)},
                                          width,
                                          plan.slices,
                                          plan.vectors_per_slice,
                                          reinterpret_cast<const float*>(factor)};
    shim_launch(static_cast<unsigned>(blocks), plan.threads,
                [&] { gradient_scale<Type>(args, blocks); });
  });
}

}  // namespace

PYBIND11_MODULE(_emulated_policy_rows, m) {
  bind_logits(m);
  m.def("run", &run);
  m.def("scale", &scale);
  m.def("plan_cluster", [](int64_t vocab, int lanes, int64_t shared_bytes) {
    const RowPlan plan = plan_cluster(vocab, lanes, shared_bytes);
    return std::make_tuple(plan.slices, plan.vectors_per_slice, plan.threads,
                           cluster_shared_bytes(plan));
  });
}
