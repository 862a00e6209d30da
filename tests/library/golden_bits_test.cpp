// Every operator's bits, by ISA, as they were when golden/bits.txt was written: what a change that
// only moves code must keep. A change that is meant to alter bits writes the file again:
//   EIGENFORMER_WRITE_GOLDEN=1 build/tests/golden_bits_test
// The file is g++'s: other compilers contract products and sums in other places.
#include <eigenformer/eigenformer.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
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

/// float, and one narrow scalar: compiling them all for every ISA takes minutes. .ci/run clang, which
/// parses, has them all.
template <typename F>
void for_each_scalar(F&& f) {
  f(float{}, "float");
  f(ef::bfloat16{}, "bfloat16");
#if defined(EIGENFORMER_ALL_SCALARS)
  f(double{}, "double");
  f(ef::half{}, "half");
#endif
}

template <typename T, typename Backend>
void norms(const Backend& on, Results& r, const std::string& s) {
  const auto x = random_tensor<T, 2>({5, 77}, 1), g = random_tensor<T, 2>({5, 77}, 2);
  const auto w = random_tensor<T, 1>({77}, 3), b = random_tensor<T, 1>({77}, 4);
  record(r, "rms_norm " + s, ef::rms_norm(on, x, w));
  record(r, "layer_norm " + s, ef::layer_norm(on, x, w, b));
  auto residual = random_tensor<T, 2>({5, 77}, 5);
  ef::Tensor<T, 2> y(5, 77), gx(5, 77);
  ef::add_rms_norm_into(on, y, residual, x, w);
  record(r, "add_rms_norm " + s, y, residual);
  using C = ef::compute_type<T>;
  ef::Tensor<C, 1> gw(77), gb(77);
  gw.setZero(), gb.setZero();
  ef::rms_norm_backward_into(on, gx, gw, g, x, w);
  record(r, "rms_norm_backward " + s, gx, gw);
  gw.setZero();
  ef::layer_norm_backward_into(on, gx, gw, gb, g, x, w);
  record(r, "layer_norm_backward " + s, gx, gw, gb);
}

template <typename T, typename Backend>
void elementwise(const Backend& on, Results& r, const std::string& s) {
  const auto x = random_tensor<T, 2>({3, 46}, 6, 3), u = random_tensor<T, 2>({3, 46}, 7);
  record(r, "silu " + s, ef::silu(on, x));
  record(r, "gelu " + s, ef::gelu(on, x));
  record(r, "gelu tanh " + s, ef::gelu(on, x, {.approximation = ef::GeluApproximation::tanh}));
  record(r, "relu " + s, ef::relu(on, x));
  record(r, "swiglu " + s, ef::swiglu(on, x, u), ef::swiglu(on, x));
  record(r, "geglu " + s, ef::geglu(on, x, u), ef::geglu(on, x));
  record(r, "residual_add " + s, ef::residual_add(on, x, u));
  ef::Tensor<T, 2> a(3, 46), b(3, 46);
  ef::silu_backward_into(on, a, u, x);
  ef::gelu_backward_into(on, b, u, x);
  record(r, "activation backward " + s, a, b);
  ef::swiglu_backward_into(on, a, b, u, x, u);
  record(r, "swiglu_backward " + s, a, b);
  const auto heads = random_tensor<T, 3>({4, 3, 22}, 8);
  const std::vector<int> positions{0, 3, 1000, 70000};
  record(r, "rope " + s, ef::rope(on, heads, positions),
         ef::rope(on, heads, positions, {.layout = ef::RopeLayout::interleaved}));
  const auto logits = random_tensor<T, 2>({4, 301}, 9, 3);
  const std::vector<int> targets{3, 300, -100, 0};
  ef::Tensor<T, 2> gradient(4, 301);
  const auto loss = ef::cross_entropy_with_gradient_into(on, gradient, logits, targets, 0.25,
                                                         {.label_smoothing = 0.1});
  record(r, "cross_entropy " + s, loss.sum, ef::cross_entropy(on, logits, targets).sum, gradient);
  if constexpr (!std::is_same_v<T, double>) {
    auto [q, scale] = ef::quantize_weights_int8(on, x);
    auto [qc, scales] = ef::quantize_weights_int8_per_channel(on, x);
    auto grouped = ef::quantize_weights_int8_grouped(on, x, 32);
    record(r, "quantize " + s, q, scale, qc, scales, grouped.values, grouped.scales,
           ef::dequantize(on, qc, scales));
  }
}

