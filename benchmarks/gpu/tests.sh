#!/usr/bin/env bash
# The tests that need a GPU, of kernels and trainer, on all cores. Options: see prepare.sh.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
: >"$out/tests.log"
limited tests.log "$python" -m benchmarks.gpu.device $dry || exit 1
# only files with such tests: collecting the others needs packages that are not carried
mapfile -t files < <(grep -lE 'pytest\.mark\.gpu' -r tests --include='test_*.py' | sort)
workers=8
[ -z "$dry" ] || workers=2
limited tests.log "$python" -m pytest "${files[@]}" -m gpu -n "$workers" --dist worksteal -v -rfEs --tb=short \
  -p no:cacheprovider ${dry:+-p benchmarks.gpu.dry_tests}
status=$?
echo "tests ended with $status after $SECONDS s" | tee -a "$out/tests.log"
exit "$status"
