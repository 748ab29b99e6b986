#!/usr/bin/env bash
# Runs the CUDA kernels' bodies on the CPU under the address and undefined-behaviour sanitizers, then
# under the thread sanitizer, where a missing barrier shows as a race. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python}"
tests=(tests/cuda/test_emulated.py -q -p no:cacheprovider -p no:xdist "$@")

run() {
  local sanitizer="$1" library="$2"
  echo "== $sanitizer sanitizer"
  # Python and torch keep memory until they exit; only what the kernels do is of interest. setarch:
  # the thread sanitizer of older compilers does not find room under a wide address randomisation.
  RLKERN_EMULATE_SANITIZE="$sanitizer" LD_PRELOAD="$(g++ -print-file-name="$library")" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 \
    "${wrap[@]}" "$python" -m pytest "${tests[@]}"
}

wrap=()
if setarch "$(uname -m)" -R true 2>/dev/null; then wrap=(setarch "$(uname -m)" -R); fi
run address libasan.so
# Threads are what is looked at here, and each costs the sanitizer much: one slice suffices.
tests+=(-k "not 40000 and not 33000 and not slices")
run thread libtsan.so
