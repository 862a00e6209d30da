#!/bin/sh
# check.sh [FOLDER]: compiles hot_kernels.cu for each architecture and compares what the compiler made of every kernel with table.txt and
# claims.txt. Needs nvcc and binutils; no GPU. Where table.txt is of another nvcc, numbers may differ and claims alone count.
#   check.sh --renew [FOLDER]             writes table.txt
#   ARCHITECTURES='sm_90' check.sh ...    these alone, of those in the table
# Registers, stack and spills are those that ptxas reports. Instructions are counted in the machine code: the opcodes are known from
# cuobjdump -sass, and where that tool is, its listing must give the same counts.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$here/../..
renew=no
if [ "${1:-}" = --renew ]; then renew=yes; shift; fi
work=${1:-$(mktemp -d)}
mkdir -p "$work"
architectures=${ARCHITECTURES:-sm_80 sm_90 sm_90a}
eigen=${EIGEN_INCLUDE_DIR:-/usr/include/eigen3}

compile() {  # architecture
  nvcc -std=c++20 -arch="$1" -cubin -Xptxas -v --Werror all-warnings --diag-suppress=20014 --expt-relaxed-constexpr -DEIGEN_USE_GPU \
    -DEIGEN_USE_THREADS -DEIGEN_MAX_ALIGN_BYTES=64 -I "$root/include" -isystem "$eigen" "$here/hot_kernels.cu" -o "$work/$1.cubin" \
    >"$work/$1.log" 2>&1 || { cat "$work/$1.log"; return 1; }
}

# "KERNEL REGISTERS SHARED STACK SPILLED", by its name in the object file. Shared is what a kernel has without being given it at the launch.
resources() {  # architecture
  awk '
    /Compiling entry function/ { split($0, quoted, "\047"); kernel = quoted[2] }
    /bytes stack frame/ { stack = $1; spilled = $5 + $9 }
    /Used [0-9]+ registers/ {
      match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5)
      shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
      if (kernel) print kernel, registers, shared, stack, spilled
      kernel = ""
    }' "$work/$1.log"
}

# "KERNEL LOADS STORES MMA LOCAL": loads and stores of 16 bytes, of addresses that the compiler knows to be global or not (copies to shared
# memory that pass the registers by are loads), products of tiles, and
# accesses to local memory. An instruction is 16 bytes; the last three digits of its first half are the opcode, the width of an access
# is in the third digit from the end of its second half.
instructions() {  # architecture
  readelf -SW "$work/$1.cubin" 2>/dev/null | sed -n 's/^ *\[ *[0-9]*\] \.text\.\([^ ]*\) *PROGBITS *[0-9a-f]* \([0-9a-f]*\) \([0-9a-f]*\) .*/\1 \2 \3/p' |
    while read -r kernel offset size; do
      od -An -v -tx8 -w16 -j "$((0x$offset))" -N "$((0x$size))" "$work/$1.cubin" | awk -v kernel="$kernel" '
        { opcode = substr($1, length($1) - 2); wide = substr($2, length($2) - 2, 1) ~ /[cd]/ }
        wide && opcode ~ /981|980|fae/ { ++loads }
        wide && opcode ~ /986|985/ { ++stores }
        opcode == "23c" || opcode == "237" { ++mma }
        opcode == "983" || opcode == "387" { ++local }
        END { print kernel, loads + 0, stores + 0, mma + 0, local + 0 }'
    done
}
instructions_of_cuobjdump() {  # architecture
  cuobjdump -sass "$work/$1.cubin" | awk '
    function finish() { if (kernel) print kernel, loads + 0, stores + 0, mma + 0, local + 0; loads = stores = mma = local = 0 }
    /Function :/ { finish(); kernel = $3 }
    / (LDG|LD|LDGSTS)\.E\.([A-Z]+\.)*128/ { ++loads }
    / STG?\.E\.([A-Z]+\.)*128/ { ++stores }
    / HMMA\.| IMMA\./ { ++mma }
    / LDL[. ]| STL[. ]/ { ++local }
    END { finish() }'
}

