#!/usr/bin/env bash
# Tokens per second of the sampler. Options: see prepare.sh.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
: >"$out/sample.log"
limited sample.log "$python" -m benchmarks.gpu.device $dry || exit 1
limited sample.log "$python" -m benchmarks.gpu.sampling --out "$out" $dry
