// A trained model as its author published it (shared/models/stories260K): loaded, text becomes ids
// and back, and greedy decoding writes the published text, token by token: with any chunks, in a
// batch, beside other sequences in pages. Tiny models of every family: logits and greedy text are
// those of transformers (golden/make_models.py). Files that are not what they claim are refused.
#include <eigenformer/model.h>

#include <numeric>
#include <set>

#include "allocations.h"
#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

class Stories : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(folder_)) GTEST_SKIP() << "there is no " << folder_;
    std::ifstream file(folder_ / "greedy_ids.json");
    published_ = nlohmann::json::parse(file).get<std::vector<std::int32_t>>();
    ASSERT_EQ(published_.size(), 257u);
  }
  std::span<const std::int32_t> first(std::size_t n) const {
    return std::span(published_).first(n);
  }
  /// The published text from the n-th token on.
  std::vector<std::int32_t> rest(std::size_t n) const {
    return {published_.begin() + static_cast<std::ptrdiff_t>(n), published_.end()};
  }

  const std::filesystem::path folder_ = shared_model("stories260K");
  std::vector<std::int32_t> published_;
};

TEST_F(Stories, GgufWritesThePublishedText) {
  auto model = ef::load_model<float>(folder_ / "model.gguf");
  EXPECT_EQ(ef::generate(model, first(1), {.max_new_tokens = 256}), rest(1));
  std::ifstream file(folder_ / "greedy.txt");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  EXPECT_EQ(model.tokenizer().decode(published_), text);
  EXPECT_EQ(model.tokenizer().encode(text), published_);
}

TEST_F(Stories, GreedyDecodingWritesThePublishedText) {
  auto model = ef::load_model<float>(folder_);
  for (const std::size_t n : {1, 40}) {
    std::vector<std::int32_t> streamed;
    const auto written = ef::generate(model, first(n),
                                      {.max_new_tokens = static_cast<Index>(257 - n),
                                       .on_token =
                                           [&](std::int32_t id) {
                                             streamed.push_back(id);
                                             return true;
                                           },
                                       .chunk = 7});
    EXPECT_EQ(written, rest(n)) << n;
    EXPECT_EQ(streamed, written);
  }
  std::ifstream file(folder_ / "greedy.txt");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  EXPECT_EQ(model.tokenizer().decode(published_), text);
  EXPECT_EQ(model.tokenizer().encode(text), published_);
}

TEST_F(Stories, TheCallerEndsTheText) {
  auto model = ef::load_model<float>(folder_);
  Index seen = 0;
  const auto written =
      ef::generate(model, first(1),
                   {.max_new_tokens = 50, .on_token = [&](std::int32_t) { return ++seen < 5; }});
  EXPECT_EQ(written.size(), 5u);
  EXPECT_TRUE(ef::generate(model, first(1), {.max_new_tokens = 0}).empty());
}

TEST_F(Stories, TextsThatBeginAlikeShareWhatWasComputed) {
  auto model = ef::load_model<float>(folder_);
  ef::TextGenerator generator(model);
  EXPECT_EQ(generator.generate(first(30), {.max_new_tokens = 20}),
            (std::vector<std::int32_t>(published_.begin() + 30, published_.begin() + 50)));
  EXPECT_EQ(generator.reused(), 0);
  const auto longer = generator.generate(first(60), {.max_new_tokens = 197, .chunk = 4});
  EXPECT_EQ(generator.reused(), 49);  // the last token drawn was not computed
  EXPECT_EQ(longer, rest(60));
  // Another text from the tenth token on, then one that the cache holds whole.
  std::vector<std::int32_t> other(published_.begin(), published_.begin() + 40);
  other[10] = other[10] == 300 ? 301 : 300;
  const auto written = generator.generate(other, {.max_new_tokens = 12});
  EXPECT_EQ(generator.reused(), 10);
  EXPECT_EQ(written, ef::generate(model, other, {.max_new_tokens = 12}));
  EXPECT_EQ(generator.generate(std::span(other).first(25), {.max_new_tokens = 12}),
            ef::generate(model, std::span(other).first(25), {.max_new_tokens = 12}));
  EXPECT_EQ(generator.reused(), 24);
}

