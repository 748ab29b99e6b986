#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests and measures rlkern in under ten minutes, without
# the network, in the clone itself. Nothing is installed. A stage that fails leaves the rest to run.
#
#   benchmarks/gpu.sh OUT             writes at most eight files into the folder OUT
#   benchmarks/gpu.sh OUT --dry-run   what works without a GPU, on tiny shapes: tests this script
set -u
if [[ $# -lt 1 || $1 == -* || ( $# -ge 2 && $2 != --dry-run ) ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
dry=0
[[ ${2:-} == --dry-run ]] && dry=1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
limit="${GPU_SH_SECONDS:-570}"
: > "$out/stages.tsv"

# note NAME RESULT SECONDS
note() { printf '%s\t%s\t%s\n' "$@" >> "$out/stages.tsv"; }

# stage NAME SECONDS COMMAND...: at most so long, and never past the limit of all together.
stage() {
  local name=$1 allowed=$2 begin=$SECONDS left code
  shift 2
  left=$((limit - SECONDS))
  if ((left < 10)); then
    note "$name" "skipped: no time left" 0
    return 1
  fi
  ((allowed > left)) && allowed=$left
  echo "== $name (at most $allowed s)"
  timeout -k 5 "$allowed" "$@" > "$out/$name.log" 2>&1
  code=$?
  case $code in
    0) note "$name" ok $((SECONDS - begin)) ;;
    124 | 137) note "$name" "stopped after $allowed s" $((SECONDS - begin)) ;;
    *) note "$name" "failed, see $name.log" $((SECONDS - begin)) ;;
  esac
  tail -n 3 "$out/$name.log"
  return $code
}

# skip NAME WHY
skip() {
  echo "== $1: skipped, $2"
  note "$1" "skipped: $2" 0
}

{
  date -u
  "$python" --version
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  "$python" -c 'import triton; print("triton", triton.__version__)'
  nvcc --version
  nvidia-smi
  git rev-parse HEAD
} > "$out/environment.txt" 2>&1

if ((dry)); then
  device=cpu
  skip build "a dry run"
else
  device=cuda
  # For the GPU that is here alone: a third of the time.
  arch="$("$python" - <<'PY'
import torch
major, minor = torch.cuda.get_device_capability()
print({(9, 0): "9.0a", (10, 0): "10.0f"}.get((major, minor), f"{major}.{minor}"))
PY
)"
  stage build 170 env RLKERN_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="${arch:-9.0a}" \
    "$python" setup.py build_ext --inplace
fi

if ((dry)); then
  stage tests 60 "$python" -m pytest tests/cuda/test_gpu.py -m gpu -q -p no:cacheprovider
else
  # Triton's compiler takes most of the time.
  parallel=()
  "$python" -c 'import xdist' 2> /dev/null && parallel=(-n 4)
  stage tests 150 "$python" -m pytest tests -m gpu -q -p no:cacheprovider \
    --continue-on-collection-errors ${parallel[@]+"${parallel[@]}"}
fi

if ((dry)); then
  stage sanitizer 60 "$python" -m benchmarks.gpu.small_cases
elif command -v compute-sanitizer > /dev/null; then
  # Of our kernels alone: to instrument torch's takes longer than the rest of this script.
  stage sanitizer 90 bash -c 'for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 45 compute-sanitizer --tool "$tool" \
      --kernel-name kns=rlkern --error-exitcode 9 "$0" -m benchmarks.gpu.small_cases || exit
    done' "$python"
else
  skip sanitizer "compute-sanitizer was not found"
fi

left=$((limit - SECONDS - 15))
if ((dry)); then
  stage bench 120 "$python" -m benchmarks.gpu.run --out "$out" --device cpu --tiny
else
  stage bench $((left + 10)) "$python" -m benchmarks.gpu.run --out "$out" --device "$device" \
    --seconds "$left"
fi

echo
"$python" -m benchmarks.gpu.summary "$out"
