// gae, discounted_returns and vtrace on a GPU, as rlkern/_schema.py defines them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rlkern {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> return_scan_cuda(
    Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> log_ratios,
    std::optional<Tensor> mask, std::optional<Tensor> dones, std::optional<Tensor> bootstrap_value,
    std::optional<Tensor> lam, std::optional<Tensor> offsets, std::vector<double> options);

std::tuple<Tensor, Tensor, Tensor> return_scan_bwd_cuda(
    Tensor grad_first, std::optional<Tensor> grad_second, std::optional<Tensor> mask,
    std::optional<Tensor> dones, std::optional<Tensor> lam, std::optional<Tensor> offsets,
    std::vector<double> options);

}  // namespace rlkern