TEST_F(Stories, ATokenTakesNoMemory) {
  auto model = ef::load_model<float>(folder_);
  ef::TextGenerator generator(model);
  for (const ef::SamplingParams& sampling :
       {ef::SamplingParams{.temperature = 0}, ef::SamplingParams{.top_k = 40, .top_p = .9}}) {
    for (int time = 0; time < 2; ++time) {
      long begin = 0, end = 0;
      Index count = 0;
      const auto ended = [&](std::int32_t) {
        ++count;
        if (count == 65) begin = allocation_count;  // the list of new tokens has grown to 128
        if (count == 128) end = allocation_count;
        return true;
      };
      generator.generate(first(100),
                         {.max_new_tokens = 128, .sampling = sampling, .on_token = ended});
      ASSERT_EQ(count, 128);
      if (time == 0) continue;  // the cache grows
      EXPECT_EQ(end - begin, 0);
    }
  }
}

TEST_F(Stories, ATextHasNoMoreTokensThanItMay) {
  auto model = ef::load_model<float>(folder_);
  EXPECT_EQ(ef::generate(model, first(30), {.max_new_tokens = 100, .max_length = 35}),
            (std::vector<std::int32_t>(published_.begin() + 30, published_.begin() + 35)));
  EXPECT_TRUE(ef::generate(model, first(30), {.max_new_tokens = 100, .max_length = 30}).empty());
  // Pages are taken as the text grows: a number that no memory holds is no matter.
  Index seen = 0;
  EXPECT_EQ(ef::generate(model, first(1),
                         {.max_new_tokens = Index{1} << 60,
                          .on_token = [&](std::int32_t) { return ++seen < 256; }}),
            rest(1));
  expect_throws<std::length_error>([&] { ef::generate(model, first(31), {.max_length = 30}); },
                                   {"generate", "31 tokens", "may have 30"});
  expect_throws<std::invalid_argument>([&] { ef::generate(model, {}, {}); }, {"ids is empty"});
  expect_throws<std::invalid_argument>(
      [&] {
        ef::generate(model, std::vector<std::int32_t>{1, 512}, {});
      },
      {"generate", "512"});
}

TEST_F(Stories, SamplingSeesTheText) {
  auto model = ef::load_model<float>(folder_);
  const auto written =
      ef::generate(model, first(1),
                   {.max_new_tokens = 200, .sampling = {.temperature = 0, .no_repeat_ngram = 2}});
  std::set<std::pair<std::int32_t, std::int32_t>> pairs;
  for (std::size_t i = 1; i < written.size(); ++i)
    EXPECT_TRUE(pairs.emplace(written[i - 1], written[i]).second) << i;
}

TEST_F(Stories, ABatchInPagesWritesItToo) {
  auto model = ef::load_model<float>(folder_);
  ef::PagedKvCache<float> cache = model.make_cache(3 * 300);
  const std::vector<ef::SequenceId> sequences{cache.add_sequence(), cache.add_sequence(),
                                              cache.add_sequence()};
  // Prompts of different lengths in one step, then a token each.
  const std::array<std::size_t, 3> prompts{1, 30, 9};
  std::vector<std::int32_t> tokens;
  std::vector<Index> offsets{0}, last;
  for (const std::size_t n : prompts) {
    tokens.insert(tokens.end(), published_.begin(),
                  published_.begin() + static_cast<std::ptrdiff_t>(n));
    offsets.push_back(static_cast<Index>(tokens.size()));
    last.push_back(offsets.back() - 1);
  }
  auto logits = model.decoder().step({tokens, offsets, last}, cache, sequences);
  for (std::size_t step = 0; step < 200; ++step) {
    const auto next = ef::greedy_sample(logits);
    for (std::size_t r = 0; r < 3; ++r)
      ASSERT_EQ(next(static_cast<Index>(r)), published_[prompts[r] + step]) << r << " " << step;
    logits = model.decoder().decode(next, cache, sequences);
  }
}

