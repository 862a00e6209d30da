#!/bin/sh
# test.sh GPU_DAY: the program's own work, with small scripts in the place of gpu_rows, the tests, the peers and compute-sanitizer: no GPU
# is needed. Budget, resuming, failures, what is written.
set -eu
gpu_day=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/programs" "$work/tools"
fail() { echo "gpu_day: $*"; exit 1; }
script() { cat >"$1"; chmod +x "$1"; }
day() { PATH=$work/tools:$PATH "$gpu_day" --programs "$work/programs" --json "$work/day.json" "$@" >"$work/out" 2>&1; }
ran() { grep -c "  $1 *$2\$" "$work/out" || true; }

script "$work/programs/gpu_rows" <<'S'
#!/bin/sh
echo no CUDA device on this machine; exit 3
S
day || fail "without a device it must exit with 0"
grep -q 'no CUDA device' "$work/out" || fail "it must say that there is no device"
[ ! -e "$work/day.json" ] || fail "without a device it must write nothing"

script "$work/programs/gpu_rows" <<'S'
#!/bin/sh
case $1 in
  --device) echo '{"gpu":"Nothing 1","driver":"13.0","runtime":"13.0"}' ;;
  --limits) echo '{"limit":"copy by a kernel, bytes","per_second":1e12}'; echo '{"limit":"bfloat16","per_second":1e14}' ;;
  --list) echo linear ;;
  --operator) echo '{"operator":"linear","bytes":1e9,"operations":2e11,"peak":"bfloat16","row":"linear <1>","seconds":0.004}'
    echo '{"peer":"cuBLASLt","row":"linear <1>","seconds":0.0025}' ;;
esac
S
echo 'print("{\"row\":\"linear <1>\",\"peer\":\"PyTorch\",\"seconds\":0.005}")' >"$work/programs/peers.py"
for test in good bad slow; do
  script "$work/programs/${test}_test_cuda" <<S
#!/bin/sh
[ $test != bad ] || { echo it is wrong; exit 1; }
[ $test != slow ] || exec sleep 30
S
done
script "$work/tools/compute-sanitizer" <<'S'
#!/bin/sh
case "$*" in *slow_test_cuda*) exit 0 ;; esac
[ "$2" != racecheck ] || exit 9
S

day --budget 16 --jobs 2 && fail "a test failed, and it must say so"
[ "$(ran 'test good_test_cuda' passed)" = 1 ] || { cat "$work/out"; fail "a good test must pass"; }
[ "$(ran 'test bad_test_cuda' FAILED)" = 1 ] || fail "a bad test must fail"
[ "$(ran 'test slow_test_cuda' 'no time left')" = 1 ] || { cat "$work/out"; fail "what the budget stops is no result"; }
grep -q 'steps are left' "$work/out" || fail "it must say that steps are left"
grep -q 'it is wrong' "$work/day.json" || fail "the output of a failure must be kept"

# Three that race, all others done; the slow one is fast now.
printf '#!/bin/sh\n' >"$work/programs/slow_test_cuda"
day --budget 60 --jobs 2 && fail "failures of the first call must count"
[ "$(ran 'test good_test_cuda' passed)" = 0 ] || fail "what is done must not run again"
[ "$(ran 'test slow_test_cuda' passed)" = 1 ] || { cat "$work/out"; fail "what was stopped must run again"; }
[ "$(ran 'racecheck good_test_cuda' FAILED)" = 1 ] || fail "a finding of the sanitizer is a failure"
grep -q 'steps are left' "$work/out" && fail "nothing may be left"
grep -q '"share_of_limit": 0.5,' "$work/day.json" || { cat "$work/day.json"; fail "2e11 operations at 1e14 are half of 4 ms"; }
grep -q '"times_ours": 0.625' "$work/day.json" || fail "a peer's time over ours"
grep -q '80%, cuBLASLt' "$work/day.svg" || fail "the fastest peer is drawn"
grep -q 'linear &lt;1&gt;' "$work/day.svg" || fail "names must be escaped"

day --only '^memcheck' && fail "failures before count"
grep -q ' 3 steps, 3 of them done before' "$work/out" || { cat "$work/out"; fail "--only chooses among all steps"; }
sed -i 's/Nothing 1/Nothing 2/' "$work/programs/gpu_rows"
day && fail "results of another GPU must be refused"
grep -q 'is not of this GPU' "$work/out" || fail "it must say so"
rm "$work/programs/bad_test_cuda"
day --again --only '^test|^limits|^rows' || { cat "$work/out"; fail "with --again all passes"; }
echo "gpu_day: passed"
