// The row pass over logits: what the leaf files offer to csrc/cpu. Plain C types only, since the
// leaf files include neither torch's headers nor the standard library's.
#pragma once

#include "../../common/online_softmax.h"

namespace rlkern {

enum class LogitType { kFloat, kHalf, kBFloat16, kCount };

// One row of logits x_j. Values are y_j = softcap * tanh(x_j / softcap), or x_j where softcap is
// 0, and z_j = y_j * inv_temperature.
struct LogitRow {
  const void* x;
  long long size;
  long long target;  // negative: none in this row
  float inv_temperature;
  float softcap;
};

struct RowForward {
  SoftmaxState<double> others;  // in units of z; leaves the target out, except from the maximum
  double target;                // z_y - max; -inf where there is none
  float max;                    // of y
};

// The gradient of z_j is p_j * (constant + slope * (z_j - max)); the target's is given whole.
struct RowBackward {
  float max;
  float log_sum;
  float constant;
  float slope;
  float target;
};

// What a forward pass keeps for the gradient to follow it at once: an exponential for each element,
// 0 for the target's, relative to the maximum so far, which stands once for each block of
// kRowBlock.
constexpr long long kRowBlock = 1024;
struct RowKept {
  // In an order of the kernels' own. 16-bit rows: row.size, rounded up to whole blocks. fp32:
  // row.size, in the logits' own place where nothing asks for them again.
  float* exponentials;
  float* maxima;  // one a block; -inf where nothing but -inf has come
};

// What may be asked of a row beside its log-probability, its maximum being known.
struct RowOutputs {
  double sum;      // of y
  double squares;  // of exp(z_j - max)
  bool leads;      // whether the target has the maximum, and the first of its places
};

struct RowKernels {
  const char* name;
  void (*forward[static_cast<int>(LogitType::kCount)])(const LogitRow&, bool entropy, RowForward*);
  // Writes the gradient with respect to x over `grad`, which may be the row itself.
  void (*backward[static_cast<int>(LogitType::kCount)])(const LogitRow&, const RowBackward&,
                                                        void* grad);
  // The same two with one exponential an element in all, while the row and what is kept of it stay
  // in the cache.
  void (*forward_keeping[static_cast<int>(LogitType::kCount)])(const LogitRow&, bool entropy,
                                                               const RowKept&, RowForward*);
  void (*backward_from_kept[static_cast<int>(LogitType::kCount)])(const LogitRow&,
                                                                  const RowBackward&,
                                                                  const RowKept&, void* grad);
  void (*outputs[static_cast<int>(LogitType::kCount)])(const LogitRow&, float max, RowOutputs*);
};

}  // namespace rlkern

extern "C" {
extern const rlkern::RowKernels rlkern_row_kernels_portable;
#if defined(__x86_64__)
extern const rlkern::RowKernels rlkern_row_kernels_avx2;
extern const rlkern::RowKernels rlkern_row_kernels_avx512;
#endif
}
