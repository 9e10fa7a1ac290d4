#!/usr/bin/env bash
# Training steps beside TRL's, kernels beside their peers, and block sizes of attention. Options: see prepare.sh.
#
# All parts start at once and import side by side; each waits for the one before it before it touches the GPU.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
: >"$out/train.log"
limited train.log "$python" -m benchmarks.gpu.device $dry || exit 1
"$python" -m benchmarks.gpu.tiles --compile $dry >"$work/compile.log" 2>&1 &

before=
part() { # NAME MODULE ARGUMENTS...
  local name=$1 after=$before
  shift
  before=$name
  (
    timeout -k 5 $((DEADLINE - $(date +%s))) "$python" -m "$@" --out "$out" $dry \
      ${after:+--after "$work/$after.done"} 2>&1 | sed -u "s/^/$name: /" | tee -a "$out/train.log"
    echo "${PIPESTATUS[0]}" >"$work/$name.ended"
    mv "$work/$name.ended" "$work/$name.done"
  ) &
}
part compiled benchmarks.gpu.steps --side "strop compiled"
part strop benchmarks.gpu.steps --side strop
part masters benchmarks.gpu.steps --side "trl masters"
part kernels benchmarks.gpu.kernels
part tiles benchmarks.gpu.tiles
part autocast benchmarks.gpu.steps --side "trl autocast"
failed=0
for name in compiled strop masters kernels tiles autocast; do
  until [ -e "$work/$name.done" ]; do sleep 0.2; done
  status=$(cat "$work/$name.done")
  echo "--- $name ended with $status, $SECONDS s so far" | tee -a "$out/train.log"
  [ "$status" = 0 ] || failed=1
done
exit "$failed"
