// A trained model as its author published it (shared/models/stories260K): loaded, text becomes ids
// and back, and greedy decoding writes the published text, token by token: with any chunks, in a
// batch, beside other sequences in pages. Files that are not what they claim are refused.
#include <eigenformer/model.h>

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

}  // namespace
