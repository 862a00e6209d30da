// Which operators have CUDA kernels, asked of the compiler. `runs_on causal_mask=yes kv_cache= ...`
// takes what cmake/operators.cmake declares and fails where the compiler knows otherwise: CMake
// calls it as soon as it is built. No GPU is needed. Every problem that has a CPU kernel stands
// here (tests/compile/runs_on.sh looks), with the word that cmake/operators.cmake and the README
// have for it. An operator all of whose problems run is "yes".
#include <eigenformer/core/dispatch.h>
#include <eigenformer/problem/activation.h>
#include <eigenformer/problem/attention.h>
#include <eigenformer/problem/attention_merge.h>
#include <eigenformer/problem/attention_scores.h>
#include <eigenformer/problem/causal_mask.h>
#include <eigenformer/problem/communicator.h>
#include <eigenformer/problem/embedding.h>
#include <eigenformer/problem/expert_feed_forward.h>
#include <eigenformer/problem/expert_routing.h>
#include <eigenformer/problem/kv_cache.h>
#include <eigenformer/problem/linear.h>
#include <eigenformer/problem/log_softmax.h>
#include <eigenformer/problem/loss.h>
#include <eigenformer/problem/normalization.h>
#include <eigenformer/problem/optimizer.h>
#include <eigenformer/problem/quantization.h>
#include <eigenformer/problem/rope.h>
#include <eigenformer/problem/sampling.h>
#include <eigenformer/problem/speculative_tree.h>
#include <eigenformer/problem/tensor_parallel.h>
#include <eigenformer/problem/top_k.h>
#include <eigenformer/problem/vocabulary_log_softmax.h>
#include <eigenformer/problem/vocabulary_nucleus.h>
#include <eigenformer/problem/vocabulary_rows.h>
#include <eigenformer/problem/vocabulary_shard.h>
#include <eigenformer/problem/vocabulary_tree.h>

#include <cstdio>
#include <string>

using namespace eigenformer::problem;

