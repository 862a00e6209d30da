// Weights in the formats of their file: what is exact has the bits of the model in floats, blocks
// are INT8 by groups; files whose matrices differ in format load, or are refused by name.
#include <eigenformer/model.h>

#include <cmath>
#include <cstring>
#include <set>
#include <tuple>

#include "compare.h"
#include "expert_files.h"
#include "gguf_writer.h"

using namespace eigenformer_test;

namespace {

const ef::LoadOptions kStored{.weights = ef::WeightFormat::as_stored};

template <typename T>
FileTensor narrowed(const FileTensor& floats) {
  std::vector<float> values(floats.bytes.size() / sizeof(float));
  std::memcpy(values.data(), floats.bytes.data(), floats.bytes.size());
  return FileTensor::of<T>(floats.shape, values);
}
FileTensors in_bfloat16(FileTensors tensors) {
  for (auto& [name, tensor] : tensors) tensor = narrowed<ef::bfloat16>(tensor);
  return tensors;
}

/// The bits of floats, in fewer bytes.
void expect_exact(const std::filesystem::path& path) {
  auto floats = ef::load_model<float>(path), stored = ef::load_model<float>(path, kStored);
  EXPECT_TRUE(same_bits(stored.logits(kIds), floats.logits(kIds)));
  EXPECT_LT(stored.weight_bytes(), floats.weight_bytes());
}

// Blocks of Q8_0 with a value of 127 come through floats with their own values and scales; a block
// with -128 becomes one with -127 and a larger scale.
TEST(StoredWeights, BlocksOfQ8AreTakenExactly) {
  constexpr Index kRows = 37, kColumns = 96, kBlocks = kRows * kColumns / 32;
  std::vector<std::byte> bytes(static_cast<std::size_t>(kBlocks * 34));
  ef::Tensor<std::int8_t, 2> values(kRows, kColumns);
  ef::Tensor<float, 2> scales(kRows, kColumns / 32);
  for (Index b = 0; b < kBlocks; ++b) {
    const ef::half scale(0.001f + 0.0137f * static_cast<float>(b % 61));
    std::byte* const block = bytes.data() + b * 34;
    std::memcpy(block, &scale, 2);
    scales.data()[b] = static_cast<float>(scale);
    for (Index i = 0; i < 32; ++i) {
      const auto q = static_cast<std::int8_t>(i == b % 32 ? (b % 2 != 0 ? 127 : -127)
                                                          : (i * 37 + b * 11) % 255 - 127);
      values.data()[b * 32 + i] = q;
      std::memcpy(block + 2 + i, &q, 1);
    }
  }
  const auto packed = [&] {
    const ef::StoredTensor tensor{"x", ef::StoredFormat::q8_0, {kRows, kColumns}, bytes};
    ef::Tensor<float, 2> numbers(kRows, kColumns);
    ef::dequantize_rows(tensor, 0, {numbers.data(), static_cast<std::size_t>(numbers.size())});
    return ef::pack_weight<std::int8_t>(numbers, {.group_size = 32});
  };
  const auto got = packed();
  const auto expected = ef::pack_weight(values, scales, {.group_size = 32});
  ASSERT_EQ(got.bytes(), expected.bytes());
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(got.bytes())), 0);
  EXPECT_EQ(std::memcmp(got.scales(), expected.scales(), sizeof(float) * kBlocks), 0);
  const std::int8_t least = -128;
  std::memcpy(bytes.data() + 2, &least, 1);
  const std::vector<std::int32_t> first_row{0};
  ef::Tensor<float, 2> row(1, kColumns);
  ef::embedding_into(Eigen::DefaultDevice{}, row, first_row, packed());
  const float scale = scales(0, 0);
  EXPECT_NEAR(row(0, 0), -128 * scale, 1e-6 * scale);
  for (Index i = 1; i < 32; ++i)
    EXPECT_NEAR(row(0, i), static_cast<float>(values(0, i)) * scale, 0.505 * scale);
}

/// Rows of Q8_0 as writers of max / 127 have them.
std::string q8_blocks(const std::string& name, std::uint64_t rows, std::uint64_t columns) {
  const Weights weights(name, true);
  std::string bytes;
  for (std::uint64_t b = 0; b < rows * columns / 32; ++b) {
    float most = 0;
    for (std::uint64_t i = 0; i < 32; ++i) most = std::max(most, std::abs(weights(b * 32 + i)));
    const ef::half scale(most / 127);
    bytes.append(reinterpret_cast<const char*>(&scale), 2);
    for (std::uint64_t i = 0; i < 32; ++i)
      bytes += static_cast<char>(std::lround(weights(b * 32 + i) * 127 / most));
  }
  return bytes;
}

