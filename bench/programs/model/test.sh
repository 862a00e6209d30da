#!/bin/sh
# Runs the programs on the trained model beside the repository: test.sh FOLDER_OF_PROGRAMS
set -eu
programs=$1
model=${EIGENFORMER_MODELS:-$(dirname "$0")/../../../../shared/models}/stories260K
if [ ! -e "$model/config.json" ]; then
  echo "SKIPPED: there is no $model"
  exit 77
fi
fail() { echo "FAILED: $1"; exit 1; }
for path in "$model" "$model/model.gguf"; do
  text=$("$programs/generate" --model "$path" --tokens 256)
  [ "$text" = "$(cat "$model/greedy.txt")" ] || fail "generate --model $path wrote: $text"
done
"$programs/generate" --model "$model" --prompt "Once upon a time" --tokens 20 --temperature 0.8 --top-k 40 --top-p 0.9 --seed 3 --json --int8 |
  grep -q '"ids":\[' || fail "generate --json"
float=$("$programs/perplexity" --model "$model" --text "$model/greedy.txt" --json | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')
int8=$("$programs/perplexity" --model "$model" --text "$model/greedy.txt" --json --int8 | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')
echo "perplexity of the published text: float $float, INT8 $int8"
awk "BEGIN { exit !($float > 1 && $float < 2 && $int8 / $float < 1.005 && $int8 / $float > 0.995) }" || fail "perplexity"
if "$programs/generate" --model "$model/none" 2>/dev/null; then fail "a model that is not there"; fi
if "$programs/generate" --nonsense 2>/dev/null; then fail "an unknown option"; fi
"$programs/generate" --help | grep -q -- --prompt || fail "generate --help"
echo "passed"
