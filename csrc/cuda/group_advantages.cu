// Launches group_advantages on the current stream: one kernel, whatever the groups are. Nothing
// waits for the GPU, and all memory comes from torch, so that a call can be captured into a CUDA
// graph.

#include <torch/csrc/stable/ops.h>

#include "../common/group_arguments.h"
#include "group_advantages.h"
#include "group_ids.cuh"
#include "group_segments.cuh"
#include "launch.h"
#include "row_plan.h"

namespace rlkern {
namespace {

// Where every group is on its own.
constexpr int kSegmentThreads = 256;

void launch_segments(const GroupRows& rows, int64_t group_size, cudaStream_t stream) {
  SegmentArgs args = {rows, group_size, segment_lanes(group_size), 1};
  const int threads = rows.is_whole() ? kFinishThreads : kSegmentThreads;
  if (!rows.is_whole()) {
    const int64_t of_block = threads / args.lanes;
    args.blocks = (rows.rows / group_size + of_block - 1) / of_block;
  }
  for_grids(args.blocks, kMaxBlocks, [&](unsigned blocks, int64_t first) {
    group_segments<<<blocks, threads, 0, stream>>>(args, first);
  });
  check_launch("group_advantages");
}

void launch_ids(const GroupRows& rows, const int64_t* ids, const Tensor& like,
                cudaStream_t stream) {
  constexpr int64_t kMostRows = int64_t{1} << 30;
  check(rows.rows <= kMostRows, "group_ids: expected at most ", kMostRows, " rewards, got ",
        rows.rows);
  const int64_t slots = group_slots(rows.rows);
  const Tensor table = torch::stable::new_empty(like, {slots + rows.rows}, ScalarType::Int);
  const Tensor cells = torch::stable::new_empty(
      like, {rows.rows * static_cast<int64_t>(sizeof(GroupCell))}, ScalarType::Byte);
  int* slot = static_cast<int*>(table.data_ptr());
  const GroupIdArgs args = {rows,
                            ids,
                            slots,
                            fraction_bits(rows.rows),
                            slot,
                            slot + slots,
                            static_cast<GroupCell*>(cells.data_ptr())};
  group_ids<<<1, kFinishThreads, 0, stream>>>(args);
  check_launch("group_advantages by ids");
}

}  // namespace

Tensor group_advantages_cuda(Tensor rewards, int64_t group_size, std::optional<Tensor> group_ids,
                             std::optional<Tensor> lengths, std::optional<Tensor> given,
                             std::optional<Tensor> weights, std::vector<double> options) {
  const OnDeviceOf on(rewards);
  const GroupArguments a =
      group_arguments(rewards, group_size, group_ids, lengths, given, weights, options);
  Tensor out = torch::stable::new_empty(rewards, {a.rows});
  if (a.rows == 0) return out;
  const Tensor totals =
      torch::stable::new_empty(rewards, {a.options.joined ? a.rows : 0}, ScalarType::Double);
  const GroupRows rows = {a.options,
                          a.rows,
                          a.columns,
                          a.rewards,
                          a.lengths,
                          a.given,
                          a.weights,
                          static_cast<double*>(totals.data_ptr()),
                          static_cast<float*>(out.data_ptr())};
  if (a.ids != nullptr) {
    launch_ids(rows, a.ids, rewards, on.stream());
  } else {
    launch_segments(rows, a.group_size, on.stream());
  }
  return out;
}

}  // namespace rlkern