template <typename X, typename W, typename Backend>
void linear(const Backend& on, Results& r, const std::string& s) {
  for (const Index tokens : {1, 3, 7, 40}) {
    const std::string name = s + " " + std::to_string(tokens);
    const auto x = random_tensor<X, 2>({tokens, 131}, 11);
    const auto b = random_tensor<float, 1>({75}, 13);
    ef::Tensor<float, 2> y(tokens, 75);
    if constexpr (!std::is_same_v<W, std::int8_t>) {
      const auto w = random_tensor<W, 2>({75, 131}, 12);
      ef::linear_into(on, y, x, w, b);
      record(r, "linear " + name, y);
      const auto g = random_tensor<X, 2>({tokens, 75}, 14);
      ef::Tensor<X, 2> gx(tokens, 131);
      ef::linear_backward_input_into(on, gx, g, w);
      ef::Tensor<float, 2> gw(75, 131);
      gw.setZero();
      ef::linear_backward_weight_into(on, gw, g, x);
      record(r, "linear_backward " + name, gx, gw);
    }
    const auto weight = random_tensor<float, 2>({75, 131}, 12);
    const auto packed = ef::pack_weight<W>(on, weight);
    ef::linear_into(on, y, x, packed, b);
    record(r, "packed linear " + name, y);
    ef::linear_into(on, y, x, packed, ef::Epilogue{}.bias(b).silu());
    record(r, "packed linear silu " + name, y);
    if constexpr (std::is_same_v<W, std::int8_t>) {
      const auto groups = ef::pack_weight<W>(on, weight, {.group_size = 32});
      ef::linear_into(on, y, x, groups, b);
      record(r, "grouped linear " + name, y);
    }
    const auto up = random_tensor<float, 2>({75, 131}, 15);
    ef::gated_linear_into(on, y, x, ef::pack_gated_weight<W>(on, weight, up),
                          ef::Epilogue{}.silu());
    record(r, "gated_linear " + name, y);
  }
}

template <typename T, typename Backend>
void attention(const Backend& on, Results& r, const std::string& s) {
  const auto q = random_tensor<T, 4>({2, 90, 4, 20}, 21),
             k = random_tensor<T, 4>({2, 90, 2, 20}, 22),
             v = random_tensor<T, 4>({2, 90, 2, 20}, 23),
             g = random_tensor<T, 4>({2, 90, 4, 20}, 24);
  const std::vector<int> lengths{90, 41};
  const std::vector<float> slopes{0.5f, 0.25f, 0.1f, 0.05f}, sinks{0.1f, -1.0f, 2.0f, 0.0f};
  ef::Tensor<ef::compute_type<T>, 3> lse(2, 4, 90);
  const ef::AttentionOptions plain{.log_sum_exp = lse};
  const auto out = ef::batched_attention_with_padding(on, q, k, v, lengths, plain);
  record(r, "attention " + s, out, lse);
  const auto [gq, gk, gv] = ef::attention_backward(on, g, q, k, v, out, lse, lengths);
  record(r, "attention_backward " + s, gq, gk, gv);
  const ef::AttentionOptions all{.causal = true,
                                 .window = 30,
                                 .softcap = 3.0f,
                                 .alibi_slopes = slopes,
                                 .sinks = sinks,
                                 .prefix_length = 4};
  record(r, "attention all " + s, ef::batched_attention_with_padding(on, q, k, v, lengths, all));
  record(r, "attention large scores " + s,
         ef::batched_attention_with_padding(on, q, k, v, lengths, {.scale = 1000.0f}));
  ef::KvCache<T> cache;
  ef::update_kv_cache(on, cache, k, v, 0);
  record(r, "cached attention " + s,
         ef::attention_with_kv_cache(on, q, cache, 0, {.causal = true}));
  if constexpr (!std::is_same_v<T, double>) {
    ef::KvCache<T, std::int8_t> narrow;
    ef::update_kv_cache(on, narrow, k, v, 0);
    record(r, "INT8 cached attention " + s,
           ef::attention_with_kv_cache(on, q, narrow, 0, {.causal = true}), narrow.keys(on, 0));
  }
}

