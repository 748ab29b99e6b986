// Large outputs in large pages.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlkern {

// Memory that comes fresh from the system is mapped at its first write, and for pages of 4 KiB
// that takes longer than a scan does. Most systems give large pages to who asks for them, as
// NumPy does for its large arrays too; where they do not, nothing changes.
inline void prefer_huge_pages(const torch::stable::Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 64 << 10, kLeast = 4 << 20;  // every page size divides kPage
  const auto begin = reinterpret_cast<std::uintptr_t>(output.data_ptr());
  const std::uintptr_t bytes = output.numel() * output.element_size();
  if (bytes < kLeast) return;
  // The pages that hold nothing else; a refusal is no error.
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)output;
#endif
}

}  // namespace rlkern
