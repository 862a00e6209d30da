// A trained model as its author published it (shared/models/stories260K): loaded, text becomes ids
// and back, and greedy decoding writes the published text, token by token: with any chunks, in a
// batch, beside other sequences in pages. Tiny models of every family: logits and greedy text are
// those of transformers (golden/make_models.py). Files that are not what they claim are refused.
#include <eigenformer/model.h>

#include <numeric>
#include <set>

#include "allocations.h"
#include "device.h"
#include "expert_files.h"

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

TEST_F(Stories, ASecondStartMapsWhatTheFirstPacked) {
  const Folder folder;
  for (const char* const file : {"config.json", "model.safetensors", "tokenizer.json"})
    std::filesystem::copy_file(folder_ / file, folder.path() / file);
  std::filesystem::create_directory(folder.path() / "kept");
  for (const auto& source : {folder.path(), folder_ / "model.gguf"}) {
    for (const ef::WeightStorage& weights : {ef::WeightStorage(),
                                             {ef::WeightFormat::int8},
                                             {ef::WeightFormat::int8, 32},
                                             {ef::WeightFormat::as_stored}}) {
      int packed = 0;
      const auto load = [&] {
        packed = 0;
        return ef::load_model<float>(source, {.weights = weights,
                                              .progress = [&](auto, auto) { ++packed; },
                                              .cache = folder.path() / "kept"});
      };
      const auto expected = load().logits(published_);
      EXPECT_GT(packed, 0);
      EXPECT_TRUE(same_bits(load().logits(published_), expected));
      EXPECT_EQ(packed, 0);
    }
  }
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path() / "kept"), {}), 8);
  // One file for all: the format that is asked for is what it holds then, and what is no such file
  // stays what it is.
  const auto file = folder.path() / "one";
  const auto logits = [&](const ef::WeightStorage& weights) {
    return ef::load_model<float>(folder.path(), {.weights = weights, .cache = file})
        .logits(first(9));
  };
  const auto exact = logits({});
  EXPECT_FALSE(same_bits(logits(ef::WeightFormat::int8), exact));
  EXPECT_TRUE(same_bits(logits({}), exact));
  // A model that has changed is packed again.
  std::filesystem::last_write_time(folder.path() / "model.safetensors",
                                   std::filesystem::file_time_type::clock::now());
  EXPECT_TRUE(same_bits(logits({}), exact));
  folder.write("one", "a letter");
  expect_throws<ef::ModelFileError>([&] { logits({}); }, {"one", "no file of packed weights"});
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

// F32 as stored is float; narrower formats and groups of INT8 are as near as they are fine.
TEST_F(Stories, WeightsOfEveryFormat) {
  auto exact = ef::load_model<float>(folder_);
  const auto logits = exact.logits(first(60));
  const auto expected = to_double(logits);
  const auto with = [&](const ef::WeightStorage& weights) {
    auto model = ef::load_model<float>(folder_, {.weights = weights});
    return model.logits(first(60));
  };
  EXPECT_TRUE(same_bits(with(ef::WeightFormat::as_stored), logits));
  const double half = relative_error(with(ef::WeightFormat::half), expected),
               pairs = relative_error(with(ef::WeightFormat::bfloat16), expected),
               channels = relative_error(with(ef::WeightFormat::int8), expected),
               groups = relative_error(with({ef::WeightFormat::int8, 32}), expected);
  EXPECT_GT(half, 0);
  EXPECT_LT(half, 2e-3);
  EXPECT_LT(half, pairs);
  EXPECT_LT(pairs, 2e-2);
  EXPECT_LT(groups, 5e-2);
  EXPECT_LT(channels, 5e-2);
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
  const auto models = golden_file("models.json");
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
    auto floats = ef::load_model<float>(folder.path(), {.weights = ef::WeightFormat::as_stored});
    EXPECT_TRUE(same_bits(floats.logits(kIds), logits));

    const Folder narrow;
    write_family<ef::bfloat16>(narrow, golden);
    auto half = ef::load_model<ef::bfloat16>(narrow.path());
    const std::vector<std::int32_t> some{1, 2, 3, 4, 1};
    auto widened = ef::load_model<float>(narrow.path());
    auto stored = ef::load_model<float>(narrow.path(), {.weights = ef::WeightFormat::as_stored});
    EXPECT_TRUE(same_bits(stored.logits(some), widened.logits(some)));
    EXPECT_LT(stored.weight_bytes(), widened.weight_bytes());
    EXPECT_LT(relative_error(half.logits(kIds), expected),
              1.5 * golden.at("bfloat16_error").get<double>());
  }
}

