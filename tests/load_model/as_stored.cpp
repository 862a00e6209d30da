// Weights in the formats of their file: what is exact has the bits of the model in floats, blocks
// are INT8 by groups; files whose matrices differ in format load, or are refused by name.
#include <eigenformer/model.h>

#include <cmath>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "../model/expert_files.h"
#include "../model/gguf_writer.h"
#include "compare.h"

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
    return ef::pack_weight<std::int8_t>(numbers, {.group_size = 32, .half_scales = true});
  };
  const auto got = packed();
  const auto expected = ef::pack_weight(values, scales, {.group_size = 32, .half_scales = true});
  ASSERT_EQ(got.bytes(), expected.bytes());
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(got.bytes())), 0);
  ASSERT_TRUE(got.half_scales() != nullptr && expected.half_scales() != nullptr);
  EXPECT_EQ(std::memcmp(got.half_scales(), expected.half_scales(), 2 * kBlocks), 0);
  const std::int8_t least = -128;
  std::memcpy(bytes.data() + 2, &least, 1);
  const std::vector<std::int32_t> first_row{0};
  ef::Tensor<float, 2> row(1, kColumns);
  EXPECT_EQ(packed().half_scales(), nullptr);  // of a block, one is none
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

constexpr std::uint32_t kQ4_0 = 2, kQ4_1 = 3, kQ4_K = 12;  // GGUF's numbers

/// Blocks of any bits, but scales (and minimums) of a size that models have.
std::string four_bit_blocks(std::uint32_t type, std::uint64_t elements) {
  const std::size_t elements_of_block = type == kQ4_K ? 256 : 32,
                    bytes_of_block = type == kQ4_K   ? 144
                                     : type == kQ4_1 ? 20
                                                     : 18;
  std::minstd_rand random(type);
  std::string bytes;
  for (std::uint64_t b = 0; b < elements / elements_of_block; ++b) {
    std::string block(bytes_of_block, 0);
    for (char& byte : block) byte = static_cast<char>(random() >> 8);
    const float size = static_cast<float>(1 + random() % 64) / 64;
    const ef::half d(type == kQ4_K       ? size / 4096
                     : random() % 2 == 0 ? size / 64
                                         : -size / 64),
        m(type == kQ4_K ? size / 512 : -size / 8);
    std::memcpy(block.data(), &d, 2);
    if (type != kQ4_0) std::memcpy(block.data() + 2, &m, 2);
    bytes += block;
  }
  return bytes;
}

