#!/bin/sh
# check.sh FILE COMPILER [FLAGS...]: FILE must not compile, and the errors must contain every line of FILE that begins with "// expect: ".
# A file with "// expect-success" must compile: it shows that the flags are right. "// flags: " adds some.
file=$1
shift
# shellcheck disable=SC2046
output=$("$@" $(sed -n 's|^// flags: ||p' "$file") -fsyntax-only "$file" 2>&1)
status=$?
if grep -q '^// expect-success' "$file"; then
  [ $status = 0 ] && exit 0
  printf '%s\n' "$output"
  echo "$file must compile, but does not"
  exit 1
fi
if [ $status = 0 ]; then
  echo "$file compiles, but must not"
  exit 1
fi
missing=0
sed -n 's|^// expect: ||p' "$file" >"${TMPDIR:-/tmp}/expect.$$"
while IFS= read -r line; do
  if ! printf '%s\n' "$output" | grep -qF -- "$line"; then
    echo "missing from the errors: $line"
    missing=1
  fi
done <"${TMPDIR:-/tmp}/expect.$$"
[ -s "${TMPDIR:-/tmp}/expect.$$" ] || { echo "$file expects nothing"; missing=1; }
rm -f "${TMPDIR:-/tmp}/expect.$$"
[ $missing = 0 ] || printf '%s\n' "$output" | head -n 30
exit $missing
