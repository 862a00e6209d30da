#!/bin/sh
# each_line.sh FILE COMPILER [FLAGS...]: every line of FILE that begins with "  ef::" and a small
# letter must not compile, and the first error of each must be one of eigenformer's messages; a line
# that ends with "// expect: " and a text must not either, and its first error must have that text.
# An error in a header belongs to the line that its "required from here" names.
file=$1
shift
"$@" -fsyntax-only "$file" 2>&1 | awk -v file="$file" '
  BEGIN {
    while ((getline line < file) > 0) {
      ++number
      at = index(line, "// expect: ")
      if (at == 0 && line !~ /^  ef::[a-z]/) continue
      wanted[number] = line
      text[number] = at ? substr(line, at + 11) : "eigenformer: "
      ++lines
    }
  }
  {
    at = index($0, file ":")
    if (at > 0) { split(substr($0, at + length(file) + 1), place, ":"); here = place[1] + 0 }
    if ($0 ~ /error: /) {
      ++errors
      if (!(here in first)) first[here] = $0
    }
  }
  END {
    for (n in wanted) {
      if (!(n in first)) { print "compiles, but must not: " wanted[n]; bad = 1 }
      else if (index(first[n], text[n]) == 0) {
        print wanted[n]; print "  begins with: " first[n]; bad = 1
      }
    }
    print lines " lines, " errors " errors"
    exit bad || lines == 0
  }'
