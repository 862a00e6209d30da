// A trained model as its author published it (shared/models/stories260K): loaded, text becomes ids
// and back, and greedy decoding writes the published text, token by token: with any chunks, in a
// batch, beside other sequences in pages, from packed weights that a start has kept. Files that are
// not what they claim are refused, packed models that are not for this call too. Tiny models on a
// GPU.
#include <eigenformer/model.h>

#include <array>
#include <cstring>
#include <iterator>
#include <set>

#include "../model/family_files.h"
#include "allocations.h"
#include "device.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere;

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

TEST_F(Stories, TheCallerEndsThePrompt) {
  auto model = ef::load_model<float>(folder_);
  ef::TextGenerator generator(model);
  std::vector<Index> read;
  ef::GenerateOptions how{.max_new_tokens = 10, .chunk = 16};
  how.on_prompt = [&](Index done, Index all) {
    EXPECT_EQ(all, 60);
    read.push_back(done);
    return done < 32;
  };
  how.on_token = [](std::int32_t) { return ADD_FAILURE(), false; };
  EXPECT_TRUE(generator.generate(first(60), how).empty());
  EXPECT_EQ(read, (std::vector<Index>{16, 32}));
  // What was read is not read again.
  read.clear();
  how.on_prompt = [&](Index done, Index) { return read.push_back(done), true; };
  how.on_token = {};
  EXPECT_EQ(generator.generate(first(60), how),
            (std::vector<std::int32_t>(published_.begin() + 60, published_.begin() + 70)));
  EXPECT_EQ(generator.reused(), 32);
  EXPECT_EQ(read, (std::vector<Index>{48, 60}));
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
  for (const auto& source : {folder_, folder_ / "model.gguf"}) {
    auto model = ef::load_model<float>(source);
    ef::PagedKvCache<float> cache = model.make_cache(3 * 300);
    const std::vector<ef::SequenceId> sequences{cache.add_sequence(), cache.add_sequence(),
                                                cache.add_sequence()};
    auto logits = model.decoder().step({tokens, offsets, last}, cache, sequences);
    for (std::size_t step = 0; step < 256; ++step) {
      const auto next = ef::greedy_sample(logits);
      for (std::size_t r = 0; r < 3; ++r)
        if (prompts[r] + step < published_.size()) {
          ASSERT_EQ(next(static_cast<Index>(r)), published_[prompts[r] + step]) << r << " " << step;
        }
      logits = model.decoder().decode(next, cache, sequences);
    }
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
               groups = relative_error(with({ef::WeightFormat::int8, 32}), expected),
               fours = relative_error(with(ef::WeightFormat::int4), expected);
  EXPECT_GT(half, 0);
  EXPECT_LT(half, 2e-3);
  EXPECT_LT(half, pairs);
  EXPECT_LT(pairs, 2e-2);
  EXPECT_LT(groups, 5e-2);
  EXPECT_LT(channels, 5e-2);
  EXPECT_LT(fours, 0.2);
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

TEST(PackedModel, IsRefusedWhereItIsNotForThisCall) {
  const Folder folder, other;
  write_family<float>(folder, golden_file("models.json").at("llama"));
  folder.write("chat_template.jinja", "{{ bos_token }}");
  const auto packed = other.path() / "model.packed";
  const ef::LoadOptions in_int4{.weights = {ef::WeightFormat::int4, 64}};
  const auto open = [&](const ef::LoadOptions& options) {
    return ef::load_model<float>(packed, options);
  };
  ef::pack_model<float>(kHere, folder.path(), packed, in_int4);
  EXPECT_TRUE(ef::is_packed_model<float>(packed));
  EXPECT_FALSE(ef::is_packed_model<ef::bfloat16>(packed));
  EXPECT_EQ(open({}).tokenizer().chat_template(), "{{ bos_token }}");
  EXPECT_EQ(open(in_int4).weight_bytes(), open({}).weight_bytes());
  expect_throws<std::invalid_argument>([&] { open({.weights = ef::WeightFormat::int4}); },
                                       {"load_model", "model.packed", "int4 64"});
  expect_throws<std::invalid_argument>([&] { open({.cache = other.path() / "kept"}); },
                                       {"load_model", "cache"});
  expect_throws<ef::ModelFileError>([&] { ef::load_model<ef::bfloat16>(packed); },
                                    {"model.packed", "activations of float", "of bfloat16"});
  expect_throws<ef::ModelFileError>(
      [&] { ef::pack_model<float>(kHere, packed, other.path() / "twice"); },
      {"model.packed", "neither a folder nor"});
  // A cache's file is another, and so is what is none; neither is written over but by its own kind.
  ef::load_model<float>(folder.path(), {.cache = other.path() / "kept"});
  EXPECT_FALSE(ef::is_packed_model<float>(other.path() / "kept"));
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(other.path() / "kept"); },
                                    {"kept", "a cache"});
  const auto letter = other.write("letter", "Dear model");
  EXPECT_FALSE(ef::is_packed_model<float>(letter));
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(letter); },
                                    {"letter", "no file of packed weights"});
  expect_throws<ef::ModelFileError>([&] { ef::pack_model<float>(kHere, folder.path(), letter); },
                                    {"letter", "stays what it is"});
  EXPECT_EQ(std::filesystem::file_size(letter), 10u);
  // load_model would not know it again.
  expect_throws<std::invalid_argument>(
      [&] { ef::pack_model<float>(kHere, folder.path(), other.path() / "m.gguf"); },
      {"pack_model", "packed is", "m.gguf", "does not end with .gguf"});
  EXPECT_FALSE(std::filesystem::exists(other.path() / "m.gguf"));
  // A file that cannot be made is known before anything is packed.
  int packs = 0;
  for (const auto& to : {other.path() / "none" / "model.packed", other.path()})
    expect_throws<ef::ModelFileError>(
        [&] {
          ef::pack_model<float>(kHere, folder.path(), to,
                                {.progress = [&](auto, auto) { ++packs; }});
        },
        {to.filename().string(), "cannot be written"});
  EXPECT_EQ(packs, 0);
  // Packed for other kernels, or by another version: the key says so, the checksum agrees.
  std::ifstream stream(packed, std::ios::binary);
  std::string good{std::istreambuf_iterator<char>(stream), {}};
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    std::int64_t head = 0;
    std::memcpy(&head, text.data() + 24, 8);
    const std::int64_t sum =
        ef::detail::PagedChecksum::of(text.data(), static_cast<std::size_t>(head) - 8);
    std::memcpy(text.data() + head - 8, &sum, 8);
    other.write("model.packed", text);
  };
  const auto expect_refused = [&](const std::vector<std::string>& words) {
    expect_throws<ef::ModelFileError>([&] { open({}); }, words);
  };
  changed("\nisa ", "\nisa\t");
  expect_refused({"model.packed", "for the ISA", "pack the model again"});
  changed("eigenformer 0", "eigenformer 9");
  expect_refused({"model.packed", "version 9"});
  changed("weights int4 64", "weights int4 65");
  expect_refused({"model.packed", "65"});
  changed("weights int4", "weights int5");
  expect_refused({"model.packed", "what its weights are"});
  changed("\npacking ", "\npackage ");
  expect_refused({"model.packed", "way of packing no. ", "pack the model again"});
  // Texts have checksums of their own.
  changed("\"llama\"", "\"mamba\"");
  expect_refused({"model.packed", "is damaged"});
  std::ifstream config_stream(folder.path() / "config.json", std::ios::binary);
  std::string config{std::istreambuf_iterator<char>(config_stream), {}};
  const auto sum_of = [](const std::string& text) {
    const std::int64_t sum = ef::detail::PagedChecksum::of(text.data(), text.size());
    return std::string(reinterpret_cast<const char*>(&sum), 8);
  };
  const std::string before = sum_of(config);
  config.replace(config.find("\"llama\""), 7, "\"mamba\"");
  good.replace(good.find(before), 8, sum_of(config));
  changed("\"llama\"", "\"mamba\"");
  expect_refused({"model.packed: config.json", "mamba"});
}

// ---- on a GPU -----------------------------------------------------------------------------------

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

}  // namespace
