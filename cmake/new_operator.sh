#!/bin/sh
# A new operator that builds and passes at once: sh cmake/new_operator.sh NAME
# It is `embedding`, the smallest complete one, under another name, with a file in every room and a line in every list.
set -eu
cd "$(dirname "$0")/.."
from=embedding type=Embedding

refuse() { printf 'new_operator: %s\n' "$*" >&2; exit 1; }
[ $# = 1 ] || refuse 'usage: sh cmake/new_operator.sh NAME'
name=$1
case $name in
  '' | [!a-z]* | *[!a-z0-9_]* | *__* | *_) refuse "'$name' is no name for an operator: lower-case words joined by _, such as group_norm" ;;
esac
new_type=$(printf '%s' "$name" | awk -F_ '{ for (i = 1; i <= NF; ++i) printf "%s%s", toupper(substr($i, 1, 1)), substr($i, 2) }')
renamed() {  # its helpers too, which no two headers may both define
  sed -e "s/$from/$name/g" -e "s/$type/$new_type/g" -e "s/ids_input/${name}_ids/g" -e "s/TokenId/${new_type}Id/g"
}

# ---- what would go wrong is told before anything is written -------------------------------------------------------------------
printf 'namespace eigenformer { void %s(); struct %s; }\n' "$name" "$new_type" | ${CXX:-c++} -x c++ -fsyntax-only - 2>/dev/null ||
  refuse "'$name' means something else in C++"
files=$(find include tests bench -type f \( -name $from.h -o -name $from.cuh -o -name ${from}_bench.cpp -o -path "*/$from/*" \))
for file in $files; do
  copy=$(printf '%s' "$file" | renamed)
  [ ! -e "$copy" ] || refuse "$copy exists already"
done
if used=$(grep -rnEm1 "\b$name(_into)?\(|\b$new_type\b" include); then
  refuse "the library has a '$name' or a '$new_type' already: $(printf '%s' "$used" | head -n 1 | cut -d : -f 1,2)"
fi
lists='cmake/operators.cmake include/eigenformer/eigenformer.h include/eigenformer/cuda/kernels.cuh README.md'
line="^(eigenformer_operator\(${from}[ )]|#include \"$from\.(h|cuh)\"|\| \`$from\.h\`)"
for list in $lists; do
  [ "$(grep -cE "$line" "$list")" = 1 ] || refuse "$list has not one line of $from that could be copied"
done

# ---- files, then lists --------------------------------------------------------------------------------------------------------
for file in $files; do
  copy=$(printf '%s' "$file" | renamed)
  mkdir -p "$(dirname "$copy")"
  renamed <"$file" >"$copy"
  echo "$copy"
done
for list in $lists; do
  sed -E "/$line/{p;s/$from/$name/g;}" "$list" >"$list.new"  # the line twice, then under the new name
  cat "$list.new" >"$list"
  rm "$list.new"
  echo "$list"
done
table=tests/compile/runs_on.cu  # one line for each problem
{
  while IFS= read -r row; do
    printf '%s\n' "$row"
    case $row in
      *"(\"$from\","* | "#include <eigenformer/problem/$from.h>") printf '%s\n' "$row" | renamed ;;
    esac
  done <$table
} >$table.new
cat $table.new >$table
rm $table.new
echo $table
if command -v clang-format-16 >/dev/null; then  # a longer name breaks lines elsewhere
  printf '%s\n' include/eigenformer/eigenformer.h include/eigenformer/cuda/kernels.cuh tests/compile/runs_on.cu "$files" | renamed | xargs clang-format-16 -i
fi