/// A llama of one layer whose matrices are in Q8_0, but those of names in `floats`.
std::string llama_in_blocks(const std::set<std::string>& floats) {
  GgufWriter writer;
  const auto key = [](const char* name) { return std::string("llama.") + name; };
  writer.text("general.architecture", "llama");
  writer.integer(key("block_count"), 1);
  writer.integer(key("context_length"), 128);
  writer.integer(key("embedding_length"), 32);
  writer.integer(key("feed_forward_length"), 64);
  writer.integer(key("attention.head_count"), 4);
  writer.integer(key("attention.head_count_kv"), 2);
  writer.value(key("rope.freq_base"), {"float32", 10000});
  writer.value(key("attention.layer_norm_rms_epsilon"), {"float32", 1e-6});
  write_vocabulary(writer);
  for (const char* const norm : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"})
    writer.tensor(std::string(norm) + ".weight", {32}, std::vector<float>(32, 1));
  const std::tuple<const char*, std::uint64_t, std::uint64_t> matrices[] = {
      {"output", 32, 32},         {"token_embd", 32, 32},   {"blk.0.attn_q", 32, 32},
      {"blk.0.attn_k", 16, 32},   {"blk.0.attn_v", 16, 32}, {"blk.0.attn_output", 32, 32},
      {"blk.0.ffn_gate", 64, 32}, {"blk.0.ffn_up", 64, 32}, {"blk.0.ffn_down", 32, 64}};
  for (const auto& [name, rows, columns] : matrices) {
    const auto whole = std::string(name) + ".weight";
    constexpr std::uint32_t q8_0 = 8;
    if (floats.contains(name))
      writer.tensor(whole, {rows, columns},
                    golden_values(name, {static_cast<Index>(rows), static_cast<Index>(columns)}));
    else
      writer.tensor(whole, {rows, columns}, q8_0, q8_blocks(name, rows, columns));
  }
  return writer.file();
}

TEST(StoredWeights, BlocksOfAFileAreInt8ByGroups) {
  const Folder folder;
  const auto in_groups = [&](const std::set<std::string>& floats) {
    const auto path = folder.write("m.gguf", llama_in_blocks(floats));
    auto groups = ef::load_model<float>(path, {.weights = {ef::WeightFormat::int8, 32}}),
         stored = ef::load_model<float>(path, kStored), exact = ef::load_model<float>(path);
    const auto logits = stored.logits(kIds);
    EXPECT_LT(relative_error(logits, to_double(exact.logits(kIds))), 0.05);
    EXPECT_EQ(ef::load_model<double>(path, kStored).weight_bytes(),
              ef::load_model<double>(path).weight_bytes());
    return same_bits(logits, groups.logits(kIds)) && stored.weight_bytes() == groups.weight_bytes();
  };
  EXPECT_TRUE(in_groups({}));
  EXPECT_TRUE(in_groups({"blk.0.attn_k", "blk.0.ffn_up"}));  // beside blocks in one product
  EXPECT_FALSE(in_groups({"blk.0.attn_output"}));            // stays what it is
}

TEST(StoredWeights, MixedFormatsComeFromACacheToo) {
  const Folder folder;
  const auto path = folder.write("m.gguf", llama_in_blocks({"output", "blk.0.attn_output"}));
  int packed = 0;
  const auto load = [&] {
    return ef::load_model<float>(path, {.weights = ef::WeightFormat::as_stored,
                                        .progress = [&](auto, auto) { ++packed; },
                                        .cache = folder.path() / "kept"});
  };
  const auto logits = ef::load_model<float>(path, kStored).logits(kIds);
  EXPECT_TRUE(same_bits(load().logits(kIds), logits));
  EXPECT_GT(packed, 0);
  packed = 0;
  EXPECT_TRUE(same_bits(load().logits(kIds), logits));
  EXPECT_EQ(packed, 0);
}

TEST(StoredWeights, MatricesOfOneProductMayDiffer) {
  const nlohmann::json golden = golden_file("models.json").at("llama");
  const Folder folder;
  FileTensors tensors = in_bfloat16(hub_tensors(golden, {}));
  for (const char* const name : {"mlp.up_proj.weight", "self_attn.k_proj.weight"}) {
    const std::string whole = std::string("model.layers.0.") + name;
    const auto shape = tensors.at(whole).shape;
    tensors.at(whole) = FileTensor::of(shape, golden_values(whole, shape));
  }
  write_model(folder, golden.at("config"), tensors);
  expect_exact(folder.path());
}

TEST(StoredWeights, ExpertsOfALayerShareAFormat) {
  const auto models = golden_file("models.json");
  const Folder folder;
  const auto& mixtral = models.at("mixtral");
  const FileTensors floats = hub_tensors(mixtral, {"w1", "w3", "w2"}, "block_sparse_moe");
  FileTensors tensors = in_bfloat16(floats);
  write_model(folder, mixtral.at("config"), tensors);
  expect_exact(folder.path());
  const std::string expert = "model.layers.0.block_sparse_moe.experts.1.";
  tensors.at(expert + "w3.weight") = floats.at(expert + "w3.weight");
  write_model(folder, mixtral.at("config"), tensors);
  ef::load_model<float>(folder.path());
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(folder.path(), kStored); },
                                    {"experts.1.", "two formats"});
  auto config = models.at("gpt_oss").at("config");
  config["hidden_size"] = config["intermediate_size"] = 32;
  write_model(folder, config, gpt_oss_tensors(models.at("gpt_oss"), true));
  expect_exact(folder.path());
}

}  // namespace
