// Every operator's bits, by ISA, as they were when golden/bits.txt was written: what a change that
// only moves code must keep. A change that is meant to alter bits writes the file again:
//   EIGENFORMER_WRITE_GOLDEN=1 build/tests/golden_bits_test, once for each ISA
// The file is g++'s: other compilers contract products and sums in other places.
#include <eigenformer/eigenformer.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include "compare.h"

using namespace eigenformer_test;

namespace {

/// FNV-1a over the bytes of results.
class Bits {
 public:
  template <typename T>
  void add(const T* data, Index count) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < static_cast<std::size_t>(count) * sizeof(T); ++i)
      hash_ = (hash_ ^ bytes[i]) * 1099511628211u;
  }
  template <typename Tensor>
    requires requires(const Tensor& t) { t.dimensions(); }
  void add(const Tensor& tensor) {
    add(tensor.data(), tensor.size());
  }
  template <typename T>
    requires std::is_arithmetic_v<T>
  void add(T value) {
    add(&value, 1);
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 14695981039346656037u;
};

using Results = std::map<std::string, std::uint64_t>;

template <typename... Ts>
void record(Results& results, const std::string& name, const Ts&... values) {
  Bits bits;
  (bits.add(values), ...);
  ASSERT_TRUE(results.emplace(name, bits.value()).second) << name;
}

template <typename F>
void for_each_scalar(F&& f) {
  f(float{}, "float");
  f(double{}, "double");
  f(ef::bfloat16{}, "bfloat16");
  f(ef::half{}, "half");
}

template <typename T>
void norms(Results& r, const std::string& s) {
  const auto x = random_tensor<T, 2>({5, 77}, 1), g = random_tensor<T, 2>({5, 77}, 2);
  const auto w = random_tensor<T, 1>({77}, 3), b = random_tensor<T, 1>({77}, 4);
  record(r, "rms_norm " + s, ef::rms_norm(x, w));
  record(r, "layer_norm " + s, ef::layer_norm(x, w, b));
  auto residual = random_tensor<T, 2>({5, 77}, 5);
  ef::Tensor<T, 2> y(5, 77), gx(5, 77);
  ef::add_rms_norm_into(Eigen::DefaultDevice{}, y, residual, x, w);
  record(r, "add_rms_norm " + s, y, residual);
  using C = ef::compute_type<T>;
  ef::Tensor<C, 1> gw(77), gb(77);
  gw.setZero(), gb.setZero();
  ef::rms_norm_backward_into(Eigen::DefaultDevice{}, gx, gw, g, x, w);
  record(r, "rms_norm_backward " + s, gx, gw);
  gw.setZero();
  ef::layer_norm_backward_into(Eigen::DefaultDevice{}, gx, gw, gb, g, x, w);
  record(r, "layer_norm_backward " + s, gx, gw, gb);
}

template <typename T>
void elementwise(Results& r, const std::string& s) {
  const auto x = random_tensor<T, 2>({3, 46}, 6, 3), u = random_tensor<T, 2>({3, 46}, 7);
  record(r, "silu " + s, ef::silu(x));
  record(r, "gelu " + s, ef::gelu(x));
  record(r, "gelu tanh " + s, ef::gelu(x, {.approximation = ef::GeluApproximation::tanh}));
  record(r, "relu " + s, ef::relu(x));
  record(r, "swiglu " + s, ef::swiglu(x, u), ef::swiglu(x));
  record(r, "geglu " + s, ef::geglu(x, u), ef::geglu(x));
  record(r, "residual_add " + s, ef::residual_add(x, u));
  ef::Tensor<T, 2> a(3, 46), b(3, 46);
  ef::silu_backward_into(Eigen::DefaultDevice{}, a, u, x);
  ef::gelu_backward_into(Eigen::DefaultDevice{}, b, u, x);
  record(r, "activation backward " + s, a, b);
  ef::swiglu_backward_into(Eigen::DefaultDevice{}, a, b, u, x, u);
  record(r, "swiglu_backward " + s, a, b);
  const auto heads = random_tensor<T, 3>({4, 3, 22}, 8);
  const std::vector<int> positions{0, 3, 1000, 70000};
  record(r, "rope " + s, ef::rope(heads, positions),
         ef::rope(heads, positions, {.layout = ef::RopeLayout::interleaved}));
  const auto logits = random_tensor<T, 2>({4, 301}, 9, 3);
  const std::vector<int> targets{3, 300, -100, 0};
  ef::Tensor<T, 2> gradient(4, 301);
  const auto loss = ef::cross_entropy_with_gradient_into(Eigen::DefaultDevice{}, gradient, logits,
                                                         targets, 0.25, {.label_smoothing = 0.1});
  record(r, "cross_entropy " + s, loss.sum, ef::cross_entropy(logits, targets).sum, gradient);
  if constexpr (!std::is_same_v<T, double>) {
    auto [q, scale] = ef::quantize_weights_int8(x);
    auto [qc, scales] = ef::quantize_weights_int8_per_channel(x);
    auto grouped = ef::quantize_weights_int8_grouped(x, 32);
    record(r, "quantize " + s, q, scale, qc, scales, grouped.values, grouped.scales,
           ef::dequantize(qc, scales));
  }
}

