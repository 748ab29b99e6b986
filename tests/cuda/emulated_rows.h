// Tensors as Python hands them to the emulated kernels: addresses and row strides by name.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>

#include "common/sequence_grid.h"

namespace rlkern {

using Rows = std::tuple<uintptr_t, int64_t>;  // address, row stride
using Arguments = std::map<std::string, Rows>;

template <typename T>
TokenRows<T> token_rows(const Arguments& arguments, const char* name) {
  const auto found = arguments.find(name);
  if (found == arguments.end()) return {};
  return {reinterpret_cast<T*>(std::get<0>(found->second)), std::get<1>(found->second)};
}

template <typename T>
T* pointer(const Arguments& arguments, const char* name) {
  return token_rows<T>(arguments, name).data;
}

}  // namespace rlkern
