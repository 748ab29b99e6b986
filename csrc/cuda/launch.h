// What every launcher needs: the device and stream of a tensor, and errors that say so.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"

namespace rlkern {

// Makes the tensor's device current, and finds the stream that torch has current there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
          "torch gave no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

}  // namespace rlkern
