#!/bin/sh
# runs_on.sh: every problem that a CPU kernel executes is one of runs_on.cu, which asks the compiler for its CUDA kernel.
cd "$(dirname "$0")/../.." || exit 1
missing=0
for problem in $(find include/eigenformer/cpu -name '*.h' -exec cat {} + | grep -v '^ *//' | tr -s '\n ' ' ' |
  grep -oE 'execute\(const Backend<D, Isa>&( on)?, const problem::[A-Za-z0-9]+' | sed 's/.*:://' | sort -u); do
  grep -qE "part<$problem[<>]" tests/compile/runs_on.cu || { echo "tests/compile/runs_on.cu lacks the problem $problem"; missing=1; }
done
exit $missing