TEST_F(Stories, LogitsOfEveryPositionPredictTheNextToken) {
  auto model = ef::load_model<float>(folder_);
  const auto logits = model.logits(published_);
  ASSERT_EQ(logits.dimension(0), 257);
  const auto best = ef::greedy_sample(logits);
  for (std::size_t i = 0; i + 1 < published_.size(); ++i)
    ASSERT_EQ(best(static_cast<Index>(i)), published_[i + 1]) << i;
  auto rounded = ef::load_model<float>(folder_, {.weights = ef::WeightFormat::int8});
  EXPECT_LT(relative_error(rounded.logits(published_), to_double(logits)), 0.05);
  EXPECT_LT(rounded.weight_bytes(), model.weight_bytes() / 2);
}

/// A copy of the folder in which `change` has changed a file.
void expect_refused(const std::filesystem::path& from, const std::string& name,
                    const std::function<std::string(std::string)>& change,
                    const std::vector<std::string>& words) {
  const Folder folder;
  for (const char* const file : {"config.json", "model.safetensors", "tokenizer.json"}) {
    std::ifstream stream(from / file, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(stream), {}};
    if (name == file) text = change(std::move(text));
    folder.write(file, text);
  }
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(folder.path()); }, words);
}
std::function<std::string(std::string)> replace(const std::string& from, const std::string& to) {
  return [=](std::string text) {
    const auto at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
}

TEST_F(Stories, FilesThatAreNotWhatTheyClaimAreRefused) {
  const auto config = [&](const std::string& from, const std::string& to,
                          const std::vector<std::string>& words) {
    expect_refused(folder_, "config.json", replace(from, to), words);
  };
  config("\"llama\"", "\"deepseek_v3\"", {"config.json", "model_type", "deepseek_v3"});
  config("\"hidden_size\": 64", "\"hidden_size\": 128",
         {"model.safetensors", "input_layernorm", "(64)", "(128)"});
  config("\"hidden_size\": 64", "\"hidden_size\": 2147483632",  // before memory is taken for it
         {"model.safetensors", "input_layernorm", "(64)", "(2147483632)"});
  config("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 6", {"model.layers.5", "is missing"});
  config("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 4",
         {"model.layers.4", "no part of a llama model"});
  config("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 1000000000",
         {"num_hidden_layers", "100000"});
  config("\"num_attention_heads\": 8", "\"num_attention_heads\": 0",
         {"num_attention_heads", "not positive"});
  config("\"num_key_value_heads\": 4", "\"num_key_value_heads\": 3", {"kv_heads"});
  config("\"rope_theta\": 10000.0", "\"rope_theta\": \"x\"", {"rope_theta", "not a number"});
  config("\"rope_theta\": 10000.0", "\"rope_theta\": -1", {"base"});
  config("\"silu\"", "\"mish\"", {"hidden_act", "mish"});
  config("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false",
         {"lm_head.weight", "missing"});
  config("{", "[", {"config.json", "not JSON"});
  expect_refused(folder_, "model.safetensors",
                 [](std::string text) { return text.substr(0, 5000); }, {"model.safetensors"});
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(folder_ / "none"); },
                                    {"config.json"});
}

TEST_F(Stories, BadTokensAreRefused) {
  auto model = ef::load_model<float>(folder_);
  const std::vector<std::int32_t> none, large{512};
  expect_throws<std::invalid_argument>([&] { ef::generate(model, none); }, {"ids is empty"});
  expect_throws<std::invalid_argument>([&] { ef::generate(model, large); }, {"512"});
  expect_throws<std::invalid_argument>([&] { model.logits(large); }, {"512"});
  expect_throws<std::invalid_argument>(
      [&] { ef::generate(model, first(1), {.max_new_tokens = -1}); }, {"max_new_tokens is -1"});
  EXPECT_EQ(model.logits(none).dimension(0), 0);
}

// ---- families -----------------------------------------------------------------------------------

/// Element i of the tensor of this name, as golden/make_models.py has it.
class Weights {
 public:
  Weights(std::string_view name, bool matrix)
      : matrix_(matrix), mean_(!matrix && name.ends_with("weight") ? 1.0 : 0.0) {
    for (const char c : name)
      seed_ = (seed_ ^ static_cast<unsigned char>(c)) * std::uint64_t{0x100000001b3};
  }
  float operator()(std::uint64_t i) const {
    std::uint64_t z = seed_ + (i + 1) * std::uint64_t{0x9e3779b97f4a7c15};
    z = (z ^ (z >> 30)) * std::uint64_t{0xbf58476d1ce4e5b9};
    z = (z ^ (z >> 27)) * std::uint64_t{0x94d049bb133111eb};
    z ^= z >> 31;
    const double u = static_cast<double>(z >> 40) / 16777216.0 - 0.5;
    return static_cast<float>(matrix_ ? u * 2 : u * 0.5 + mean_);
  }