template <typename X, typename W>
void linear(Results& r, const std::string& s) {
  for (const Index tokens : {1, 3, 7, 40}) {
    const std::string name = s + " " + std::to_string(tokens);
    const auto x = random_tensor<X, 2>({tokens, 131}, 11);
    const auto b = random_tensor<float, 1>({75}, 13);
    ef::Tensor<float, 2> y(tokens, 75);
    if constexpr (!std::is_same_v<W, std::int8_t>) {
      const auto w = random_tensor<W, 2>({75, 131}, 12);
      ef::linear_into(Eigen::DefaultDevice{}, y, x, w, b);
      record(r, "linear " + name, y);
      const auto g = random_tensor<X, 2>({tokens, 75}, 14);
      ef::Tensor<X, 2> gx(tokens, 131);
      ef::linear_backward_input_into(Eigen::DefaultDevice{}, gx, g, w);
      ef::Tensor<float, 2> gw(75, 131);
      gw.setZero();
      ef::linear_backward_weight_into(Eigen::DefaultDevice{}, gw, g, x);
      record(r, "linear_backward " + name, gx, gw);
    }
    const auto weight = random_tensor<float, 2>({75, 131}, 12);
    const auto packed = ef::pack_weight<W>(weight);
    ef::linear_into(Eigen::DefaultDevice{}, y, x, packed, b);
    record(r, "packed linear " + name, y);
    ef::linear_into(Eigen::DefaultDevice{}, y, x, packed, ef::Epilogue{}.bias(b).silu());
    record(r, "packed linear silu " + name, y);
    if constexpr (std::is_same_v<W, std::int8_t>) {
      const auto groups = ef::pack_weight<W>(weight, {.group_size = 32});
      ef::linear_into(Eigen::DefaultDevice{}, y, x, groups, b);
      record(r, "grouped linear " + name, y);
    }
    const auto up = random_tensor<float, 2>({75, 131}, 15);
    ef::gated_linear_into(Eigen::DefaultDevice{}, y, x, ef::pack_gated_weight<W>(weight, up),
                          ef::Epilogue{}.silu());
    record(r, "gated_linear " + name, y);
  }
}

template <typename T>
void attention(Results& r, const std::string& s) {
  const auto q = random_tensor<T, 4>({2, 90, 4, 20}, 21),
             k = random_tensor<T, 4>({2, 90, 2, 20}, 22),
             v = random_tensor<T, 4>({2, 90, 2, 20}, 23),
             g = random_tensor<T, 4>({2, 90, 4, 20}, 24);
  const std::vector<int> lengths{90, 41};
  const std::vector<float> slopes{0.5f, 0.25f, 0.1f, 0.05f}, sinks{0.1f, -1.0f, 2.0f, 0.0f};
  ef::Tensor<ef::compute_type<T>, 3> lse(2, 4, 90);
  const ef::AttentionOptions plain{.log_sum_exp = lse};
  const auto out = ef::batched_attention_with_padding(q, k, v, lengths, plain);
  record(r, "attention " + s, out, lse);
  const auto [gq, gk, gv] = ef::attention_backward(g, q, k, v, out, lse, lengths);
  record(r, "attention_backward " + s, gq, gk, gv);
  const ef::AttentionOptions all{.causal = true,
                                 .window = 30,
                                 .softcap = 3.0f,
                                 .alibi_slopes = slopes,
                                 .sinks = sinks,
                                 .prefix_length = 4};
  record(r, "attention all " + s, ef::batched_attention_with_padding(q, k, v, lengths, all));
  record(r, "attention large scores " + s,
         ef::batched_attention_with_padding(q, k, v, lengths, {.scale = 1000.0f}));
  ef::KvCache<T> cache;
  ef::update_kv_cache(cache, k, v, 0);
  record(r, "cached attention " + s, ef::attention_with_kv_cache(q, cache, 0, {.causal = true}));
  if constexpr (!std::is_same_v<T, double>) {
    ef::KvCache<T, std::int8_t> narrow;
    ef::update_kv_cache(narrow, k, v, 0);
    record(r, "INT8 cached attention " + s,
           ef::attention_with_kv_cache(q, narrow, 0, {.causal = true}), narrow.keys(0));
  }
}

void sampling(Results& r) {
  const auto logits = random_tensor<float, 2>({4, 3000}, 31, 3);
  const std::vector<ef::SamplingParams> chains{
      {.temperature = 0},
      {.top_k = 40},
      {.top_p = 0.9},
      {.temperature = 0.7, .top_k = 50, .top_p = 0.95, .min_p = 0.02},
      {.typical_p = 0.8},
      {.repetition_penalty = 1.2, .frequency_penalty = 0.3, .prompt_tokens = {1, 2, 3, 3}}};
  for (std::size_t i = 0; i < chains.size(); ++i) {
    ef::Philox rng{7};
    record(r, "sample " + std::to_string(i), ef::sample(logits, chains[i], rng),
           ef::sample(logits, chains[i], rng), ef::sampling_probabilities(logits, chains[i]));
  }
}

