// Tiny models of every family, as folders and as GGUF: logits and greedy text are those of
// transformers (golden/make_models.py), in whatever layout files have the tensors.
#include <eigenformer/model.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>

#include "../model/expert_files.h"
#include "compare.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere;

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

/// A model packed into one file and opened from it alone is what it was.
void expect_same_packed(const std::filesystem::path& source, ef::Model<float>& model,
                        const ef::LoadOptions& options) {
  const Folder folder;
  const auto packed = folder.path() / "model.packed";
  ef::pack_model<float>(kHere, source, packed, options);
  auto opened = ef::load_model<float>(packed, {.length = options.length});
  EXPECT_EQ(opened.weight_bytes(), model.weight_bytes());
  EXPECT_EQ(opened.config().family, model.config().family);
  EXPECT_EQ(opened.config().positions, model.config().positions);
  EXPECT_EQ(opened.tokenizer().eos(), model.tokenizer().eos());
  EXPECT_EQ(opened.tokenizer().encode("a b"), model.tokenizer().encode("a b"));
  EXPECT_TRUE(same_bits(opened.logits(kIds), model.logits(kIds)));
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
    const ef::LoadOptions in_int8{.weights = ef::WeightFormat::int8};
    auto rounded = ef::load_model<float>(folder.path(), in_int8);
    EXPECT_LT(relative_error(rounded.logits(kIds), expected), 0.15);
    expect_same_packed(folder.path(), rounded, in_int8);
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

/// Logits after each row of a padded batch, and the tokens that greedy decoding adds to each.
TEST(Families, PaddedBatchesAreThoseOfTransformers) {
  const auto models = golden_file("models.json");
  const std::array<Index, 3> begins{0, 2, 5}, lengths{10, 6, 3};
  ef::Tensor<std::int32_t, 2> ids(3, 10);
  ids.setConstant(-1);  // no id: what stands in the padding is not read
  for (Index b = 0; b < 3; ++b)
    std::copy_n(kIds.begin() + begins[static_cast<std::size_t>(b)],
                lengths[static_cast<std::size_t>(b)], ids.data() + b * 10);
  int batches = 0;
  for (const auto& [name, golden] : models.items()) {
    if (!golden.contains("padded")) continue;
    SCOPED_TRACE(name);
    ++batches;
    const auto& padded = golden.at("padded");
    const Folder folder;
    write_family<float>(folder, golden);
    auto model = ef::load_model<float>(folder.path());
    auto cache = model.make_cache(96, 4);
    const std::array sequences{cache.add_sequence(), cache.add_sequence(), cache.add_sequence()};
    auto logits = model.decoder().prefill(ids, lengths, cache, sequences);
    for (const char* side : {"left", "right"}) {
      const auto rows = padded.at(side).get<std::vector<std::vector<double>>>();
      ef::Tensor<double, 2> expected(3, 32);
      for (Index i = 0; i < 96; ++i)
        expected.data()[i] =
            rows.at(static_cast<std::size_t>(i / 32)).at(static_cast<std::size_t>(i % 32));
      EXPECT_LT(relative_error(logits, expected), 1e-5) << side;
    }
    std::vector<std::vector<std::int32_t>> greedy(3);
    for (int step = 0; step < 12; ++step) {
      const auto next = ef::greedy_sample(logits);
      for (Index b = 0; b < 3; ++b) greedy[static_cast<std::size_t>(b)].push_back(next(b));
      logits = model.decoder().decode(next, cache, sequences);
    }
    EXPECT_EQ(greedy, padded.at("greedy").get<std::vector<std::vector<std::int32_t>>>());
  }
  EXPECT_GE(batches, 4);
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
  // Of 16 features no block is full.
  auto narrow = golden;
  for (auto& tensor : narrow.at("tensors"))
    if (tensor[0] == "model.layers.0.mlp.experts.gate_up_proj")
      tensor[0] = "model.layers.0.mlp.experts.gate_up_proj_blocks";
  const Folder folder;
  write_family<float>(folder, narrow);
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(folder.path()); },
                                    {"layers.0.mlp.experts.gate_up_proj", "multiple of 32"});
}