 private:
  bool matrix_;
  double mean_;
  std::uint64_t seed_ = 0xcbf29ce484222325;
};

template <typename T>
constexpr const char* kDtype = "F32";
template <>
constexpr const char* kDtype<ef::bfloat16> = "BF16";

/// A model of golden/models.json as a folder of files, its weights in T.
template <typename T>
void write_family(const Folder& folder, const nlohmann::json& model) {
  folder.write("config.json", model.at("config").dump());
  folder.write(
      "tokenizer.json",
      R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []})");
  nlohmann::json header;
  std::string data;
  for (const auto& tensor : model.at("tensors")) {
    const auto name = tensor[0].get<std::string>();
    const auto shape = tensor[1].get<std::vector<std::uint64_t>>();
    const Weights weights(name, shape.size() > 1);
    const std::size_t begin = data.size();
    const auto count =
        std::accumulate(shape.begin(), shape.end(), std::uint64_t{1}, std::multiplies<>());
    for (std::uint64_t i = 0; i < count; ++i) {
      const T value = static_cast<T>(weights(i));
      data.append(reinterpret_cast<const char*>(&value), sizeof(T));
    }
    header[name] = {{"dtype", kDtype<T>}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  folder.write("model.safetensors",
               std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text + data);
}

const std::vector<std::int32_t> kIds{3, 17, 5, 29, 8, 8, 21, 1, 30, 12};

/// Logits of kIds, in chunks of two lengths, beside a sequence of padding-free neighbours.
ef::Tensor<float, 2> ragged_logits(ef::Model<float>& model) {
  ef::PagedKvCache<float> cache = model.make_cache(64, 4);
  const std::vector<ef::SequenceId> sequences{cache.add_sequence(), cache.add_sequence()};
  ef::Tensor<float, 2> all(10, 32);
  Index begin = 0;
  for (const Index n : {4, 1, 3, 2}) {
    std::vector<std::int32_t> tokens{7, 9};
    tokens.insert(tokens.end(), kIds.begin() + begin, kIds.begin() + begin + n);
    std::vector<Index> wanted(static_cast<std::size_t>(n));
    std::iota(wanted.begin(), wanted.end(), Index{2});
    const auto logits =
        model.decoder().step({tokens, std::vector<Index>{0, 2, 2 + n}, wanted}, cache, sequences);
    std::copy_n(logits.data(), logits.size(), all.data() + begin * 32);
    begin += n;
  }
  return all;
}

TEST(Families, AreThoseOfTransformers) {
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/models.json");
  const auto models = nlohmann::json::parse(file);
  ASSERT_GT(models.size(), 25u);
  for (const auto& [name, golden] : models.items()) {
    SCOPED_TRACE(name);
    ef::Tensor<double, 2> expected(10, 32);
    for (Index i = 0; i < 320; ++i)
      expected.data()[i] = golden.at("logits")[static_cast<std::size_t>(i / 32)]
                               .at(static_cast<std::size_t>(i % 32))
                               .get<double>();
    const Folder folder;
    write_family<float>(folder, golden);
    auto model = ef::load_model<float>(folder.path());
    const auto logits = model.logits(kIds);
    EXPECT_LT(relative_error(logits, expected), 1e-5);
    EXPECT_TRUE(same_bits(ragged_logits(model), logits));
    EXPECT_EQ(ef::generate(model, kIds, {.max_new_tokens = 64, .chunk = 3}),
              golden.at("greedy").get<std::vector<std::int32_t>>());
    auto rounded = ef::load_model<float>(folder.path(), {.weights = ef::WeightFormat::int8});
    EXPECT_LT(relative_error(rounded.logits(kIds), expected), 0.15);

    const Folder narrow;
    write_family<ef::bfloat16>(narrow, golden);
    auto half = ef::load_model<ef::bfloat16>(narrow.path());
    EXPECT_LT(relative_error(half.logits(kIds), expected),
              1.5 * golden.at("bfloat16_error").get<double>());
  }
}

TEST(Families, ATableOfPositionsEndsTheText) {
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/models.json");
  const auto golden = nlohmann::json::parse(file).at("gpt2");
  const Folder folder;
  write_family<float>(folder, golden);
  auto model = ef::load_model<float>(folder.path());
  const auto positions = static_cast<std::size_t>(model.config().form.positions);
  ASSERT_GT(positions, 74u);
  const auto text = ef::generate(model, kIds, {.max_new_tokens = 100000});
  EXPECT_EQ(text.size(), positions - kIds.size());
  const auto expected = golden.at("greedy").get<std::vector<std::int32_t>>();
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), text.begin()));
  expect_throws<std::length_error>(
      [&] { ef::generate(model, std::vector<std::int32_t>(positions + 1), {}); }, {"generate"});
}