# One line for each kernel, its name as in the sources without namespaces.
rows() {  # architecture
  resources "$1" | sort >"$work/$1.resources"
  instructions "$1" | sort >"$work/$1.instructions"
  join "$work/$1.resources" "$work/$1.instructions" | c++filt |
    sed -E 's/^void //; s/signed char/int8/g; s/>\([^()]*(\([^()]*\)[^()]*)*\) ([0-9]+( [0-9]+){7})$/> \2/; s/[A-Za-z_][A-Za-z0-9_]*:://g; s/^run_kernel<(.*[^ ]) ?> ([0-9]+)/\1 \2/; s/ >/>/g; s/, /,/g' |
    awk -v architecture="$1" 'NF { printf "%-7s %9d %6d %5d %7d %5d %6d %3d %5d  %s\n", architecture, $2, $3, $4, $5, $6, $7, $8, $9, $1 }' | sort -k10
}

running=''
for architecture in $architectures; do
  compile "$architecture" & running="$running $!"
done
for process in $running; do wait "$process"; done
version=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
{
  echo "# What nvcc $version makes of the kernels of hot_kernels.cu. Written by tests/resources/check.sh --renew; compared by check.sh."
  echo "# spilled: bytes stored and loaded; loads, stores: those of 16 bytes; mma: products of tiles; local: accesses to local memory"
  echo "# arch    registers shared stack spilled loads stores mma local  kernel"
  for architecture in $architectures; do rows "$architecture"; done
} >"$work/table.txt"
[ "$(grep -vc '^#' "$work/table.txt")" -gt 0 ] || { echo "no kernel was read"; exit 1; }

failed=0
if command -v cuobjdump >/dev/null; then
  for architecture in $architectures; do
    instructions_of_cuobjdump "$architecture" | sort | diff "$work/$architecture.instructions" - >"$work/sass.diff" ||
      { head -n 20 "$work/sass.diff"; echo "check.sh counts other instructions ($architecture) than cuobjdump -sass"; failed=1; }
  done
fi
awk '
  FNR == NR { if (NF && $1 !~ /^#/) { claim[++claims] = $1; pattern[claims] = $2 }; next }
  /^#/ { next }
  {
    may_be_local = 0
    for (i = 1; i <= claims; ++i) {
      if ($10 !~ pattern[i]) continue
      ++seen[i]
      if (claim[i] == "local") may_be_local = 1
      if (claim[i] == "loads" && $6 == 0) { print $1, $10, "has no loads of 16 bytes"; bad = 1 }
      if (claim[i] == "stores" && $7 == 0) { print $1, $10, "has no stores of 16 bytes"; bad = 1 }
      if (claim[i] == "mma" && $8 == 0) { print $1, $10, "has no products of tiles"; bad = 1 }
    }
    if (!may_be_local && ($4 || $5 || $9)) { print $1, $10, "uses local memory:", $4, "bytes of stack,", $5, "spilled,", $9, "accesses"; bad = 1 }
  }
  END {
    for (i = 1; i <= claims; ++i) if (!seen[i]) { print "claims.txt speaks of " pattern[i] ", which no kernel is called"; bad = 1 }
    exit bad
  }' "$here/claims.txt" "$work/table.txt" || failed=1
if [ $renew = yes ]; then
  cp "$work/table.txt" "$here/table.txt"
elif ! grep -q "nvcc $version " "$here/table.txt"; then
  echo "table.txt is not of nvcc $version: its numbers were not compared"
elif ! grep -E "^($(echo "$architectures" | tr ' ' '|')) |^#" "$here/table.txt" | diff - "$work/table.txt"; then
  echo "tests/resources/table.txt (<) is not what nvcc $version makes of the kernels (>). If that is meant: sh tests/resources/check.sh --renew"
  failed=1
fi
[ $failed = 0 ] && echo "$(grep -vc '^#' "$work/table.txt") kernels as in tests/resources/table.txt"
exit $failed