/// A llama of one layer and d features whose matrices are in Q8_0, but those of names in `floats`
/// and those that `types` names with another type of blocks; its embedding those numbers, if any.
std::string llama_in_blocks(const std::set<std::string>& floats,
                            const std::map<std::string, std::uint32_t>& types = {},
                            std::uint64_t d = 32, const std::vector<float>& embedding = {}) {
  GgufWriter writer;
  const auto key = [](const char* name) { return std::string("llama.") + name; };
  writer.text("general.architecture", "llama");
  writer.integer(key("block_count"), 1);
  writer.integer(key("context_length"), 128);
  writer.integer(key("embedding_length"), static_cast<std::uint32_t>(d));
  writer.integer(key("feed_forward_length"), static_cast<std::uint32_t>(2 * d));
  writer.integer(key("attention.head_count"), 4);
  writer.integer(key("attention.head_count_kv"), 2);
  writer.value(key("rope.freq_base"), {"float32", 10000});
  writer.value(key("attention.layer_norm_rms_epsilon"), {"float32", 1e-6});
  write_vocabulary(writer);
  for (const char* const norm : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"})
    writer.tensor(std::string(norm) + ".weight", {d}, std::vector<float>(d, 1));
  const std::tuple<const char*, std::uint64_t, std::uint64_t> matrices[] = {
      {"output", 32, d},
      {"token_embd", 32, d},
      {"blk.0.attn_q", d, d},
      {"blk.0.attn_k", d / 2, d},
      {"blk.0.attn_v", d / 2, d},
      {"blk.0.attn_output", d, d},
      {"blk.0.ffn_gate", 2 * d, d},
      {"blk.0.ffn_up", 2 * d, d},
      {"blk.0.ffn_down", d, 2 * d}};
  for (const auto& [name, rows, columns] : matrices) {
    const auto whole = std::string(name) + ".weight";
    constexpr std::uint32_t q8_0 = 8;
    if (std::string_view(name) == "token_embd" && !embedding.empty())
      writer.tensor(whole, {rows, columns}, embedding);
    else if (floats.contains(name))
      writer.tensor(whole, {rows, columns},
                    golden_values(name, {static_cast<Index>(rows), static_cast<Index>(columns)}));
    else if (const auto type = types.find(name); type != types.end())
      writer.tensor(whole, {rows, columns}, type->second,
                    four_bit_blocks(type->second, rows * columns));
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

// Blocks of four bits are INT4, whose values, scales and minimums are the file's: what they stand
// for has the bits of the blocks.
TEST(StoredWeights, BlocksOfFourBitsAreTakenExactly) {
  const Index rows = 19, columns = 512;
  for (const auto& [format, type] : {std::pair{ef::StoredFormat::q4_0, kQ4_0},
                                     {ef::StoredFormat::q4_1, kQ4_1},
                                     {ef::StoredFormat::q4_k, kQ4_K}}) {
    const std::string bytes = four_bit_blocks(type, static_cast<std::uint64_t>(rows * columns));
    const ef::StoredTensor tensor{
        "x", format, {rows, columns}, std::as_bytes(std::span(bytes.data(), bytes.size()))};
    ef::Tensor<float, 2> expected(rows, columns);
    ef::dequantize_rows(tensor, 0, {expected.data(), static_cast<std::size_t>(expected.size())});
    ef::detail::StoredInt4 stored(Eigen::DefaultDevice{}, tensor);
    EXPECT_EQ(stored.has_minimums(), format != ef::StoredFormat::q4_0);
    const auto x = random_tensor<float, 2>({3, columns}, 1);
    const ef::Tensor<float, 2> y = ef::linear(x, ef::pack_weight<float>(expected));
    for (const bool minimums : {false, true}) {
      if (minimums) stored.add_minimums();
      const ef::Int4View view = stored.view();
      const ef::Tensor<float, 2> got =
          view.minimums.has_value()
              ? ef::dequantize_grouped(view.values, view.scales, *view.minimums, 32)
              : ef::dequantize_grouped(view.values, view.scales, 32);
      for (Index i = 0; i < got.size(); ++i) ASSERT_EQ(got.data()[i], expected.data()[i]) << i;
      const auto packed =
          ef::pack_weight<ef::int4>(Eigen::DefaultDevice{}, view, {.quantize_activations = false});
      EXPECT_TRUE(same_bits(ef::Tensor<float, 2>(ef::linear(x, packed)), y));
    }
  }
}

// Four bits stay four bits in memory; beside other blocks in one product all are INT8. The head is
// INT8, of Q8_0 exactly. Activations in INT8 are all that differs from the floats.
TEST(StoredWeights, BlocksOfFourBitsStayFourBits) {
  const Folder folder;
  constexpr std::uint64_t d = 256, kLinear = d * d * 2 + d * d + 3 * 2 * d * d;
  const auto check = [&](std::map<std::string, std::uint32_t> types, std::uint64_t bytes) {
    const auto path = folder.write("m.gguf", llama_in_blocks({}, types, d));
    auto exact = ef::load_model<float>(path), stored = ef::load_model<float>(path, kStored);
    const auto logits = stored.logits(kIds);
    EXPECT_LT(relative_error(logits, to_double(exact.logits(kIds))), 0.03);
    // Norms, embedding in its blocks, head.
    const std::uint64_t rest = 4 * 3 * d + 32 * d / 32 * 34 + 32 * (d + d / 16);
    EXPECT_EQ(stored.weight_bytes(), bytes + rest);
    const ef::LoadOptions kept{.weights = ef::WeightFormat::as_stored,
                               .cache = folder.path() / "kept"};
    for (const char* const start : {"first", "second"})
      EXPECT_TRUE(same_bits(ef::load_model<float>(path, kept).logits(kIds), logits)) << start;
  };
  const char* const names[] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                               "ffn_gate", "ffn_up", "ffn_down"};
  std::map<std::string, std::uint32_t> types;
  for (const char* const name : names) types[std::string("blk.0.") + name] = kQ4_0;
  check(types, kLinear / 2 + 4 * kLinear / 32);
  for (auto& [name, type] : types) type = kQ4_K;
  check(types, kLinear / 2 + 8 * kLinear / 32);
  types["blk.0.attn_v"] = kQ4_1;  // all of them have minimums
  types["blk.0.ffn_up"] = types["blk.0.ffn_down"] = kQ4_0;
  check(types, kLinear / 2 + 8 * kLinear / 32 - 4 * 2 * d * d / 32);
  types.erase("blk.0.attn_v");
  types.erase("blk.0.ffn_down");
  // Scales of Q8_0 alone are halves, floats where blocks of other formats stand in the product.
  check(types, (kLinear - 4 * d * d) / 2 + 8 * (kLinear - 4 * d * d) / 32 + 4 * d * d +
                   (2 + 4) * 2 * d * d / 32);
}

// Beside activations that are not quantized, and a head of floats, logits are those of the floats.
TEST(StoredWeights, BlocksOfFourBitsBesideActivationsAsTheyAre) {
  const Folder folder;
  std::map<std::string, std::uint32_t> types;
  for (const char* const name : {"attn_q", "attn_k", "attn_v", "attn_output"})
    types[std::string("blk.0.") + name] = kQ4_0;
  for (const char* const name : {"ffn_gate", "ffn_up", "ffn_down"})
    types[std::string("blk.0.") + name] = kQ4_K;
  const auto path = folder.write("m.gguf", llama_in_blocks({"output"}, types, 256));
  const ef::LoadOptions options{
      .weights = {ef::WeightFormat::as_stored, 0, {.quantize_activations = false}},
      .cache = folder.path() / "kept"};
  const auto expected = to_double(ef::load_model<float>(path).logits(kIds));
  for (const char* const start : {"first", "second"})
    EXPECT_LT(relative_error(ef::load_model<float>(path, options).logits(kIds), expected), 1e-6)
        << start;
}

// An embedding that is not the head stays in its blocks, whatever the weights are; its rows are the
// numbers that the blocks say.
template <typename T>
void expect_same_embedding(const std::filesystem::path& blocks, const std::filesystem::path& floats,
                           std::size_t saved) {
  const Folder folder;
  auto expected = ef::load_model<T>(floats);
  const auto logits = expected.logits(kIds);
  const ef::LoadOptions kept{.cache = folder.path() / "kept"};
  for (const char* const start : {"first", "second"}) {
    auto model = ef::load_model<T>(blocks, kept);
    EXPECT_TRUE(same_bits(model.logits(kIds), logits)) << start;
    EXPECT_EQ(model.weight_bytes() + saved, expected.weight_bytes()) << start;
  }
}
TEST(StoredWeights, AnEmbeddingStaysInItsBlocks) {
  const Folder folder;
  constexpr Index d = 512, vocabulary = 32;
  constexpr std::uint32_t q8_0 = 8;
  for (const auto& [type, row_bytes] :
       {std::pair{q8_0, d / 32 * 34}, {kQ4_1, d / 32 * 20}, {kQ4_K, d / 256 * 144}}) {
    std::map<std::string, std::uint32_t> types;
    if (type != q8_0) types["token_embd"] = type;
    const auto blocks = folder.write("blocks.gguf", llama_in_blocks({}, types, d));
    const ef::Gguf file(blocks);
    std::vector<float> numbers(vocabulary * d);
    ef::dequantize_rows(file.tensors().at("token_embd.weight"), 0, numbers);
    const auto floats = folder.write("floats.gguf", llama_in_blocks({}, {}, d, numbers));
    const auto saved = static_cast<std::size_t>(vocabulary * (4 * d - row_bytes));
    expect_same_embedding<float>(blocks, floats, saved);
    if (type == kQ4_K) expect_same_embedding<ef::bfloat16>(blocks, floats, saved);
    if (type == kQ4_1) expect_same_embedding<double>(blocks, floats, saved);
  }
}

TEST(StoredWeights, FourBitsWithoutANumberAreRefused) {
  const Folder folder;
  std::string file = llama_in_blocks({}, {{"blk.0.ffn_down", kQ4_0}});
  const std::string good = four_bit_blocks(kQ4_0, 32 * 64);
  const auto at = file.find(good);
  ASSERT_NE(at, std::string::npos);
  const ef::half infinite(std::numeric_limits<float>::infinity());
  std::memcpy(file.data() + at + 18 * 5, &infinite, 2);
  const auto path = folder.write("m.gguf", file);
  expect_throws<ef::ModelFileError>([&] { ef::load_model<float>(path, kStored); },
                                    {"ffn_down", "scales[2, 1] is inf"});
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

TEST(StoredWeights, ACacheThatCannotBeWrittenIsNoError) {
  const Folder folder;
  const auto path = folder.write("m.gguf", llama_in_blocks({}));
  std::vector<std::string> said;
  const ef::LoadOptions options{.cache = folder.path() / "none" / "kept",
                                .warning = [&](const std::string& text) { said.push_back(text); }};
  const auto logits = ef::load_model<float>(path).logits(kIds);
  EXPECT_TRUE(same_bits(ef::load_model<float>(path, options).logits(kIds), logits));
  ASSERT_EQ(said.size(), 1u);
  EXPECT_NE(said[0].find("kept: cannot be written: there is no folder"), std::string::npos)
      << said[0];
  EXPECT_TRUE(
      same_bits(ef::load_model<float>(path, {.cache = options.cache}).logits(kIds), logits));
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
