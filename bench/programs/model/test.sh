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
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for path in "$model" "$model/model.gguf"; do
  text=$("$programs/generate" --model "$path" --tokens 256)
  [ "$text" = "$(cat "$model/greedy.txt")" ] || fail "generate --model $path wrote: $text"
done
"$programs/generate" --model "$model" --prompt "Once upon a time" --tokens 20 --temperature 0.8 --top-k 40 --top-p 0.9 --seed 3 --json --int8 |
  grep -q '"ids":\[' || fail "generate --json"
float=$("$programs/perplexity" --model "$model" --text "$model/greedy.txt" --json | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')
int8=$("$programs/perplexity" --model "$model" --text "$model/greedy.txt" --json --int8 | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')
int4=$("$programs/perplexity" --model "$model" --text "$model/greedy.txt" --json --int4 | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')
echo "perplexity of the published text: float $float, INT8 $int8, INT4 $int4"
awk "BEGIN { exit !($float > 1 && $float < 2 && $int8 / $float < 1.005 && $int8 / $float > 0.995) }" || fail "perplexity of INT8"
awk "BEGIN { exit !($int4 / $float < 1.05 && $int4 / $float > 0.95) }" || fail "perplexity of INT4"
# A second start maps what the first packed.
for start in first second; do
  [ "$("$programs/generate" --model "$model" --int8 --cache "$work/kept" --tokens 40 --ids)" = "$("$programs/generate" --model "$model" --int8 --tokens 40 --ids)" ] ||
    fail "generate --cache, $start start"
done
[ -s "$work/kept" ] || fail "generate --cache kept nothing"
echo "no model" >"$work/letter"
if "$programs/generate" --model "$model" --cache "$work/letter" --tokens 4 2>/dev/null; then fail "generate --cache over another file"; fi
[ "$(cat "$work/letter")" = "no model" ] || fail "generate --cache has changed another file"
# A cache that cannot be written is said, and no more.
[ "$("$programs/generate" --model "$model" --cache "$work/none/kept" --tokens 9 --ids 2>"$work/said")" = "$("$programs/generate" --model "$model" --tokens 9 --ids)" ] ||
  fail "generate --cache where none can be written"
[ "$(grep -c 'kept: cannot be written: there is no folder' "$work/said")" = 1 ] || fail "generate --cache said $(cat "$work/said")"
# A packed model is all that the programs need.
for from in "$model" "$model/model.gguf"; do
  for format in "" "--int4 --group 64" --as-stored "--bf16 --int8"; do
    "$programs/quantize" "$from" "$work/model.packed" $format --json | grep -q '"packed_bytes":[1-9]' || fail "quantize $from $format"
    written=$("$programs/generate" --model "$work/model.packed" --tokens 60 --prompt "Once" --ids)
    [ "$written" = "$("$programs/generate" --model "$from" ${format:---int8} --tokens 60 --prompt "Once" --ids)" ] || fail "generate --model of $from packed $format: $written"
  done
done
"$programs/quantize" "$model" "$work/model.packed" | grep -q MB || fail "quantize"
[ "$("$programs/perplexity" --model "$work/model.packed" --text "$model/greedy.txt" --json | sed 's/.*"perplexity":\([0-9.]*\).*/\1/')" = "$int8" ] || fail "perplexity of a packed model"
"$programs/model_bench" --model "$work/model.packed" --threads 1 --prompt-tokens 2 --decode-tokens 2 --repetitions 1 --json | grep -q '"test":"decode"' || fail "model_bench of a packed model"
if "$programs/generate" --model "$work/model.packed" --int4 --tokens 1 2>"$work/said"; then fail "a packed model in another format"; fi
grep -q 'int8' "$work/said" || fail "$(cat "$work/said")"
if "$programs/quantize" "$model" "$work/letter" 2>/dev/null; then fail "quantize over another file"; fi
[ "$(cat "$work/letter")" = "no model" ] || fail "quantize has changed another file"
if "$programs/quantize" "$model" "$work/none/model.packed" 2>"$work/said"; then fail "quantize into a folder that is not there"; fi
grep -q 'there is no folder' "$work/said" || fail "quantize said $(cat "$work/said")"
if "$programs/quantize" "$model" "$work" 2>"$work/said"; then fail "quantize into a folder"; fi
grep -q 'a folder has this name' "$work/said" || fail "quantize said $(cat "$work/said")"
if "$programs/quantize" "$model" "$work/packed.gguf" 2>/dev/null || [ -e "$work/packed.gguf" ]; then fail "quantize into a file that would be read as GGUF"; fi
if "$programs/quantize" "$model" 2>/dev/null; then fail "quantize without a file to write"; fi
if "$programs/quantize" "$work/model.packed" "$work/twice" 2>/dev/null; then fail "quantize of a packed model"; fi
[ -z "$(find "$work" -name '*.partial' -o -name twice)" ] || fail "quantize left a part of a file"
"$programs/quantize" --help | grep -q OUT || fail "quantize --help"
# A text longer than the context, and one that ends there.
[ "$("$programs/generate" --model "$model" --context 30 --ids | wc -w)" = 29 ] || fail "generate --context"
if "$programs/generate" --model "$model" --prompt "$(cat "$model/greedy.txt")" --context 30 2>"$work/said"; then fail "a prompt past the context"; fi
grep -q 'context 30: --context' "$work/said" || fail "a prompt past the context: $(cat "$work/said")"
# Rotations are those of a text as long as the context: short factors of 1 are the model's own, long ones are not.
mkdir "$work/longrope"
cp "$model/model.safetensors" "$model/tokenizer.json" "$work/longrope"
sed 's/"rope_theta": 10000.0,/&"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [9, 9, 9, 9], "factor": 1, "original_max_position_embeddings": 64},/' "$model/config.json" >"$work/longrope/config.json"
grep -q longrope "$work/longrope/config.json" || fail "the configuration has another rope_theta"
short=$("$programs/generate" --model "$model" --context 40 --ids)
[ "$("$programs/generate" --model "$work/longrope" --context 40 --ids)" = "$short" ] || fail "short factors of a short context"
[ "$("$programs/generate" --model "$work/longrope" --tokens 39 --ids)" != "$short" ] || fail "long factors of a long context"
tail -c 400 "$model/greedy.txt" >"$work/end"
short=$("$programs/perplexity" --model "$model" --text "$work/end" --window 64 --json | sed 's/"tokens_per_second.*//')
[ "$("$programs/perplexity" --model "$work/longrope" --text "$work/end" --window 64 --json | sed 's/"tokens_per_second.*//')" = "$short" ] || fail "short factors of a short window"
# A chat: what the second message's text shares with the first and its answer is not computed again.
if "$programs/generate" --model "$model" --chat --prompt Hello 2>/dev/null; then fail "a chat without a template"; fi
mkdir "$work/chat"
cp "$model/config.json" "$model/model.safetensors" "$model/tokenizer.json" "$work/chat"
printf '%s' '{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}' >"$work/chat/chat_template.jinja"
echo '{"bos_token": "<s>", "eos_token": "</s>"}' >"$work/chat/special_tokens_map.json"
printf 'Tell me of a dog\n\nAnd then?\n' | "$programs/generate" --model "$work/chat" --chat --system "Be brief" --tokens 12 --json >"$work/answers"
[ "$(wc -l <"$work/answers")" = 2 ] || fail "generate --chat: $(cat "$work/answers")"
reused=$(sed -n '2s/.*"prompt_tokens_reused":\([0-9]*\).*/\1/p' "$work/answers")
first=$(sed -n '1s/.*"prompt_ids":\[\([^]]*\).*/\1/p' "$work/answers" | tr , '\n' | wc -l)
[ "$reused" = $((first + 11)) ] || fail "generate --chat found $reused tokens in its cache, of $first and 12"
"$programs/generate" --model "$work/chat" --chat --prompt "Hello" --tokens 5 >"$work/answer" || fail "generate --chat --prompt"
# Ctrl-C ends a prompt between two chunks, with a summary; a second one the program, here while a chunk takes it seconds. (In the
# background a shell has it ignored until the program has a handler.)
for i in $(seq 200); do tr '\n' ' ' <"$model/greedy.txt"; done >"$work/long"
"$programs/generate" --model "$model" --prompt "$(cat "$work/long")" --context 1000000 --threads 1 >/dev/null 2>"$work/said" &
until grep -q 'SigCgt:.*[2367abef]$' /proc/$!/status; do sleep 0.01; done
kill -INT $!
wait $! || fail "generate, interrupted, has status $?"
grep -q '^stopped: [0-9]* tokens of prompt .*, 0 written' "$work/said" || fail "generate, interrupted, said $(cat "$work/said")"
for i in 1 2; do cat "$work/long"; done | "$programs/generate" --model "$work/chat" --chat --context 1000000 --chunk 1000000 --threads 1 >/dev/null 2>&1 &
while kill -INT $! 2>/dev/null; do sleep 0.05; done
status=0
wait $! || status=$?
[ $status = 130 ] || fail "generate, interrupted twice, has status $status"
# The bench, and a peer that is given the same work.
"$programs/model_bench" --model "$model" --threads 1 --prompt-tokens 20 --decode-tokens 3 --batch 2 --repetitions 2 --int8 >"$work/table"
[ "$(awk '$4 + 0 > 0 && $5 ~ /^([0-9.]+%|-)$/ { print $1, $2, $3 }' "$work/table" | tr '\n' ',')" = "prefill 1 20,decode 1 3,decode 2 3," ] ||
  fail "model_bench: $(cat "$work/table")"
mkdir "$work/it's"
peer="$work/it's/llama-bench"
printf '#!/bin/sh\necho "$*" >"%s/asked"\ncat "%s/rates"\n' "$work" "$work" >"$peer"
chmod +x "$peer"
bench_beside_peer() { "$programs/model_bench" --model "$model/model.gguf" --threads 1 --decode-tokens 3 --repetitions 1 --peer "$peer" "$@"; }
echo '[{"model_type":"a","n_gen":0,"samples_ts":[1,5,2]},{"model_type":"a","n_gen":3,"samples_ts":[0.5]}]' >"$work/rates"
bench_beside_peer --json >"$work/row" || fail "model_bench --peer"
[ "$(cat "$work/asked")" = "-m $model/model.gguf -t 1 -p 512 -n 3 -r 1 -ngl 0 -o json" ] || fail "model_bench asked its peer for $(cat "$work/asked")"
grep -q '"test":"prefill".*"peer_tokens_per_second":{"llama.cpp":2.0}.*"test":"decode".*"peer_tokens_per_second":{"llama.cpp":0.5}' "$work/row" || fail "model_bench --peer: $(cat "$work/row")"
# Several sequences, by the program beside it; a second run has rows of its own in the results, which are drawn.
printf '#!/bin/sh\necho "$*" >"%s/asked"\necho "a heading"\necho "{\\"speed_tg\\":4.0}"\n' "$work" >"$work/it's/llama-batched-bench"
chmod +x "$work/it's/llama-batched-bench"
bench_beside_peer --batch 2 --results "$work/results" >"$work/table" || fail "model_bench --batch --peer"
[ "$(cat "$work/asked")" = "-m $model/model.gguf -t 1 -c 512 -npp 1 -ntg 3 -npl 2 -ngl 0 --output-format jsonl" ] || fail "model_bench asked for $(cat "$work/asked")"
[ "$(awk '$1 == "decode" && $2 == 2 { print $6 }' "$work/table")" = 4.00 ] || fail "model_bench --batch --peer: $(cat "$work/table")"
for again in 1 2; do bench_beside_peer --int8 --peer "other=$peer" --results "$work/results" --peers-svg "$work/drawn" >"$work/table" || fail "model_bench --results"; done
[ "$(grep -c '"operator":"model"' "$work/results")" = 5 ] || fail "model_bench --results: $(cat "$work/results")"
[ "$(grep -c '"name":"other"' "$work/results")" = 2 ] || fail "model_bench with two peers: $(cat "$work/results")"
grep -q 'decode 2 sequences, float' "$work/drawn" || fail "model_bench --peers-svg"
echo 'no rates' >"$work/rates"
if bench_beside_peer >/dev/null 2>&1; then fail "a peer without rates"; fi
if "$programs/model_bench" --model "$model" --peer true 2>/dev/null; then fail "a peer of a folder"; fi
# A GPU's program is another, which lies beside it.
cp "$programs/generate" "$work/generate"
"$work/generate" --model "$model" --device cuda 2>&1 | grep -q EIGENFORMER_CUDA || fail "generate --device cuda without a program for it"
printf '#!/bin/sh\necho "on a GPU: $*"\n' >"$work/generate_cuda"
chmod +x "$work/generate_cuda"
[ "$("$work/generate" --model M --device cuda)" = "on a GPU: --model M --device cuda" ] || fail "generate --device cuda"
if "$programs/generate" --model "$model" --device other 2>/dev/null; then fail "an unknown device"; fi
# What can be known before a model is loaded is said before: there is none here.
before() { if "$@" 2>"$work/said"; then fail "$*"; fi; }
before "$programs/perplexity" --model "$work/none" --text "$work/no text"
grep -q 'no text cannot be read' "$work/said" || fail "perplexity said $(cat "$work/said")"
before "$programs/perplexity" --model "$work/none" --text "$work"
before "$programs/generate" --model "$work/none" --temperature -1
grep -q temperature "$work/said" || fail "generate said $(cat "$work/said")"
before "$programs/generate" --model "$work/none" --bf16 --half
before "$programs/model_bench" --model "$work/none" --results "$work/none/results"
grep -q 'cannot write' "$work/said" || fail "model_bench said $(cat "$work/said")"
before "$programs/model_bench" --model "$work/none.gguf" --peer "$work/none/llama-bench"
grep -q 'no program' "$work/said" || fail "model_bench said $(cat "$work/said")"
before "$programs/generate" --model "$model/model.safetensors"
grep -q 'give the folder' "$work/said" || fail "generate of a .safetensors said $(cat "$work/said")"
if "$programs/generate" --model "$model" --tokens 4 >/dev/full 2>/dev/null; then fail "generate onto a full disk"; fi
if "$programs/generate" --model "$model/none" 2>/dev/null; then fail "a model that is not there"; fi
if "$programs/generate" --nonsense 2>/dev/null; then fail "an unknown option"; fi
"$programs/generate" --help | grep -q -- --prompt || fail "generate --help"
echo "passed"
