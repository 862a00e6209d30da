#!/bin/sh
# Fuzzes the readers of model files: sh tests/fuzz/run.sh [seconds for each, default 600] [name...]
# Builds each tests/fuzz/NAME_fuzz.cpp with libFuzzer and the sanitizers and runs it from the files of tests/golden. What it finds
# lies in build/fuzz, as does the corpus, which the next run goes on with. Needs clang (CLANG, default clang++-16).
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:-600}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- $(ls tests/fuzz/*_fuzz.cpp | sed 's|.*/||; s|_fuzz\.cpp||')
build=${EIGENFORMER_FUZZ_DIR:-build/fuzz}
mkdir -p "$build"
for name in "$@"; do
  "${CLANG:-clang++-16}" -std=c++20 -O1 -g1 -pthread -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DEIGEN_USE_THREADS \
    -DEIGEN_MAX_ALIGN_BYTES=64 -DEIGENFORMER_GOLDEN_DIR="\"$PWD/tests/golden\"" -I include -isystem /usr/include/eigen3 "tests/fuzz/${name}_fuzz.cpp" -lpcre2-8 -o "$build/$name"
  mkdir -p "$build/$name.corpus" "$build/$name.seeds"
  find tests/golden -name "*.$name" -size -64k -exec cp {} "$build/$name.seeds" \;
  "$build/$name" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1 \
    -artifact_prefix="$build/$name." "$build/$name.corpus" "$build/$name.seeds"
done
