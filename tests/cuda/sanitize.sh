#!/usr/bin/env bash
# Runs the CUDA kernels' bodies on the CPU under the address and undefined-behaviour sanitizers, then
# under the thread sanitizer, where a missing barrier shows as a race.
#
#   tests/cuda/sanitize.sh [BIN] [pytest arguments]   BIN: the folder that holds python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=python
if [[ -d ${1:-} ]]; then
  python="$1/python"
  shift
fi
# -s: a report is printed as the process dies.
tests=(tests/cuda/test_*emulated.py -q -s -p no:cacheprovider -p no:xdist "$@")

run() {
  local sanitizer="$1" library="$2"
  echo "== $sanitizer sanitizer"
  # Python and torch keep memory until they exit, and torch's OpenMP threads synchronise unseen by
  # the sanitizer: only what the kernels do is of interest.
  OMP_NUM_THREADS=1 RLKERN_EMULATE_SANITIZE="$sanitizer" LD_PRELOAD="$(g++ -print-file-name="$library")" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
    "${wrap[@]}" "$python" -m pytest "${tests[@]}"
}

# The thread sanitizer of older compilers does not find room under a wide address randomisation.
wrap=()
if setarch "$(uname -m)" -R true 2>/dev/null; then wrap=(setarch "$(uname -m)" -R); fi
run address libasan.so
# The thread sanitizer follows every thread of every block, so it gets the kernels that differ in
# their barriers and little else: one warp, several warps, one slice, several slices.
selected="small_vocabularies or several_grids or masked_rows or margin"
# Of the policy loss: with and without sums before the terms, several chains, warps and sequences.
selected+=" or backward or several_chains or no_sequences or alone or dapo or gspo"
# Of the values and advantages: several warps and blocks, groups by ids in a race for their leaders.
selected+=" or value_loss or bits_do_not or several_rewards or order or collide"
# Of the divergence: the passes of a row, the gradient over a row that is read.
selected+=" or blocks_and_grids or either_row"
tests+=(-k "$selected")
run thread libtsan.so
