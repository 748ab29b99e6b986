// The kernels of return_scan, group_advantages, masked_moments and whiten as a Python module that
// runs them on a CPU (shim.h). Launches as their .cu files do, with the block sizes and the grid
// limit as arguments.

#include "shim.h"
// The shim stands in for CUDA, so it comes first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/group_ids.cuh"
#include "cuda/group_segments.cuh"
#include "cuda/return_scan.cuh"
#include "cuda/row_plan.h"
#include "cuda/whiten.cuh"
#include "emulated_rows.h"

namespace py = pybind11;
using namespace rlkern;

namespace {

// Calls launch with the block's size as a constant.
template <typename Launch>
void with_threads(int threads, const Launch& launch) {
  if (threads == 32) launch(std::integral_constant<int, 32>{});
  if (threads == 128) launch(std::integral_constant<int, 128>{});
  if (threads == 256) launch(std::integral_constant<int, 256>{});
}

// As the launcher does where `threads` is 0.
int chosen_threads(const SequenceGrid& grid, int threads) {
  return threads > 0 ? threads : scan_threads(grid);
}

void scan(const Arguments& arguments, int64_t sequences, int64_t length,
          const std::vector<double>& options, int threads, int64_t max_blocks) {
  py::gil_scoped_release release;
  ReturnScanArgs args;
  args.options = return_options(options.data());
  args.rows.grid = {sequences, length, pointer<const int64_t>(arguments, "offsets")};
  args.rows.rewards = token_rows<const float>(arguments, "rewards");
  args.rows.values = token_rows<const float>(arguments, "values");
  args.rows.log_ratios = token_rows<const float>(arguments, "log_ratios");
  args.rows.mask = token_rows<const bool>(arguments, "mask");
  args.rows.dones = token_rows<const bool>(arguments, "dones");
  args.rows.bootstrap_value = pointer<const float>(arguments, "bootstrap_value");
  args.rows.lam = pointer<const float>(arguments, "lam");
  args.rows.first = token_rows<float>(arguments, "first");
  args.rows.second = token_rows<float>(arguments, "second");
  const int wanted = chosen_threads(args.rows.grid, threads);
  for_grids(sequences, max_blocks, [&](unsigned blocks, int64_t first) {
    with_threads(wanted, [&](auto size) {
      shim_launch(blocks, size, [&] {
        if (args.rows.log_ratios.data != nullptr) {
          return_scan_forward<size(), true>(args, first);
        } else {
          return_scan_forward<size(), false>(args, first);
        }
      });
    });
  });
}

void scan_backward(const Arguments& arguments, int64_t sequences, int64_t length,
                   const std::vector<double>& options, int threads, int64_t max_blocks) {
  py::gil_scoped_release release;
  ReturnScanGradArgs args;
  args.options = return_options(options.data());
  args.rows.grid = {sequences, length, pointer<const int64_t>(arguments, "offsets")};
  args.rows.grad_first = token_rows<const float>(arguments, "grad_first");
  args.rows.grad_second = token_rows<const float>(arguments, "grad_second");
  args.rows.mask = token_rows<const bool>(arguments, "mask");
  args.rows.dones = token_rows<const bool>(arguments, "dones");
  args.rows.lam = pointer<const float>(arguments, "lam");
  args.rows.grad_rewards = token_rows<float>(arguments, "grad_rewards");
  args.rows.grad_values = token_rows<float>(arguments, "grad_values");
  args.rows.grad_bootstrap = pointer<float>(arguments, "grad_bootstrap");
  const int wanted = chosen_threads(args.rows.grid, threads);
  for_grids(sequences, max_blocks, [&](unsigned blocks, int64_t first) {
    with_threads(wanted, [&](auto size) {
      shim_launch(blocks, size, [&] { return_scan_backward<size()>(args, first); });
    });
  });
}

void groups(const Arguments& arguments, int64_t rows, int64_t columns, int64_t group_size,
            const std::vector<double>& options, unsigned threads, int64_t max_blocks) {
  py::gil_scoped_release release;
  const GroupRows r = {group_options(options.data()),
                       rows,
                       columns,
                       pointer<const float>(arguments, "rewards"),
                       pointer<const float>(arguments, "lengths"),
                       pointer<const float>(arguments, "given"),
                       pointer<const float>(arguments, "weights"),
                       pointer<double>(arguments, "totals"),
                       pointer<float>(arguments, "out")};
  if (group_size == 0) {
    const int64_t slots = group_slots(rows);
    // What was there before must not matter.
    std::vector<int> table(slots + rows, 0x7f7f7f7f);
    std::vector<GroupCell> cells(rows);
    std::memset(static_cast<void*>(cells.data()), 0x7f, rows * sizeof(GroupCell));
    const GroupIdArgs args = {r,
                              pointer<const int64_t>(arguments, "group_ids"),
                              slots,
                              fraction_bits(rows),
                              table.data(),
                              table.data() + slots,
                              cells.data()};
    shim_launch(1, threads, [&] { group_ids(args); });
    return;
  }
  SegmentArgs args = {r, group_size, segment_lanes(group_size), 1};
  const int64_t of_block = threads / args.lanes;
  if (!r.is_whole()) args.blocks = (rows / group_size + of_block - 1) / of_block;
  for_grids(args.blocks, max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, threads, [&] { group_segments(args, first); });
  });
}

int64_t whiten_blocks(int64_t size) { return (size + kBlockValues - 1) / kBlockValues; }

MaskedValues values_of(const Arguments& arguments, int64_t size) {
  return masked_values(size, pointer<const float>(arguments, "x"),
                       pointer<const bool>(arguments, "mask"));
}

void moments(const Arguments& arguments, int64_t size, unsigned finish_threads,
             int64_t max_blocks) {
  py::gil_scoped_release release;
  const int64_t blocks = whiten_blocks(size);
  std::vector<Moments> parts(blocks, Moments{__builtin_nan(""), 0, 0});
  const MomentsArgs args = {values_of(arguments, size), parts.data()};
  for_grids(blocks, max_blocks, [&](unsigned count, int64_t first) {
    shim_launch(count, kWhitenThreads, [&] { moments_of_blocks(args, first); });
  });
  Moments* out = pointer<Moments>(arguments, "moments");
  shim_launch(1, finish_threads, [&] { moments_finish(parts.data(), blocks, out); });
}

void whiten(const Arguments& arguments, int64_t size, const std::vector<double>& options,
            int64_t max_blocks) {
  py::gil_scoped_release release;
  float* out = pointer<float>(arguments, "out");
  const WhitenArgs args = {whiten_options(options.data()), values_of(arguments, size),
                           pointer<const Moments>(arguments, "moments"), out,
                           is_aligned(out, sizeof(Pack))};
  for_grids(whiten_blocks(size), max_blocks, [&](unsigned blocks, int64_t first) {
    shim_launch(blocks, kWhitenThreads, [&] { whiten_values(args, first); });
  });
}

}  // namespace

PYBIND11_MODULE(_emulated_advantages, m) {
  m.def("scan", &scan);
  m.def("scan_backward", &scan_backward);
  m.def("scan_threads", [](int64_t sequences, int64_t length, bool packed) {
    const int64_t none = 0;
    return scan_threads({sequences, length, packed ? &none : nullptr});
  });
  m.def("groups", &groups);
  m.def("fraction_bits", &fraction_bits);
  m.def("moments", &moments);
  m.def("whiten", &whiten);
  m.attr("SCAN_ITEMS") = kScanItems;
  m.attr("BLOCK_VALUES") = kBlockValues;
}
