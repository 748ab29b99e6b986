#!/usr/bin/env bash
# Builds the CPU library under the address and undefined-behaviour sanitizers and runs the native
# tests on it. $1: the environment's bin folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(cd "${1:-.venv/bin}" && pwd)
lib=$PWD/build/sanitize/lib

PATH="$bin:$PATH" RLKERN_SANITIZE=1 RLKERN_BUILD_CUDA=0 RLKERN_STRICT=1 \
  "$bin/python" setup.py -q build --build-base build/sanitize --build-lib "$lib"

# Python itself is not built with the sanitizers, so their runtimes come first by LD_PRELOAD; its
# own leaks at exit, and torch's mixed allocators, are not what is looked for.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$lib"
# Away from the source folder, which `-c` would put first.
(cd build && "$bin/python" -c "import rlkern, sys; sys.exit('/build/sanitize/' not in rlkern.__file__)")
# By test id: those of native backends, and those that call native operators without saying so.
# Compiled graphs start compilers, which the preloaded runtime slows to a crawl.
"$bin/pytest" tests/ops tests/losses tests/advantages -q \
  -k "((native or million_rewards or random_batches or operator or handed_out) \
    and not inductor and not compile) or guard or refused"
