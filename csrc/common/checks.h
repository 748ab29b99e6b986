// Argument checks of the C++ operators. The Python layer words its own for users; these guard
// callers of torch.ops.rlkern.* and compiled graphs, where no Python runs.
#pragma once

#include <sstream>
#include <stdexcept>

namespace rlkern {

// Throws std::runtime_error with the arguments streamed into one message. torch's own macro would
// put the build machine's path into it.
template <typename... Args>
[[noreturn]] inline void fail(const Args&... args) {
  std::ostringstream message;
  message << "rlkern: ";
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

template <typename... Args>
inline void check(bool ok, const Args&... args) {
  if (!ok) fail(args...);
}

}  // namespace rlkern