struct TrainingBatch {
  ef::Tensor<std::int32_t, 2> inputs;
  ef::Tensor<std::int32_t, 1> targets;
};

void training(Results& r) {
  const auto gradient = random_tensor<float, 1>({333}, 41);
  for (const bool adam : {true, false}) {
    auto w = random_tensor<float, 1>({333}, 42), g = gradient;
    const std::vector<ef::Parameter> parameters{
        {ef::TensorView<float, 1>(w.data(), 333), ef::TensorView<float, 1>(g.data(), 333)}};
    ef::AdamW adamw(parameters, {.learning_rate = 1e-2f, .weight_decay = 0.1f});
    ef::Sgd sgd(parameters, {.learning_rate = 1e-2f, .momentum = 0.9f});
    for (int step = 0; step < 3; ++step) adam ? adamw.step() : sgd.step();
    record(r, adam ? "AdamW" : "Sgd", w, ef::clip_gradient_norm(parameters, 1.0), g);
  }
  const ef::DecoderConfig config{.vocabulary = 61,
                                 .features = 48,
                                 .layers = 2,
                                 .heads = 4,
                                 .kv_heads = 2,
                                 .head_dim = 12,
                                 .hidden = 80};
  auto weights = std::make_shared<ef::DecoderWeights>(config, 5);
  const Eigen::DefaultDevice device;
  ef::Decoder model(weights, device);
  ef::Tensor<std::int32_t, 2> ids(2, 9);
  ef::Tensor<std::int32_t, 1> targets(18);
  for (Index i = 0; i < 18; ++i) {
    ids.data()[i] = static_cast<std::int32_t>(i * 7 % 61);
    targets.data()[i] = static_cast<std::int32_t>((i + 1) * 7 % 61);
  }
  ef::AdamW optimizer(model.parameters(), {.learning_rate = 1e-2f});
  ef::GradScaler scaler;
  const std::vector<TrainingBatch> batches(2, TrainingBatch{ids, targets});
  for (int step = 0; step < 2; ++step) {
    record(r, "train float " + std::to_string(step),
           ef::train_step_with_grad_accumulation(model, optimizer, batches, 2));
    record(r, "train half " + std::to_string(step),
           ef::train_step_mixed_precision<ef::half>(model, optimizer, ids, targets, scaler));
  }
  Bits bits;
  for (const ef::Parameter& p : weights->parameters()) bits.add(p.value);
  r.emplace("trained weights", bits.value());
}

Results results() {
  Results r;
  for_each_scalar([&](auto scalar, const std::string& name) {
    using T = decltype(scalar);
    norms<T>(r, name);
    elementwise<T>(r, name);
    attention<T>(r, name);
  });
  linear<float, float>(r, "float float");
  linear<float, ef::bfloat16>(r, "float bfloat16");
  linear<ef::bfloat16, ef::bfloat16>(r, "bfloat16 bfloat16");
  linear<float, ef::half>(r, "float half");
  linear<float, std::int8_t>(r, "float int8");
  linear<ef::bfloat16, std::int8_t>(r, "bfloat16 int8");
  sampling(r);
  training(r);
  return r;
}

using Golden = std::map<std::string, Results>;  // by ISA

Golden read_golden(const std::string& path) {
  Golden golden;
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream fields(line);
    std::string isa, hash, name;
    fields >> isa >> hash >> std::ws;
    std::getline(fields, name);
    golden[isa][name] = std::stoull(hash, nullptr, 16);
  }
  return golden;
}

void write_golden(const std::string& path, const Golden& golden) {
  std::ofstream out(path);
  for (const auto& [isa, entries] : golden)
    for (const auto& [name, hash] : entries) {
      out << isa << ' ' << std::hex << hash << ' ' << name << '\n';
    }
  ASSERT_TRUE(out.good());
}

TEST(GoldenBits, OfEveryOperator) {
#if !defined(__GNUC__) || defined(__clang__)
  GTEST_SKIP() << "the golden bits are g++'s";
#endif
  const std::string path = EIGENFORMER_GOLDEN_DIR "/bits.txt", isa = ef::isa::best::name;
  Golden golden = read_golden(path);
  const Results now = results();
  if (std::getenv("EIGENFORMER_WRITE_GOLDEN") != nullptr) {
    golden[isa] = now;
    write_golden(path, golden);
    GTEST_SKIP() << "wrote " << now.size() << " lines of " << isa;
  }
  if (golden.count(isa) == 0) GTEST_SKIP() << "no golden bits for " << isa << " yet";
  EXPECT_EQ(golden[isa].size(), now.size());
  for (const auto& [name, hash] : now) {
    ASSERT_EQ(golden[isa].count(name), 1u) << name;
    EXPECT_EQ(golden[isa][name], hash) << isa << ": " << name;
  }
}

}  // namespace
