#!/bin/sh
# What end_to_end --save keeps is a model for the other programs: saved_test.sh FOLDER_OF_PROGRAMS SAVED TEXT_IT_LEARNED
set -eu
programs=$1 saved=$2 text=$3
fail() { echo "FAILED: $1"; exit 1; }
# Its tokens are bytes, and none ends a text. An untrained model has a perplexity of about 256.
ids=$("$programs/generate" --model "$saved" --prompt 'Aé' --tokens 16 --json) || fail "generate"
echo "$ids" | grep -q '"prompt_ids":\[65,195,169\]' || fail "bytes as tokens: $ids"
[ "$("$programs/generate" --model "$saved" --int8 --prompt 'You may' --tokens 200 --ids | wc -w)" = 200 ] || fail "200 tokens"
again=$(mktemp -d)
trap 'rm -rf "$again"' EXIT
"$programs/quantize" "$saved" "$again/packed" >/dev/null || fail "quantize"
[ "$("$programs/generate" --model "$again/packed" --prompt 'You may' --tokens 200 --ids)" = "$("$programs/generate" --model "$saved" --int8 --prompt 'You may' --tokens 200 --ids)" ] || fail "a packed model writes another text"
perplexity=$("$programs/perplexity" --model "$saved" --text "$text" --json | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')
echo "perplexity of $text: $perplexity"
awk "BEGIN { exit !($perplexity > 1 && $perplexity < 3) }" || fail "perplexity"
# It is read back whole, and a model of another make is not.
"$programs/end_to_end" --load "$saved" --save "$again" >/dev/null || fail "end_to_end --load"
for file in config.json model.safetensors tokenizer.json; do cmp "$saved/$file" "$again/$file" || fail "$file has changed"; done
sed -i 's/"rope_theta": 10000.0/"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}/' "$again/config.json"
if "$programs/end_to_end" --load "$again" 2>"$again/said"; then fail "a model that end_to_end cannot serve"; fi
grep -q 'another model' "$again/said" || fail "$(cat "$again/said")"
echo "passed"