TEST(Families, ExpertsAsFilesHaveThem) {
  const auto models = golden_file("models.json");
  const auto loads = [&](const nlohmann::json& config, const FileTensors& tensors) {
    const Folder folder;
    write_model(folder, config, tensors);
    return ef::load_model<float>(folder.path()).logits(kIds);
  };
  for (const auto& [name, names, block] :
       {std::tuple<const char*, std::array<std::string, 3>, const char*>{
            "mixtral", {"w1", "w3", "w2"}, "block_sparse_moe"},
        {"qwen2_moe", {"gate_proj", "up_proj", "down_proj"}, "mlp"},
        {"qwen3_moe", {"gate_proj", "up_proj", "down_proj"}, "mlp"}}) {
    SCOPED_TRACE(name);
    const auto& golden = models.at(name);
    const Folder folder;
    write_family<float>(folder, golden);
    const auto logits = ef::load_model<float>(folder.path()).logits(kIds);
    auto tensors = hub_tensors(golden, names, block);
    EXPECT_TRUE(same_bits(loads(golden.at("config"), tensors), logits));
    const auto last = std::find_if(tensors.begin(), tensors.end(), [](const auto& tensor) {
      return tensor.first.find(".experts.1.") != std::string::npos;
    });
    const std::string missing = last->first;
    tensors.erase(last);
    expect_throws<ef::ModelFileError>([&] { loads(golden.at("config"), tensors); },
                                      {missing, "missing"});
  }
  const auto& golden = models.at("gpt_oss");
  auto config = golden.at("config");
  config["hidden_size"] = config["intermediate_size"] = 32;
  auto packed = gpt_oss_tensors(golden, true);
  EXPECT_TRUE(same_bits(loads(config, packed), loads(config, gpt_oss_tensors(golden, false))));
  packed.at("model.layers.1.mlp.experts.down_proj_scales").shape = {4, 1, 32};
  expect_throws<ef::ModelFileError>([&] { loads(config, packed); },
                                    {"layers.1.mlp.experts.down_proj_scales", "(4, 1, 32)"});
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

#if defined(EIGENFORMER_TEST_BLOCKS)
TEST(Families, RunOnADevice) {
  const auto models = golden_file("models.json");
  for_each_gpu([&](const auto& bench) {
    for (const char* const name : {"gemma3", "falcon_new", "gpt2"}) {
      SCOPED_TRACE(name);
      const Folder folder;
      write_family<float>(folder, models.at(name));
      auto here = ef::load_model<float>(folder.path());
      auto there = ef::load_model<float>(bench.device, folder.path());
      EXPECT_LT(relative_error(there.logits(kIds), to_double(here.logits(kIds))), 1e-5);
      const auto greedy = models.at(name).at("greedy").template get<std::vector<std::int32_t>>();
      EXPECT_EQ(ef::generate(there, kIds, {.max_new_tokens = 4, .chunk = 7}),
                std::vector<std::int32_t>(greedy.begin(), greedy.begin() + 4));
    }
  });
}
#endif

// ---- the same in GGUF ---------------------------------------------------------------------------

TEST(GgufFamilies, AreThoseOfTheirFolders) {
  const auto models = golden_file("models.json"), files = golden_file("gguf_models.json");
  ASSERT_GT(files.size(), 28u);
  for (const auto& [name, golden] : files.items()) {
    SCOPED_TRACE(name);
    nlohmann::json model = models.at(golden.at("model").get<std::string>());
    const nlohmann::json& changes = golden.at("changes");
    model.at("config").update(changes);
    if (golden.contains("shapes")) model.at("tensors") = golden.at("shapes");
    const Folder folder;
    write_family<float>(folder, model);
    const ef::LoadOptions how{.length = golden.value("length", Index{0})};
    auto expected = ef::load_model<float>(folder.path(), how);
    auto loaded = ef::load_model<float>(folder.write("m.gguf", gguf_of(golden, model)), how);
    EXPECT_LT(relative_error(loaded.logits(kIds), to_double(expected.logits(kIds))), 1e-5);
    EXPECT_EQ(ef::generate(loaded, kIds, {.max_new_tokens = 64}),
              changes.empty() ? model.at("greedy").get<std::vector<std::int32_t>>()
                              : ef::generate(expected, kIds, {.max_new_tokens = 64}));
  }
}

/// The configuration of a file of so many layers that has no tensor but the embedding.
ef::ModelConfig config_of(const std::string& architecture, std::uint32_t layers,
                          const nlohmann::json& more) {
  GgufWriter writer;
  writer.text("general.architecture", architecture);
  const auto key = [&](const std::string& name) { return architecture + "." + name; };
  writer.integer(key("block_count"), layers);
  writer.integer(key("embedding_length"), 16);
  writer.integer(key("attention.head_count"), 2);
  writer.integer(key("attention.key_length"), 4);
  writer.integer(key("feed_forward_length"), 24);
  for (const auto& [name, value] : more.items()) writer.value(key(name), value);
  writer.tensor("token_embd.weight", {32, 16}, std::vector<float>(32 * 16));
  const Folder folder;
  return ef::gguf_model_config(ef::Gguf(folder.write("m.gguf", writer.file())));
}
/// Of each layer: w where it has a window, r where it turns by the first rotation, s by another.
std::string layers_of(const ef::ModelConfig& config) {
  std::string text;
  for (Index l = 0; l < config.shape.layers; ++l) {
    const ef::DecoderLayerForm layer = config.form.layer(l);
    text += (layer.window > 0 ? "w" : "") +
            std::string(layer.rope < 0   ? ""
                        : layer.rope > 0 ? "s"
                                         : "r") +
            " ";
  }
  return text;
}

TEST(GgufFamilies, LayersAreWhatLlamaCppTakesThemToBe) {
  const nlohmann::json window{{"attention.sliding_window", {"uint32", 8}}};
  const auto layers = [](const char* architecture, std::uint32_t count,
                         const nlohmann::json& more) {
    return layers_of(config_of(architecture, count, more));
  };
  EXPECT_EQ(layers("smollm3", 5, {}), "r r r  r ");
  EXPECT_EQ(layers("gemma2", 4, {}), "wr r wr r ");  // 4096 is understood
  EXPECT_EQ(layers("gemma3", 7, window), "ws ws ws ws ws r ws ");
  EXPECT_EQ(layers("gemma3", 2, {}), "r r ");
  EXPECT_EQ(layers("cohere2", 5, window), "wr wr wr  wr ");
  EXPECT_EQ(layers("olmo2", 5, window), "ws ws ws r ws ");
  EXPECT_EQ(layers("qwen3", 2, window), "wr wr ");
  auto pattern = window;
  pattern["attention.sliding_window_pattern"] = {"bools", {false, true, false}};
  EXPECT_EQ(layers("olmo2", 3, pattern), "r ws r ");
  const float scale = config_of("gemma3", 62, window).form.attention_scale;
  EXPECT_FLOAT_EQ(scale, 1 / std::sqrt(8.0f));  // 16 features over 2 heads
  EXPECT_EQ(config_of("gemma3", 34, window).form.attention_scale, 0);
  EXPECT_EQ(config_of("gemma2", 2, {}).form.attention_softcap, 50);
}

TEST(GgufFamilies, WhatIsNotUnderstoodIsRefused) {
  const auto refused = [](const char* architecture, const nlohmann::json& more,
                          const std::vector<std::string>& words) {
    expect_throws<ef::ModelFileError>([&] { config_of(architecture, 3, more); }, words);
  };
  refused("mamba", {}, {"m.gguf", "general.architecture", "mamba"});
  const nlohmann::json some{"uint32", 8}, none{"uint32", 0};
  refused("llama", {{"expert_count", some}}, {"llama.expert_used_count", "missing"});
  refused("gemma", {{"expert_count", some}}, {"gemma.expert_count"});
  refused(
      "qwen3moe",
      {{"expert_count", some}, {"expert_used_count", some}, {"expert_gating_func", {"uint32", 2}}},
      {"qwen3moe.expert_gating_func"});
  refused("qwen2moe",
          {{"expert_count", some},
           {"expert_used_count", some},
           {"expert_weights_norm", {"bool", true}}},
          {"qwen2moe.expert_weights_norm"});
  refused("llama", {{"attention.clamp_kqv", {"float32", 8}}}, {"llama.attention.clamp_kqv"});
  config_of("llama", 3, {{"attention.clamp_kqv", {"float32", 0}}, {"nextn_predict_layers", none}});
  refused("glm4", {{"nextn_predict_layers", some}}, {"glm4.nextn_predict_layers"});
  refused("llama", {{"attention.causal", {"bool", false}}}, {"attention.causal"});
  refused("llama", {{"attention.value_length", some}}, {"attention.value_length"});
  refused("llama", {{"rope.dimension_count", {"uint32", 5}}}, {"rope.dimension_count"});
  refused("llama", {{"rope.scaling.type", {"string", "wave"}}}, {"rope.scaling.type", "wave"});
  refused("phi3", {{"rope.scaling.type", {"string", "longrope"}}}, {"rope_factors_short.weight"});
  refused(
      "llama",
      {{"rope.scaling.type", {"string", "yarn"}}, {"rope.scaling.yarn_ext_factor", {"float32", 2}}},
      {"yarn_ext_factor"});
  refused("gemma2", {{"rope.freq_base_swa", some}}, {"gemma2.rope.freq_base_swa"});
  refused("cohere2", {}, {"cohere2.attention.sliding_window"});
  refused("olmo2",
          {{"attention.sliding_window", some},
           {"attention.sliding_window_pattern", {"bools", {true, false}}}},
          {"sliding_window_pattern", "each layer"});
  refused("falcon", {{"tensor_data_layout", {"string", "other"}}}, {"falcon.tensor_data_layout"});
  refused("granite", {{"rope.scaling.finetuned", {"bool", false}}}, {"finetuned"});
  refused("stablelm", {{"use_parallel_residual", {"bool", false}}}, {"use_parallel_residual"});
}

TEST(GgufFamilies, TensorsThatNobodyReadsAreRefused) {
  const auto models = golden_file("models.json"), files = golden_file("gguf_models.json");
  const auto with = [&](const std::string& name, const std::string& tensor,
                        const std::vector<std::string>& words) {
    nlohmann::json golden = files.at(name);
    golden.at("tensors")[tensor] = {{4}, {{"values", {1, 1, 1, 1}}}};
    const Folder folder;
    expect_throws<ef::ModelFileError>(
        [&] {
          ef::load_model<float>(folder.write(
              "m.gguf", gguf_of(golden, models.at(golden.at("model").get<std::string>()))));
        },
        words);
  };
  with("llama", "blk.0.attn_q_norm.weight", {"blk.0.attn_q_norm.weight", "llama"});
  with("stablelm", "blk.0.attn_q_norm.weight", {"blk.0.attn_q_norm.weight", "LayerNorm"});
  with("llama_yarn", "rope_freqs.weight", {"rope_freqs.weight", "YaRN"});
  with("llama", "rope_freqs.weight", {"rope_freqs.weight", "each pair"});
}

}  // namespace