// A configuration may lie: an expert's gates would be 69 GB here, of which the file has a number.
TEST(Families, ExpertsThatAreNotInTheFileTakeNoMemory) {
  constexpr std::int64_t wide = 1 << 17;
  auto config = golden_file("models.json").at("gpt_oss").at("config");
  config.update({{"hidden_size", wide}, {"intermediate_size", wide}, {"head_dim", 2}});
  config["num_attention_heads"] = config["num_key_value_heads"] = 1;
  config.erase("rope_parameters");
  FileTensors tensors;
  const auto zeros = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    const auto size =
        std::accumulate(shape.begin(), shape.end(), std::size_t{2}, std::multiplies<>());
    tensors["model.layers.0." + name] = {ef::StoredFormat::bf16, shape, std::string(size, 0)};
  };
  for (const char* const name :
       {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.bias"})
    zeros(name, {wide});
  for (const std::string name : {"q", "k", "v"}) {
    zeros("self_attn." + name + "_proj.weight", {2, wide});
    zeros("self_attn." + name + "_proj.bias", {2});
  }
  zeros("self_attn.sinks", {1});
  zeros("self_attn.o_proj.weight", {wide, 2});
  zeros("mlp.router.weight", {4, wide});
  zeros("mlp.router.bias", {4});
  zeros("mlp.experts.gate_up_proj_bias", {4, 2 * wide});
  zeros("mlp.experts.down_proj_bias", {4, wide});
  for (const char* const matrix : {"mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_blocks"}) {
    SCOPED_TRACE(matrix);
    auto lie = tensors;
    lie["model.layers.0." + std::string(matrix)] = FileTensor::of({1}, {1});
    const Folder folder;
    write_model(folder, config, lie);
    expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(folder.path()); },
                                      {matrix, "has shape (1)"});
  }
}

TEST(Families, DecodersOfModelsThatSeeImages) {
  const auto models = golden_file("models.json");
  for (const auto& [whole, name] : {std::pair{"gemma3", "gemma3"}, {"mistral3", "mistral"}}) {
    SCOPED_TRACE(whole);
    const auto& golden = models.at(name);
    const Folder alone;
    write_family<float>(alone, golden);
    const auto logits = ef::load_model<float>(alone.path()).logits(kIds);
    for (const bool newer : {false, true}) {
      FileTensors tensors;
      for (const auto& tensor : golden.at("tensors")) {
        const auto own = tensor[0].get<std::string>();
        const auto shape = tensor[1].get<std::vector<std::int64_t>>();
        const bool of_layers = newer && own.starts_with("model.");
        tensors[of_layers ? "model.language_model." + own.substr(6)
                          : (newer ? "" : "language_model.") + own] =
            FileTensor::of(shape, golden_values(own, shape));
      }
      tensors["vision_tower.embeddings.weight"] = FileTensor::of({2}, {1, 2});
      const Folder folder;
      write_model(folder, {{"model_type", whole}, {"text_config", golden.at("config")}}, tensors);
      EXPECT_TRUE(same_bits(ef::load_model<float>(folder.path()).logits(kIds), logits));
    }
  }
}

TEST(Families, WhatGemma3LeavesOutIsUsual) {
  const auto read = [](const std::string& text) {
    return ef::parse_model_config(
        R"({"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
            "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"})" +
            text,
        "config.json");
  };
  const auto config = read("}}");
  EXPECT_EQ(config.shape.vocabulary, 262208);
  EXPECT_EQ(config.shape.heads, 8);
  EXPECT_EQ(config.shape.kv_heads, 4);
  EXPECT_EQ(config.shape.head_dim, 256);
  EXPECT_EQ(config.shape.epsilon, 1e-6f);
  EXPECT_EQ(config.positions, 131072);
  EXPECT_EQ(config.form.attention_scale, 1.0f / 16);
  EXPECT_EQ(config.form.layer(4).window, 1024);
  EXPECT_EQ(config.form.layer(5).window, 0);
  EXPECT_TRUE(config.tied_head);
  expect_throws<ef::ModelFileError>([&] { read(R"(, "use_bidirectional_attention": true}})"); },
                                    {"text_config.use_bidirectional_attention"});
  expect_throws<ef::ModelFileError>(
      [&] { read(R"(}, "quantization_config": {"quant_method": "gptq"}})"); },
      {"config.json", "quantization_config.quant_method", "gptq"});
}

TEST(Families, SlopesOfFalconAreNoMoreThanItsHeads) {
  auto config = golden_file("models.json").at("falcon_alibi").at("config");
  const auto read = [&] { return ef::parse_model_config(config.dump(), "config.json"); };
  EXPECT_EQ(read().form.alibi_slopes.size(), 4u);
  config["num_attention_heads"] = 1 << 20;
  expect_throws<ef::ModelFileError>(read, {"config.json", "num_attention_heads", "65536"});
  config["num_attention_heads"] = std::int64_t{1} << 40;
  expect_throws<ef::ModelFileError>(read, {"config.json", "num_attention_heads", "2^31"});
}

// What a step would refuse is refused where it is read.
TEST(Families, LimitsOfGptOssArePositive) {
  auto config = golden_file("models.json").at("gpt_oss").at("config");
  config["swiglu_limit"] = -1;
  expect_throws<ef::ModelFileError>([&] { ef::parse_model_config(config.dump(), "config.json"); },
                                    {"config.json", "limit is -1"});
}

