#!/bin/sh
# names.sh: every test, file and folder that the README names exists. Names with X or NAME in them stand for many.
cd "$(dirname "$0")/../../.." || exit 1
missing=0
say() { echo "README.md names $1, which does not exist"; missing=1; }
for name in $(grep -oE '`[A-Z][A-Za-z0-9]+\.[A-Z][A-Za-z0-9]+`' README.md | tr -d '`' | sort -u); do
  git grep -qE "TEST(_[FP])?\(${name%.*}, ${name#*.}\)" -- tests bench || say "the test $name"
done
{
  grep -oE '`[a-z.][a-z0-9_./-]*(/|\.h|\.cuh|\.cpp|\.cmake|\.sh|\.txt)`|`(tests|bench|cmake)/[a-z0-9_/]+`' README.md | tr -d '`'
  grep -oE 'cmake/[a-z_]+\.sh|\.ci/run' README.md
  grep -oE '\]\([^)#:]+\)' README.md | sed 's/^](//; s/)$//'
} | sort -u | {
  while read -r path; do
    [ -e "$path" ] || [ -e "include/eigenformer/$path" ] || say "$path"
  done
  exit $missing
} || missing=1
exit $missing
