// Packed weights as a file: a model that starts from it has the bits of one that was packed; files
// of other models, formats and ISAs are made again, damaged ones are refused.
#include <eigenformer/decoder.h>
#include <eigenformer/model/packed_cache.h>

#include <bit>

#include "compare.h"
#include "model_files.h"
#include "packed_models.h"

using namespace eigenformer_test;

namespace {

const Eigen::DefaultDevice kHere;

template <typename T>
ef::Tensor<float, 2> logits_of(std::shared_ptr<const ef::PackedDecoderWeights<T>> weights) {
  ef::Decoder<T> model(std::move(weights), kHere);
  ef::KvCache<T> cache;
  ef::Tensor<std::int32_t, 2> ids(1, 5);
  ids.setValues({{1, 7, 3, 3, 12}});
  return model.prefill(ids, cache);
}

std::string read(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

template <typename T>
void expect_same_from_file(const std::shared_ptr<const ef::PackedDecoderWeights<T>>& made) {
  const Folder folder;
  const auto path = folder.path() / "model.packed";
  const ef::WeightStorage& storage = made->storage();
  const ef::DecoderForm& form = made->form();
  ef::write_packed_weights(*made, path, "key");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
  const auto found = ef::read_packed_weights<T>(kHere, path, "key", kPackedConfig, storage, form);
  ASSERT_NE(found, nullptr);
  EXPECT_EQ(found->bytes(), made->bytes());
  EXPECT_TRUE(same_bits(logits_of<T>(found), logits_of<T>(made)));
  EXPECT_EQ(ef::read_packed_weights<T>(kHere, path, "other", kPackedConfig, storage, form),
            nullptr);
  // The file may go while its weights live, and be written over.
  ef::write_packed_weights(*found, path, "key 2");
  std::filesystem::remove(path);
  EXPECT_TRUE(same_bits(logits_of<T>(found), logits_of<T>(made)));
}

template <typename T>
void expect_same_from_file(const ef::WeightStorage& storage, const ef::DecoderForm& form) {
  expect_same_from_file<T>(packed_model<T>(kPackedConfig, storage, form));
}

TEST(PackedFile, GivesTheBitsOfWhatWasWritten) {
  using enum ef::WeightFormat;
  for (const ef::DecoderForm& form : packed_forms()) {
    expect_same_from_file<float>(activation, form);
    expect_same_from_file<float>(int8, form);
    expect_same_from_file<ef::bfloat16>({int4, 32}, form);
  }
  expect_same_from_file<float>({int8, 32}, {});
  expect_same_from_file<float>(int4, {});
  expect_same_from_file<ef::bfloat16>({int4, 64}, {});
  expect_same_from_file<float>(half, packed_forms()[3]);
  expect_same_from_file<float>(bfloat16, {});
  expect_same_from_file<float>(half, {});
  expect_same_from_file<ef::bfloat16>(activation, {});
  expect_same_from_file<ef::half>(int8, {});
  expect_same_from_file<double>(activation, {});
}

// What is packed as stored has matrices of several formats.
TEST(PackedFile, KeepsTheFormatOfEveryMatrix) {
  using enum ef::WeightFormat;
  const auto mixed = packed_model<float>(kPackedConfig, as_stored, {});
  const ef::DecoderWeights masters(kPackedConfig, 5);
  const ef::SelfCommunicator alone;
  const auto own = masters.views(1);
  ef::DecoderLayerViews<float> output, down, gated;
  output.output = own.output;
  down.down = own.down;
  gated.gate = own.gate;
  gated.up = own.up;
  mixed->pack_layer(kHere, 1, output, half, alone);
  mixed->pack_layer(kHere, 1, down, bfloat16, alone);
  mixed->pack_layer(kHere, 1, gated, {int8, 32}, alone);
  // Scales that are halves.
  const std::vector<float> blocks(40 * 48, 127.0f / 1024);
  ef::DecoderLayerViews<float> exact;
  exact.down.emplace(blocks.data(), 40, 48);
  mixed->pack_layer(kHere, 0, exact, {int8, 32}, alone);
  const auto& packed_down = mixed->layers()[0].down;
  ASSERT_NE(std::get<ef::PackedColumnShard<std::int8_t>>(packed_down).weight.half_scales(),
            nullptr);
  EXPECT_LT(mixed->bytes(), packed_model<float>(kPackedConfig, as_stored, {})->bytes());
  expect_same_from_file<float>(mixed);
}

TEST(PackedFile, RefusesWhatTheConfigurationDoesNotSay) {
  const Folder folder;
  const auto path = folder.path() / "model.packed";
  ef::write_packed_weights(*packed_model<float>(kPackedConfig, {}, {}), path, "");
  const auto expect_refused = [&](const ef::DecoderConfig& config, const ef::DecoderForm& form) {
    expect_throws<ef::ModelFileError>(
        [&] { ef::read_packed_weights<float>(kHere, path, "", config, {}, form); },
        {"model.packed"});
  };
  ef::DecoderConfig other = kPackedConfig;
  other.features *= 2;
  expect_refused(other, {});
  other = kPackedConfig;
  other.layers = 3;
  expect_refused(other, {});
  other.layers = 1;
  expect_refused(other, {});
  other = kPackedConfig;
  other.vocabulary = (Index{1} << 31) - 1;
  other.features = (Index{1} << 31) - 1;
  expect_refused(other, {});
  expect_refused(kPackedConfig, packed_forms()[1]);
  EXPECT_NE(ef::read_packed_weights<float>(kHere, path, "", kPackedConfig), nullptr);
  expect_throws<ef::ModelFileError>(
      [&] { ef::read_packed_weights<float>(kHere, folder.path() / "none", "", kPackedConfig); },
      {"none", "opened"});
  expect_throws<ef::ModelFileError>(
      [&] {
        ef::write_packed_weights(*packed_model<float>(kPackedConfig, {}, {}),
                                 folder.path() / "none" / "model.packed", "");
      },
      {"model.packed", "cannot be written"});
}

// One product serves all experts of a layer.
TEST(PackedFile, RefusesExpertsOfTwoForms) {
  const Folder folder;
  const auto path = folder.path() / "model.packed";
  const ef::DecoderForm form = packed_forms()[3];
  const auto made = packed_model<float>(kPackedConfig, ef::WeightFormat::int4, form);
  const ef::DecoderExperts& experts = form.experts;
  const std::vector<float> numbers(static_cast<std::size_t>(experts.hidden * 40), 0.5f);
  ef::DecoderLayerViews<float> one;
  one.expert = 1;
  one.down.emplace(numbers.data(), 40, experts.hidden);
  made->require_complete();
  made->pack_layer(kHere, 1, one, {ef::WeightFormat::int4, 64}, ef::SelfCommunicator());
  expect_throws<std::invalid_argument>([&] { made->require_complete(); },
                                       {"experts", "different ways"});
  ef::write_packed_weights(*made, path, "key");
  expect_throws<ef::ModelFileError>(
      [&] {
        ef::read_packed_weights<float>(kHere, path, "key", kPackedConfig, ef::WeightFormat::int4,
                                       form);
      },
      {"model.packed", "experts", "different ways"});
}

TEST(PackedFile, RefusesDamage) {
  const Folder folder;
  const auto path = folder.path() / "model.packed";
  ef::write_packed_weights(*packed_model<float>(kPackedConfig, ef::WeightFormat::int8, {}), path,
                           "key");
  const std::string good = read(path);
  const auto find = [&](std::string_view text) {
    const auto page = std::make_shared<const Page>(text);
    return ef::detail::find_packed_weights<float>(kHere, page->bytes(), "model.packed", page, "key",
                                                  kPackedConfig, ef::WeightFormat::int8, {});
  };
  ASSERT_NE(find(good), nullptr);
  // Whatever byte of the head is changed, the file is refused or another's; the data is its own.
  const std::size_t head =
      static_cast<std::size_t>(*reinterpret_cast<const std::int64_t*>(good.data() + 24));
  for (std::size_t at = 0; at < head; at += at < 64 ? 1 : 13) {
    std::string text = good;
    text[at] = static_cast<char>(text[at] ^ 0x10);
    const bool order_or_version = at >= 8 && at < 24;
    if (order_or_version)
      EXPECT_EQ(find(text), nullptr) << at;
    else
      EXPECT_THROW(find(text), ef::ModelFileError) << at;
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{55}, std::size_t{56},
                                 head - 1, head, std::size_t{4096}, good.size() - 1})
    EXPECT_THROW(find(std::string_view(good).substr(0, size)), ef::ModelFileError) << size;
  EXPECT_THROW(find(good + "x"), ef::ModelFileError);
}

// Damage that the checksum does not see: numbers of the table that say something else.
TEST(PackedFile, ReadsNothingElseWhateverItsTableSays) {
  const Folder folder;
  const auto path = folder.path() / "model.packed";
  std::mt19937 generator(1);
  for (const std::size_t form : {0, 3}) {
    ef::write_packed_weights(
        *packed_model<float>(kPackedConfig, ef::WeightFormat::int8, packed_forms()[form]), path,
        "key");
    const std::string good = read(path);
    const std::size_t head =
        static_cast<std::size_t>(*reinterpret_cast<const std::int64_t*>(good.data() + 24));
    const std::size_t table = 56 + 8;  // the key is padded to 8 bytes
    for (int trial = 0; trial < 1200; ++trial) {
      std::string text = good;
      const std::size_t count = (head - table) / 8 - 1;
      std::int64_t number = 0;
      char* const at = text.data() + table + 8 * (generator() % count);
      std::memcpy(&number, at, 8);
      constexpr std::int64_t others[] = {0, 1, 5, 64, -64, std::int64_t{1} << 62};
      const std::int64_t changed =
          trial % 2 == 0 ? number + others[generator() % 6] + 1 : others[generator() % 6];
      std::memcpy(at, &changed, 8);
      const std::int64_t sum = ef::detail::PagedChecksum::of(text.data(), head - 8);
      std::memcpy(text.data() + head - 8, &sum, 8);
      try {
        const auto page = std::make_shared<const Page>(text);
        const auto found = ef::detail::find_packed_weights<float>(
            kHere, page->bytes(), "model.packed", page, "key", kPackedConfig,
            ef::WeightFormat::int8, packed_forms()[form]);
        if (found != nullptr) logits_of<float>(found);  // another place of the data, within it
      } catch (const ef::ModelFileError&) {
      } catch (const std::logic_error&) {
      }
    }
  }
}

TEST(PackedCache, KnowsTheFilesOfTheModel) {
  const Folder folder, cache;
  folder.write("config.json", "{}");
  const auto part = folder.write("a.safetensors", "abc");
  const std::string key = ef::detail::source_key(folder.path());
  EXPECT_EQ(ef::detail::source_key(folder.path()), key);
  folder.write("tokenizer.json", "{}");
  EXPECT_EQ(ef::detail::source_key(folder.path()), key);
  folder.write("model.safetensors.index.json", "{}");
  EXPECT_NE(ef::detail::source_key(folder.path()), key);
  std::filesystem::remove(folder.path() / "model.safetensors.index.json");
  folder.write("b.safetensors", "abc");
  EXPECT_NE(ef::detail::source_key(folder.path()), key);
  std::filesystem::remove(folder.path() / "b.safetensors");
  EXPECT_EQ(ef::detail::source_key(folder.path()), key);
  const auto time = std::filesystem::last_write_time(part);
  folder.write("a.safetensors", "abd");
  std::filesystem::last_write_time(part, time);
  EXPECT_NE(ef::detail::source_key(folder.path()), key);
  EXPECT_EQ(ef::detail::cache_file("x.packed", folder.path(), "p"), "x.packed");
  const auto in_folder = ef::detail::cache_file(cache.path(), folder.path(), "p");
  EXPECT_EQ(in_folder.parent_path(), cache.path());
  EXPECT_NE(ef::detail::cache_file(cache.path(), folder.path(), "q"), in_folder);
}

// What was packed in another way is none of this version's.
TEST(PackedCache, KnowsHowWeightsArePacked) {
  const std::string key = ef::detail::packing_key<float>(kHere, {});
  EXPECT_EQ(ef::detail::packing_key<float>(kHere, {}), key);
  EXPECT_NE(ef::detail::packing_key<float>(kHere, ef::WeightFormat::int8), key);
  EXPECT_NE(ef::detail::packing_sum<float>(kHere), ef::detail::packing_sum<ef::bfloat16>(kHere));
  const auto other = ef::cpu::backend(kHere, ef::isa::generic{});
  if (!std::is_same_v<ef::isa::best, ef::isa::generic>) {
    EXPECT_NE(ef::detail::packing_sum<float>(other), ef::detail::packing_sum<float>(kHere));
  }
  EXPECT_NE(key.find("\npacking " + std::to_string(ef::detail::packing_sum<float>(kHere)) + "\n"),
            std::string::npos);
}

}  // namespace
