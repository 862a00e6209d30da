// The checkpoint files of the main job: what is written comes back, and no byte string makes the
// reader misbehave.
#include "../../bench/programs/demo/safetensors.h"

#include <unistd.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

std::vector<std::byte> file_of(const std::string& header, std::size_t data_bytes,
                               std::int64_t claimed = -1) {
  std::vector<std::byte> bytes;
  const std::uint64_t length = claimed < 0 ? header.size() : static_cast<std::uint64_t>(claimed);
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<std::byte>(length >> (8 * i) & 0xff));
  for (char c : header) bytes.push_back(static_cast<std::byte>(c));
  bytes.resize(bytes.size() + data_bytes, std::byte{0x3f});
  return bytes;
}

TEST(Safetensors, RoundTrip) {
  const auto path = std::filesystem::temp_directory_path() /
                    ("eigenformer_round_trip_" + std::to_string(::getpid()) + ".safetensors");
  const std::vector<float> a{1.5f, -2.0f, std::numeric_limits<float>::infinity(), 0.0f, 3.0f, 4.0f},
      b{7.0f};
  safetensors::write(path, {{"layer.a", {{2, 3}, a}}, {"b", {{1}, b}}, {"none", {{0, 5}, {}}}},
                     {{"text", "LICENSE"}});
  const auto file = safetensors::read(path);
  std::filesystem::remove(path);
  EXPECT_EQ(file.tensors.size(), 3u);
  EXPECT_EQ(file.tensors.at("layer.a").values, a);
  EXPECT_EQ(file.tensors.at("layer.a").shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(file.tensors.at("b").values, b);
  EXPECT_TRUE(file.tensors.at("none").values.empty());
  EXPECT_EQ(file.metadata.at("text"), "LICENSE");
}

TEST(Safetensors, ReadsTheDocumentedLayout) {
  const auto file =
      safetensors::parse(file_of(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  EXPECT_EQ(file.tensors.at("x").values.size(), 2u);
}

TEST(Safetensors, RefusesEveryLie) {
  const std::pair<std::string, const char*> lies[] = {
      {R"([1])", "not an object"},
      {R"({"x":)", "not JSON"},
      {R"({"x":3})", "not an object"},
      {R"({"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,8]}})", "dtype"},
      {R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "its shape needs 12"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})", "outside the file"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "outside the file"},
      {R"({"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "not a non-negative integer"},
      {R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}})",
       "overflows"},
      {R"({"x":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}})", "not a non-negative integer"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", "data_offsets"},
      {R"({"__metadata__":{"a":1}})", "not a string"},
  };
  for (const auto& [header, fragment] : lies)
    expect_throws<safetensors::Error>([&] { safetensors::parse(file_of(header, 8)); },
                                      {"safetensors: ", fragment});
  expect_throws<safetensors::Error>([] { safetensors::parse(file_of("{}", 0, 1000)); },
                                    {"exceeds the file"});
  expect_throws<safetensors::Error>(
      [] { safetensors::parse(file_of("{}", 0, std::numeric_limits<std::int64_t>::max())); },
      {"exceeds the file"});
  expect_throws<safetensors::Error>([] { safetensors::parse(std::vector<std::byte>(5)); },
                                    {"shorter"});
  expect_throws<safetensors::Error>(
      [] { safetensors::parse(file_of(std::string(100000, '['), 0)); }, {"nested too deeply"});
}

TEST(Safetensors, SurvivesRandomDamage) {
  const auto good = file_of(
      R"({"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"y":{"dtype":"F32","shape":[1],"data_offsets":[24,28]}})",
      28);
  std::mt19937 generator(7);
  int accepted = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    auto bytes = good;
    const int changes = 1 + static_cast<int>(generator() % 4);
    for (int c = 0; c < changes; ++c)
      bytes[generator() % bytes.size()] = static_cast<std::byte>(generator());
    if (generator() % 5 == 0) bytes.resize(generator() % bytes.size());
    try {
      safetensors::parse(bytes);
      ++accepted;  // damage to the data alone is still a file
    } catch (const safetensors::Error&) {
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 20000);
}

}  // namespace