template <typename Backend>
void sampling(const Backend& on, Results& r) {
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
    record(r, "sample " + std::to_string(i), ef::sample(on, logits, chains[i], rng),
           ef::sample(on, logits, chains[i], rng),
           ef::sampling_probabilities(on, logits, chains[i]));
  }
}

struct TrainingBatch {
  ef::Tensor<std::int32_t, 2> inputs;
  ef::Tensor<std::int32_t, 1> targets;
};

template <typename Backend>
void training(const Backend& on, Results& r) {
  const auto gradient = random_tensor<float, 1>({333}, 41);
  for (const bool adam : {true, false}) {
    auto w = random_tensor<float, 1>({333}, 42), g = gradient;
    const std::vector<ef::Parameter> parameters{
        {ef::TensorView<float, 1>(w.data(), 333), ef::TensorView<float, 1>(g.data(), 333)}};
    ef::AdamW adamw(parameters, {.learning_rate = 1e-2f, .weight_decay = 0.1f});
    ef::Sgd sgd(parameters, {.learning_rate = 1e-2f, .momentum = 0.9f});
    for (int step = 0; step < 3; ++step) adam ? adamw.step(on) : sgd.step(on);
    record(r, adam ? "AdamW" : "Sgd", w, ef::clip_gradient_norm(on, parameters, 1.0), g);
  }
  const ef::DecoderConfig config{.vocabulary = 61,
                                 .features = 48,
                                 .layers = 2,
                                 .heads = 4,
                                 .kv_heads = 2,
                                 .head_dim = 12,
                                 .hidden = 80};
  auto weights = std::make_shared<ef::DecoderWeights>(config, 5);
  ef::Decoder model(weights, on);
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

template <typename Backend>
Results results(const Backend& on) {
  Results r;
  for_each_scalar([&](auto scalar, const std::string& name) {
    using T = decltype(scalar);
    attention<T>(on, r, name);
#if !defined(EIGENFORMER_PRODUCTS_ONLY)  // .ci/run isa, where ISAs differ in nothing else
    norms<T>(on, r, name);
    elementwise<T>(on, r, name);
#endif
  });
  linear<float, float>(on, r, "float float");
  linear<ef::bfloat16, ef::bfloat16>(on, r, "bfloat16 bfloat16");
  linear<float, std::int8_t>(on, r, "float int8");
#if defined(EIGENFORMER_ALL_SCALARS)
  linear<ef::half, ef::half>(on, r, "half half");
#endif
#if !defined(EIGENFORMER_PRODUCTS_ONLY)
  sampling(on, r);
  training(on, r);
#endif
  return r;
}

#if defined(EIGENFORMER_COMPILE_ONLY)  // .ci/run isa: the kernels of the best tag, never run
}  // namespace
std::size_t compile_kernels_of_best() { return results(on(ef::isa::best{})).size(); }
#else
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
  const std::string path = EIGENFORMER_GOLDEN_DIR "/bits.txt";
  Golden golden = read_golden(path);
  const Eigen::DefaultDevice device;
  int compared = 0;
  for_each_isa([&](auto isa) {
    const Results now = results(ef::cpu::backend(device, isa));
    // What the flags allow besides may change where the compiler contracts.
    const std::string name = isa.name + std::string("@") + ef::isa::best::name;
    if (std::getenv("EIGENFORMER_WRITE_GOLDEN") != nullptr) {
      golden[name] = now;
      return;
    }
    if (golden.count(name) == 0) {
      std::cerr << "no golden bits for " << name << " yet\n";
      return;
    }
    ++compared;
    EXPECT_EQ(golden[name].size(), now.size());
    for (const auto& [line, hash] : now) {
      ASSERT_EQ(golden[name].count(line), 1u) << line;
      EXPECT_EQ(golden[name][line], hash) << name << ": " << line;
    }
  });
  if (std::getenv("EIGENFORMER_WRITE_GOLDEN") != nullptr) {
    write_golden(path, golden);
    GTEST_SKIP() << "written";
  }
  if (compared == 0) GTEST_SKIP() << "no golden bits for any ISA of this build";
}
}  // namespace
#endif