namespace {

using F = float;
using Id = std::int32_t;

struct Part {
  std::string name, word;
  bool runs;
};

template <typename Problem>
Part part(const char* name, const char* word) {
  return {name, word, eigenformer::RunsOn<eigenformer::cuda::Backend<Eigen::GpuDevice>, Problem>};
}

const Part kParts[] = {
    part<CausalMask<F>>("causal_mask", "mask"),
    part<KvAppend<F, F>>("kv_cache", "append"),
    part<KvBufferAppend<F, F>>("kv_cache", "append to buffers"),
    part<KvRead<F, F>>("kv_cache", "read"),
    part<Quantize<F>>("quantization", "by channel and group"),
    part<QuantizeInt4<F>>("quantization", "INT4"),
    part<QuantizeTensor<F>>("quantization", "by tensor"),
    part<QuantizeActivations<F>>("quantization", "activations"),
    part<Dequantize<F>>("quantization", "dequantize"),
    part<DequantizeTensor<F>>("quantization", "dequantize by tensor"),
    part<FirstNotQuantizable<F>>("quantization", "checks"),
    part<Int8Linear<F, F, int>>("quantization", "linear"),
    part<Linear<F, F, F, 1, int>>("linear", "plain"),
    part<PackedLinear<F, F, F, false, int>>("linear", "packed"),
    part<PackedLinear<F, F, std::int8_t, false, int>>("linear", "packed int8"),
    part<LinearBackwardInput<F, F, F>>("linear", "gradient of inputs"),
    part<LinearBackwardWeight<F, F, F>>("linear", "gradient of weights"),
    part<LinearBackwardBias<F, F>>("linear", "gradient of biases"),
    part<PanelsOf<F>>("linear", "sizes of panels"),
    part<PackWeight<F, F, 1>>("linear", "packing"),
    part<PackStackedWeight<F, F>>("linear", "stacked packing"),
    part<PackInt8Weight>("linear", "packing of int8"),
    part<PackedLinear<F, F, eigenformer::int4, false, int>>("linear", "packed int4"),
    part<PackInt4Weight<1>>("linear", "packing of int4"),
    part<PackStackedInt4Weight>("linear", "packing of stacked int4"),
    part<Attention<F, F>>("attention", "forward"),
    part<AttentionBackward<F>>("attention", "gradients"),
    part<AttentionMerge<F>>("attention", "merge"),
    part<AttentionScores<F>>("attention", "scores"),
    part<RankSum<F>>("communicator", "sums"),
    part<Interleave<F>>("tensor_parallel", "layers"),
    part<Vocabulary<F>>("tensor_parallel", "vocabulary"),
    part<AskRows<F>>("tensor_parallel", "chains of rows"),
    part<ScanShard<F>>("tensor_parallel", "chains of shards"),
    part<ChangeShard<F>>("tensor_parallel", "changed logits of shards"),
    part<AskShard<F>>("tensor_parallel", "sums of shards"),
    part<NarrowToWeight<F>>("tensor_parallel", "limits of shards"),
    part<AskNucleus>("tensor_parallel", "nuclei of shards"),
    part<NarrowNucleus>("tensor_parallel", "narrowed nuclei of shards"),
    part<EndNucleus>("tensor_parallel", "ends of nuclei of shards"),
    part<NarrowToDeviations<F>>("tensor_parallel", "deviations of shards"),
    part<PickFromShard<F>>("tensor_parallel", "candidates of shards"),
    part<DrawFromShard<F>>("tensor_parallel", "draws from shards"),
    part<ScoreShard<F>>("tensor_parallel", "scores of shards"),
    part<RankInShard<F>>("tensor_parallel", "ranks in shards"),
    part<ScoreTokens<F>>("tensor_parallel", "scores of tokens"),
    part<SumShard<F>>("tensor_parallel", "exact sums of shards"),
    part<JoinSums>("tensor_parallel", "joined exact sums of shards"),
    part<SpreadShard<F>>("tensor_parallel", "probabilities of shards"),
    part<FindInShard<F>>("tensor_parallel", "draws by exact sums of shards"),
    part<JoinParts>("tensor_parallel", "joined sums of shards"),
    part<WeighExponentials<F>>("tensor_parallel", "exponentials of shards"),
    part<JoinExponentials<F>>("tensor_parallel", "joined exponentials of shards"),
    part<SubtractLogSums<F, F>>("tensor_parallel", "log-softmax of shards"),
    part<WeighPlaces<F, F>>("tensor_parallel", "speculation by shards"),
    part<FindInPlaces<F, F>>("tensor_parallel", "draws of speculation by shards"),
    part<GreedySampling<F>>("sampling", "greedy"),
    part<Sampling<F>>("sampling", "all parameters"),
    part<SamplingProbabilities<F>>("sampling", "probabilities"),
    part<SampleWithLogProbabilities<F>>("sampling", "with log-probabilities"),
    part<LogProbabilitiesOf<F>>("sampling", "log-probabilities"),
    part<WithLogitFunction<Sampling<F>, F (*)(eigenformer::Index, eigenformer::Index, F)>>(
        "sampling", "a stage of the caller's"),
    part<Speculative<F, F>>("sampling", "speculative"),
    part<SpeculativeTree<F, F>>("sampling", "speculative trees"),
    part<RmsNorm<F, F, F>>("normalization", "RMSNorm"),
    part<AddRmsNorm<F, F, F, F>>("normalization", "RMSNorm with residual"),
    part<RmsNormBackward<F, F, F, F, F>>("normalization", "RMSNorm gradients"),
    part<LayerNorm<F, F, F>>("normalization", "LayerNorm"),
    part<LayerNormBackward<F, F, F, F, F>>("normalization", "LayerNorm gradients"),
    part<Rope<F, F>>("rope", "rotation"),
    part<Activation<Silu, F, F>>("activation", "functions"),
    part<ActivationBackward<Silu, F, F, F>>("activation", "gradients"),
    part<Softcap<F, F>>("activation", "softcap"),
    part<ClampedSwiglu<F, F>>("activation", "clamped gated"),
    part<Gated<Silu, F, F, F>>("activation", "gated"),
    part<GatedBackward<Silu, F, F, F, F, F>>("activation", "gated gradients"),
    part<ResidualAdd<F, F, F>>("activation", "residual"),
    part<Embedding<F, F, Id>>("embedding", "rows"),
    part<Int8Embedding<F, Id>>("embedding", "INT8 rows"),
    part<PackedEmbedding<F, F, Id>>("embedding", "rows of packed weights"),
    part<EmbeddingBackward<F, F, Id>>("embedding", "gradients"),
    part<ExpertRouting<F>>("expert_routing", "routing"),
    part<ExpertOrder>("expert_routing", "order"),
    part<ExpertLinear<F, F, F, false, int>>("expert_feed_forward", "products"),
    part<ExpertCombine<F, F, F>>("expert_feed_forward", "sums"),
    part<LogSoftmax<F, F>>("log_softmax", "rows"),
    part<TopK<F>>("top_k", "rows"),
    part<CrossEntropy<F, F>>("loss", "cross-entropy"),
    part<Optimizer<AdamWFactors>>("optimizer", "AdamW"),
    part<Optimizer<SgdFactors>>("optimizer", "SGD"),
    part<ZeroGradients>("optimizer", "zeros"),
    part<ScaleGradients>("optimizer", "gradients"),
};

// "", "yes", or what runs: "greedy, top-k".
std::string kernels_of(const std::string& name) {
  std::string words;
  int parts = 0, running = 0;
  for (const Part& part : kParts) {
    if (part.name != name) continue;
    ++parts;
    if (!part.runs) continue;
    if (running++ > 0) words += ", ";
    words += part.word;
  }
  return parts > 0 && running == parts ? "yes" : words;
}

}  // namespace

int main(int count, char** arguments) {
  int wrong = 0;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const auto sign = argument.find('=');
    const std::string name = argument.substr(0, sign), declared = argument.substr(sign + 1);
    const std::string found = kernels_of(name);
    std::printf("%-16s %s\n", name.c_str(), found.c_str());
    if (declared == found) continue;
    std::printf("cmake/operators.cmake declares '%s' of %s, the compiler finds '%s'\n",
                declared.c_str(), name.c_str(), found.c_str());
    ++wrong;
  }
  return wrong;
}