// ---- the same in GGUF ---------------------------------------------------------------------------

/// A GGUF file, put together from metadata and tensors.
class GgufWriter {
 public:
  void text(const std::string& key, std::string_view value) {
    key_of(key, 8);
    put_text(metadata_, value);
  }
  void integer(const std::string& key, std::uint32_t value) {
    key_of(key, 4);
    put(metadata_, value);
  }
  void number(const std::string& key, float value) {
    key_of(key, 6);
    put(metadata_, value);
  }
  void texts(const std::string& key, const std::vector<std::string>& values) {
    key_of(key, 9);
    put(metadata_, std::uint32_t{8});
    put(metadata_, std::uint64_t{values.size()});
    for (const std::string& value : values) put_text(metadata_, value);
  }
  void tensor(const std::string& name, const std::vector<std::uint64_t>& shape,
              const std::vector<float>& values) {
    put_text(tensors_, name);
    put(tensors_, static_cast<std::uint32_t>(shape.size()));
    for (std::size_t d = shape.size(); d > 0; --d) put(tensors_, shape[d - 1]);
    put(tensors_, std::uint32_t{0});
    put(tensors_, std::uint64_t{data_.size()});
    data_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    data_.resize((data_.size() + 31) / 32 * 32);
    ++tensor_count_;
  }
  std::string file() const {
    std::string head = "GGUF";
    put(head, std::uint32_t{3});
    put(head, tensor_count_);
    put(head, value_count_);
    head += metadata_ + tensors_;
    head.resize((head.size() + 31) / 32 * 32);
    return head + data_;
  }

