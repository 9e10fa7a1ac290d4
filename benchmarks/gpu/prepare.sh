# Sourced by tests.sh, train.sh and sample.sh. Sets an import path without installing anything, and defines `limited`.
#
#   [OUT=gpu-results] [PYTHON=python3] [CARRIED=gpu-carried] [LIMIT=230] SCRIPT [--dry-run]
#
# CARRIED is the folder that `make gpu-wheels` fills. OUT receives the results, written case by case. LIMIT is the
# seconds that the script may take: what is not started by then is left out and said so. --dry-run goes through every
# case without a GPU and prints one line for each; OUT is then a temporary folder.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
python=${PYTHON:-python3} carried=${CARRIED:-gpu-carried} limit=${LIMIT:-230} dry=
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for argument in "$@"; do
  case $argument in
    --dry-run) dry=--dry-run; limit=${LIMIT:-3000} ;;
    *) echo "unknown option $argument" >&2; exit 2 ;;
  esac
done
out=${OUT:-gpu-results}
[ -z "$dry" ] || out=$work/out
mkdir -p "$out" "$work/site/strop" || exit 1
out=$(cd "$out" && pwd)
export DEADLINE=$(($(date +%s) + limit))
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error

# the package as setup.py maps it, and the wheels unpacked: an install takes longer and can fail
ln -s "$PWD"/trainer/api/* "$work/site/strop/"
ln -s "$PWD/kernels" "$PWD/trainer" "$work/site/strop/"
"$python" - "$carried" "$work/site" <<'UNPACK'
import pathlib, sys, zipfile
wheels = sorted(pathlib.Path(sys.argv[1]).glob("*.whl"))
for wheel in wheels:
    try:
        zipfile.ZipFile(wheel).extractall(sys.argv[2])
    except Exception as error:
        print(f"left out {wheel.name}: {error}")
print(f"{len(wheels)} wheels of {sys.argv[1]}" if wheels else f"no wheels in {sys.argv[1]}: make gpu-wheels")
UNPACK
export PYTHONPATH=$work/site:$PWD
[ ! -s "$carried/commit" ] || STROP_COMMIT=$(cat "$carried/commit")
export STROP_COMMIT=${STROP_COMMIT:-}
[ -n "$dry" ] || [ ! -s "$carried/_csrc.so" ] || cp "$carried/_csrc.so" kernels/_csrc.so

# limited LOG COMMAND...: runs it until the deadline, its output here and at the end of $out/LOG
limited() {
  local log=$out/$1 left=$((DEADLINE - $(date +%s))) status
  shift
  if [ "$left" -lt 5 ]; then
    echo "left out, $left s left: $*" | tee -a "$log"
    return 0
  fi
  timeout -k 5 "$left" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  [ "$status" -ne 124 ] || echo "stopped at the limit: $*" | tee -a "$log"
  return "$status"
}
