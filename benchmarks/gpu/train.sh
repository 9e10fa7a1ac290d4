#!/usr/bin/env bash
# Training steps beside TRL's, the optimizer, block sizes of attention, and kernels beside their peers. Options: see
# prepare.sh.
#
# All parts start at once and import side by side; each waits for the one before it before it touches the GPU, and then
# has the seconds named here to begin its cases, so that every part has its turn: 175 s in all.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
: >"$out/train.log"
limited train.log "$python" -m benchmarks.gpu.device $dry || exit 1
"$python" -m benchmarks.gpu.tiles --compile $dry >"$work/compile.log" 2>&1 &

before= names=()
part() { # NAME SECONDS MODULE ARGUMENTS...
  local name=$1 seconds=$2 after=$before
  shift 2
  before=$name names+=("$name")
  [ -z "$dry" ] || seconds=3000
  (
    timeout -k 5 $((DEADLINE - $(date +%s))) "$python" -m "$@" --out "$out" --seconds "$seconds" $dry \
      ${after:+--after "$work/$after.done"} 2>&1 | sed -u "s/^/$name: /" | tee -a "$out/train.log"
    echo "${PIPESTATUS[0]}" >"$work/$name.ended"
    mv "$work/$name.ended" "$work/$name.done"
  ) &
}
part strop 25 benchmarks.gpu.steps --side strop
part optimizer 8 benchmarks.gpu.optimizer
part tiles 15 benchmarks.gpu.tiles
part masters 32 benchmarks.gpu.steps --side "trl masters"
part autocast 32 benchmarks.gpu.steps --side "trl autocast"
part compiled 28 benchmarks.gpu.steps --side "strop compiled"
part kernels 35 benchmarks.gpu.kernels
failed=0
for name in "${names[@]}"; do
  until [ -e "$work/$name.done" ]; do sleep 0.2; done
  status=$(cat "$work/$name.done")
  echo "--- $name ended with $status, $SECONDS s so far" | tee -a "$out/train.log"
  [ "$status" = 0 ] || failed=1
done
exit "$failed"