 private:
  template <typename T>
  static void put(std::string& to, T value) {
    to.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  static void put_text(std::string& to, std::string_view value) {
    put(to, std::uint64_t{value.size()});
    to += value;
  }
  void key_of(const std::string& key, std::uint32_t type) {
    put_text(metadata_, key);
    put(metadata_, type);
    ++value_count_;
  }

  std::string metadata_, tensors_, data_;
  std::uint64_t tensor_count_ = 0, value_count_ = 0;
};

/// A tensor's name in GGUF.
std::string gguf_name(std::string name) {
  const std::pair<const char*, const char*> parts[] = {{"model.embed_tokens", "token_embd"},
                                                       {"model.norm", "output_norm"},
                                                       {"lm_head", "output"},
                                                       {"model.layers.", "blk."},
                                                       {"input_layernorm", "attn_norm"},
                                                       {"post_attention_layernorm", "ffn_norm"},
                                                       {"self_attn.q_proj", "attn_q"},
                                                       {"self_attn.k_proj", "attn_k"},
                                                       {"self_attn.v_proj", "attn_v"},
                                                       {"self_attn.o_proj", "attn_output"},
                                                       {"self_attn.qkv_proj", "attn_qkv"},
                                                       {"self_attn.q_norm", "attn_q_norm"},
                                                       {"self_attn.k_norm", "attn_k_norm"},
                                                       {"mlp.gate_up_proj", "ffn_up"},
                                                       {"mlp.gate_proj", "ffn_gate"},
                                                       {"mlp.up_proj", "ffn_up"},
                                                       {"mlp.down_proj", "ffn_down"}};
  for (const auto& [from, to] : parts)
    if (const auto at = name.find(from); at != std::string::npos)
      name.replace(at, std::string_view(from).size(), to);
  return name;
}

/// A model of golden/models.json as llama.cpp's converter writes it.
std::string gguf_of(const nlohmann::json& golden, const std::string& architecture) {
  const auto& config = golden.at("config");
  const auto integer = [&](const char* key) { return config.at(key).get<std::uint32_t>(); };
  const std::uint32_t heads = integer("num_attention_heads"), features = integer("hidden_size");
  const std::uint32_t head_dim = config.value("head_dim", features / heads);
  GgufWriter writer;
  writer.text("general.architecture", architecture);
  const auto key = [&](const char* name) { return architecture + "." + name; };
  writer.integer(key("embedding_length"), features);
  writer.integer(key("block_count"), integer("num_hidden_layers"));
  writer.integer(key("feed_forward_length"), integer("intermediate_size"));
  writer.integer(key("attention.head_count"), heads);
  writer.integer(key("attention.head_count_kv"), integer("num_key_value_heads"));
  writer.integer(key("attention.key_length"), head_dim);
  writer.integer(key("attention.value_length"), head_dim);
  writer.integer(key("rope.dimension_count"), head_dim);
  writer.integer(key("context_length"), 128);
  writer.number(key("attention.layer_norm_rms_epsilon"), config.at("rms_norm_eps").get<float>());
  writer.number(key("rope.freq_base"), 10000.0f);
  if (config.contains("sliding_window") && !config.at("sliding_window").is_null() &&
      config.value("use_sliding_window", true))
    writer.integer(key("attention.sliding_window"), integer("sliding_window"));
  writer.text("tokenizer.ggml.model", "gpt2");
  writer.text("tokenizer.ggml.pre", "gpt-2");
  std::vector<std::string> tokens;
  for (int i = 0; i < 32; ++i) tokens.push_back(std::string(1, static_cast<char>('A' + i)));
  writer.texts("tokenizer.ggml.tokens", tokens);
  writer.texts("tokenizer.ggml.merges", {});
  for (const auto& tensor : golden.at("tensors")) {
    const auto name = tensor[0].get<std::string>();
    const auto shape = tensor[1].get<std::vector<std::uint64_t>>();
    const Weights weights(name, shape.size() > 1);
    const std::size_t columns = shape.size() > 1 ? shape[1] : 1;
    std::vector<float> values(shape[0] * columns);
    const bool turns = architecture == "llama" && (name.find("q_proj") != std::string::npos ||
                                                   name.find("k_proj") != std::string::npos);
    for (std::size_t i = 0; i < values.size(); ++i) {
      // Row 2 p + h of a head is row p of its half h.
      std::size_t row = i / columns;
      if (turns) {
        const std::size_t in_head = row % head_dim;
        row = row - in_head + in_head % 2 * (head_dim / 2) + in_head / 2;
      }
      values[i] = weights(row * columns + i % columns);
      if (architecture == "gemma" && name.find("norm") != std::string::npos) values[i] += 1.0f;
    }
    writer.tensor(gguf_name(name), shape, values);
  }
  return writer.file();
}

TEST(GgufFamilies, AreThoseOfTransformers) {
  std::ifstream file(EIGENFORMER_GOLDEN_DIR "/models.json");
  const auto models = nlohmann::json::parse(file);
  const Folder folder;
  for (const auto& [name, architecture] : std::map<std::string, std::string>{{"llama", "llama"},
                                                                             {"mistral", "llama"},
                                                                             {"qwen2", "qwen2"},
                                                                             {"qwen3", "qwen3"},
                                                                             {"gemma", "gemma"},
                                                                             {"phi3", "phi3"}}) {
    SCOPED_TRACE(name);
    const auto& golden = models.at(name);
    const auto path = folder.write(name + ".gguf", gguf_of(golden, architecture));
    auto model = ef::load_model<float>(path);
    EXPECT_EQ(ef::generate(model, kIds, {.max_new_tokens = 64}),
              golden.at("greedy").get<std::vector<std::int32_t>>());
  }
  std::string other = gguf_of(models.at("llama"), "mamba");
  expect_throws<ef::ModelFileError>(
      [&] { ef::load_model<float>(folder.write("mamba.gguf", other)); },
      {"mamba.gguf", "general.architecture", "mamba"});
}

}  // namespace
