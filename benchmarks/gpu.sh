#!/usr/bin/env bash
# GPU tests and the whole benchmark suite on a machine with one GPU and no network, in under 9 minutes.
#
#   [OUT=FOLDER] [PYTHON=python3] benchmarks/gpu.sh [--dry-run] [WHEELS]
#
# PYTHON has torch and triton. WHEELS is a folder of wheels (pytest, pytest-benchmark, transformers, liger-kernel,
# cut_cross_entropy, trl, quack_kernels, ...); each is installed without its dependencies where it can be. Peers that do
# not import are listed with their reasons. OUT (default: gpu-results) receives the logs and <device>/<date>.json, which
# belongs into benchmarks/results/. --dry-run takes the same steps on a CPU, with one small case.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-gpu-results}
dry=
wheels=
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 ;;
    -*) echo "unknown option $argument" >&2; exit 2 ;;
    *) wheels=$argument ;;
  esac
done
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then
  echo "no folder $wheels" >&2
  exit 2
fi
mkdir -p "$out" || exit 1
export HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_BREAK_SYSTEM_PACKAGES=1
failed=0

# limited SECONDS LOG COMMAND...: runs it under the limit, its output into the log and its last lines here
limited() {
  local limit=$1 log=$out/$2 status
  shift 2
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  status=$?
  tail -n 3 "$log"
  [ "$status" -ne 124 ] || echo "stopped after $limit s: $*"
  return "$status"
}

# The limits add up to 525 s: 20 + 20 + 75 + 110 + 300.
echo "--- device"
if [ -z "$dry" ]; then
  limited 20 device.log "$python" -c '
import torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)' || { echo "no usable GPU" >&2; exit 1; }
fi

echo "--- wheels ($SECONDS s so far)"
if [ -n "$wheels" ]; then
  # One by one: a wheel that does not fit costs itself alone.
  # shellcheck disable=SC2016
  limited 20 wheels.log bash -c 'for wheel in "$2"/*.whl; do
    "$1" -m pip install --quiet --no-deps --no-index "$wheel" || echo "left out: $(basename "$wheel")"
  done' wheels "$python" "$wheels"
fi

echo "--- Strop ($SECONDS s so far)"
if [ -z "$dry" ]; then
  limited 75 install.log "$python" -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
fi

echo "--- GPU tests ($SECONDS s so far)"
limited 110 tests.log "$python" -m pytest tests -m gpu -p no:cacheprovider ${dry:+--collect-only} || {
  # 5: no test was selected
  [ $? -eq 5 ] || failed=1
}

echo "--- benchmarks ($SECONDS s so far)"
limited 300 suite.log "$python" -m benchmarks --results "$out" ${dry:+preference/.*sigmoid} || failed=1
compgen -G "$out/*/????-??-??.json" || failed=1

echo "--- done in $SECONDS s"
exit "$failed"