TEST(Families, WhatOthersSayOfExpertsIsRefused) {
  const auto models = golden_file("models.json");
  const auto read = [&](const char* family, const char* key, const nlohmann::json& value) {
    nlohmann::json config = models.at(family).at("config");
    config[key] = value;
    return ef::parse_model_config(config.dump(), "config.json");
  };
  using Json = nlohmann::json;
  const std::vector<std::tuple<const char*, Json, Json>> words{
      // what is refused, and what says what is done anyway
      {"n_group", 8, 1},
      {"topk_group", 4, 1},
      {"routed_scaling_factor", 2.5, 1.0},
      {"n_shared_experts", 1, nullptr},
      {"num_shared_experts", 2, 0},
      {"moe_num_shared_experts", 1, 0},
      {"first_k_dense_replace", 1, 0},
      {"moe_layer_start_index", 3, 0},
      {"moe_layer_interval", 2, 1},
      {"moe_layer_freq", Json{0, 1, 1}, Json{1, 1, 1}},
      {"scoring_func", "sigmoid", "softmax"},
      {"topk_method", "noaux_tc", "greedy"}};
  for (const char* const family : {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama"})
    for (const auto& word : words) {
      const auto& [key, refused, usual] = word;
      EXPECT_EQ(read(family, key, usual).form.experts.routing.groups, 1);
      expect_throws<ef::ModelFileError>([&] { read(family, std::get<0>(word), std::get<1>(word)); },
                                        {"config.json", key, "not supported in this family"});
    }
  for (const char* const family : {"mixtral", "gpt_oss", "llama"}) {
    read(family, "decoder_sparse_step", 1);
    read(family, "mlp_only_layers", Json::array());
    expect_throws<ef::ModelFileError>([&] { read(family, "decoder_sparse_step", 2); },
                                      {"decoder_sparse_step", "experts in some layers"});
    expect_throws<ef::ModelFileError>([&] { read(family, "mlp_only_layers", Json{1}); },
                                      {"mlp_only_layers", "experts in some layers"});
  }
  const auto& layers = read("qwen3_moe", "mlp_only_layers", Json{1}).form.layers;
  EXPECT_TRUE(layers.at(1).dense);
  for (const char* const other : {"deepseek_v3", "ernie4_5_moe"})
    expect_throws<ef::ModelFileError>([&] { read("qwen3_moe", "model_type", other); },
                                      {"model_type", other, "not supported"});
  // a bias of the router's choice is a tensor
  Json biased = models.at("qwen3_moe");
  biased.at("tensors").push_back({"model.layers.1.mlp.gate.e_score_correction_bias", {6}});
  const Folder folder;
  write_family<float>(folder, biased);
  expect_throws<ef::ModelFileError>(
      [&] { ef::load_model<float>(folder.path()); },
      {"model.layers.1.mlp.gate.e_score_correction_bias", "no part of a qwen3_moe model"});
}

TEST(Families, OfGlmTheLayersForTokensFurtherAheadAreLeftOut) {
  const auto golden = golden_file("models.json").at("glm4_moe");
  const auto logits_with = [&](const char* tensor, const char* without, int further) {
    auto model = golden;
    model.at("config")["num_nextn_predict_layers"] = further;
    auto& tensors = model.at("tensors");
    tensors.push_back({tensor, {16}});
    for (auto it = tensors.begin(); it != tensors.end(); ++it)
      if (it->at(0) == without) {
        tensors.erase(it);
        break;
      }
    const Folder folder;
    write_family<float>(folder, model);
    return ef::load_model<float>(folder.path()).logits(kIds);
  };
  const Folder alone;
  write_family<float>(alone, golden);
  const char* const layer3 = "model.layers.3.enorm.weight";
  EXPECT_TRUE(
      same_bits(logits_with(layer3, "", 1), ef::load_model<float>(alone.path()).logits(kIds)));
  for (const auto& [tensor, further] : {std::pair{layer3, 0}, {"model.layers.4.enorm.weight", 1}})
    expect_throws<ef::ModelFileError>([&, t = tensor, n = further] { logits_with(t, "", n); },
                                      {tensor, "no part of a glm4_moe model"});
  expect_throws<ef::ModelFileError>([&] { logits_with(layer3, "", 17); },
                                    {"num_nextn_predict_layers"});
  const char* const bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  expect_throws<ef::ModelFileError>([&] { logits_with(layer3, bias, 1); }, {bias, "missing"});
}

TEST(Families, ATableOfPositionsEndsTheText) {
  const auto golden = golden_file("models.json").at("gpt2");
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
    expect_same_packed(folder.path() / "m.gguf", loaded, how);
  }
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
