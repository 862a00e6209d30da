// safetensors: what is written comes back, files of the reference are read, and no byte string
// makes the reader misbehave.
#include <eigenformer/model/safetensors.h>

#include <eigenformer/model/dequantize.h>

#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

using Shape = std::vector<std::int64_t>;

std::string file_of(const std::string& header, std::size_t data_bytes, std::int64_t claimed = -1) {
  const std::uint64_t length = claimed < 0 ? header.size() : static_cast<std::uint64_t>(claimed);
  std::string text(8, '\0');
  std::memcpy(text.data(), &length, 8);
  return text + header + std::string(data_bytes, '\x3f');
}

ef::detail::SafetensorsContents parse(std::string_view text) {
  return ef::detail::parse_safetensors(bytes_of(text), "f.safetensors");
}

ef::StoredTensor floats(std::string name, Shape shape, const std::vector<float>& values) {
  return {std::move(name), ef::StoredFormat::f32, std::move(shape),
          std::as_bytes(std::span(values))};
}

std::vector<float> values_of(const ef::StoredTensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.rows() * tensor.columns()));
  ef::dequantize_rows(tensor, 0, values);
  return values;
}

TEST(Safetensors, RoundTrip) {
  const Folder folder;
  const auto path = folder.path() / "model.safetensors";
  const std::vector<float> a{1.5f, -2.0f, std::numeric_limits<float>::infinity(), 0.0f, 3.0f, 4.0f},
      b{7.0f}, none;
  const std::vector<ef::StoredTensor> tensors{floats("layer.a", {2, 3}, a), floats("b", {}, b),
                                              floats("none", {0, 5}, none)};
  ef::write_safetensors(path, tensors, {{"text", "LICENSE"}});
  for (const auto& way : {path, folder.path()}) {  // a file, a folder
    const ef::Safetensors file(way);
    EXPECT_EQ(file.tensors().map().size(), 3u);
    EXPECT_EQ(values_of(file.tensors().at("layer.a", Shape{2, 3})), a);
    EXPECT_EQ(values_of(file.tensors().at("b", Shape{})), b);
    EXPECT_TRUE(file.tensors().at("none", Shape{0, 5}).bytes.empty());
    EXPECT_EQ(file.metadata().at("text"), "LICENSE");
    EXPECT_EQ(file.tensors().find("c"), nullptr);
    expect_throws<ef::ModelFileError>([&] { file.tensors().at("c"); },
                                      {"model.safetensors: c: this tensor is missing"});
    expect_throws<ef::ModelFileError>(
        [&] {
          file.tensors().at("layer.a", Shape{3, 2});
        },
        {"model.safetensors: layer.a: has shape (2, 3), expected (3, 2)"});
  }
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "model.safetensors.partial"));
  expect_throws<ef::ModelFileError>(
      [&] { ef::write_safetensors(folder.path() / "no" / "file", tensors); },
      {"file: cannot be written"});
  std::filesystem::create_directory(folder.path() / "taken");
  expect_throws<ef::ModelFileError>(
      [&] { ef::write_safetensors(folder.path() / "taken", tensors); }, {"taken: cannot be"});
  EXPECT_FALSE(std::filesystem::exists(folder.path() / "taken.partial"));
}

TEST(Safetensors, WriterRefuses) {
  const std::filesystem::path nowhere = "/nonexistent/file";
  const std::vector<float> a{1, 2};
  const auto refuses = [&](const std::vector<ef::StoredTensor>& tensors, const std::string& why) {
    expect_throws<std::invalid_argument>([&] { ef::write_safetensors(nowhere, tensors); },
                                         {"write_safetensors: a ", why});
  };
  refuses({floats("a", {3}, a)}, "has 8 bytes, its shape is (3) of F32");
  refuses({floats("a", {2}, a), floats("a", {2}, a)}, "is there twice");
  auto blocks = floats("a", {2}, a);
  blocks.format = ef::StoredFormat::q8_0;
  refuses({blocks}, "is stored as Q8_0");
}

// tests/golden/model_files.py wrote it with the reference implementation.
TEST(Safetensors, ReadsEveryTypeOfTheReference) {
  const ef::Safetensors file(EIGENFORMER_GOLDEN_DIR "/model.safetensors");
  const std::vector<float> expected{1, 2, 3, 4, 5, 6};
  for (const std::string name : {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8"}) {
    const auto& tensor = file.tensors().at(name, Shape{2, 3});
    EXPECT_EQ(ef::layout_of(tensor.format).name, name);
    EXPECT_EQ(values_of(tensor), expected) << name;
  }
  EXPECT_EQ(values_of(file.tensors().at("BOOL")), (std::vector<float>{0, 1, 0, 1, 0, 1}));
  EXPECT_EQ(values_of(file.tensors().at("scalar", Shape{})), (std::vector<float>{7}));
  EXPECT_TRUE(file.tensors().at("empty", Shape{0, 4}).bytes.empty());
  EXPECT_EQ(file.tensors().map().size(), 12u);
  EXPECT_EQ(file.metadata().at("format"), "pt");
}

TEST(Safetensors, RefusesEveryLie) {
  const auto refuses = [](const std::string& text, const std::string& why) {
    expect_throws<ef::ModelFileError>([&] { parse(text); }, {"f.safetensors: ", why});
  };
  EXPECT_NO_THROW(parse(file_of(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8)));
  const auto entry = [&](const std::string& members, const std::string& why) {
    refuses(file_of("{\"x\":{" + members + "}}", 8), "x: " + why);
  };
  entry(R"("shape":[2],"data_offsets":[0,8])", "has no dtype");
  entry(R"("dtype":3,"shape":[2],"data_offsets":[0,8])", "has no dtype");
  entry(R"("dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8])", "has the dtype F8_E4M3");
  entry(R"("dtype":"Q8_0","shape":[32],"data_offsets":[0,34])", "has the dtype Q8_0");
  entry(R"("dtype":"F32","data_offsets":[0,8])", "has no array shape");
  entry(R"("dtype":"F32","shape":2,"data_offsets":[0,8])", "has no array shape");
  entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])", "has 8 bytes, its shape needs 12");
  entry(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])", "has 8 bytes, its shape needs 4");
  entry(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])", "has a number in shape");
  entry(R"("dtype":"F32","shape":[2.5],"data_offsets":[0,8])", "has a number in shape");
  entry(R"("dtype":"F32","shape":["2"],"data_offsets":[0,8])", "has a number in shape");
  entry(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])", "has a number in");
  entry(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])", "its shape");
  entry(R"("dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0])", "its shape");
  entry(R"("dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0])", "its shape");
  entry(R"("dtype":"F32","shape":[2])", "has no array data_offsets");
  entry(R"("dtype":"F32","shape":[2],"data_offsets":[0])", "has no two data_offsets");
  entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])", "has no two data_offsets");
  entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,16])", "its data lie outside the file");
  entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", "its data lie outside the file");
  entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,9223372036854775807])",
        "its data lie outside");
  entry(R"("dtype":"F32","shape":[2],"data_offsets":[-1,7])", "has a number in data_offsets");

  refuses("short", "is shorter than its 8 byte length");
  refuses(file_of("{}", 0, 1000), "its header length, 1000, exceeds the file");
  refuses(file_of("{}", 0, INT64_MAX), "exceeds the file");
  refuses(file_of("[1]", 8), "header: is not an object");
  refuses(file_of("{\"x\":", 8), "header: is not JSON");
  refuses(file_of(std::string(100000, '['), 0), "nested more than 8 deep");
  refuses(file_of(R"({"x":3})", 8), "x: its entry is not an object");
  refuses(file_of(R"({"__metadata__":{"a":1}})", 0), "__metadata__: has a value that is not");
  refuses(file_of(R"({"__metadata__":[]})", 0), "__metadata__: is not an object");
  // Twice the same name, overlaps, gaps.
  const std::string x = R"("x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const auto y = [](const std::string& offsets) {
    return R"("y":{"dtype":"U8","shape":[4],"data_offsets":)" + offsets + "}";
  };
  refuses(file_of("{" + x + "," + x + "}", 8), "header: has \"x\" twice");
  refuses(file_of("{" + x + "," + y("[4,8]") + "}", 8), "y: its data overlap those of x");
  refuses(file_of("{" + x + "," + y("[0,4]") + "}", 8), "x: its data overlap those of y");
  refuses(file_of("{" + x + "," + y("[10,14]") + "}", 14),
          "bytes 8 to 10 of its data belong to no");
  refuses(file_of("{" + x + "," + y("[8,12]") + "}", 13), "bytes 12 to 13 of its data belong to");
  refuses(file_of("{}", 1), "bytes 0 to 1 of its data belong to no tensor");
  EXPECT_NO_THROW(parse(file_of("{" + y("[8,12]") + "," + x + "}", 12)));
}

TEST(Safetensors, RefusesHeadersOver100Megabytes) {
  std::string text = file_of("{}", 0, 100'000'001);
  text.resize(8 + 100'000'001, ' ');
  expect_throws<ef::ModelFileError>([&] { parse(text); }, {"100000001, exceeds 100 MB"});
}

TEST(Safetensors, ReadsShards) {
  const Folder folder;
  const std::vector<float> values{1, 2};
  const auto write = [&](const std::string& file, std::vector<std::string> names) {
    std::vector<ef::StoredTensor> tensors;
    for (auto& name : names) tensors.push_back(floats(name, {2}, values));
    ef::write_safetensors(folder.path() / file, tensors, {{"of", file}});
  };
  write("1.safetensors", {"a", "b"});
  write("2.safetensors", {"c"});
  write("extra.safetensors", {"a", "c"});
  const auto index = [&](const std::string& map) {
    return folder.write("model.safetensors.index.json",
                        R"({"metadata":{},"weight_map":)" + map + "}");
  };
  const auto path = index(R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"})");
  for (const auto& way : {path, folder.path()}) {
    ef::Safetensors model(way);
    ef::Safetensors moved = std::move(model);
    EXPECT_EQ(moved.tensors().map().size(), 3u);
    EXPECT_EQ(moved.files().size(), 2u);
    EXPECT_EQ(values_of(moved.tensors().at("c")), values);
    EXPECT_EQ(moved.metadata().at("of"), "1.safetensors");
  }
  const auto refuses = [&](const std::string& map, const std::string& why) {
    const auto file = index(map);
    expect_throws<ef::ModelFileError>([&] { ef::Safetensors model(file); }, {why});
  };
  refuses(R"({"a":"1.safetensors","b":"1.safetensors","d":"2.safetensors"})",
          "2.safetensors: c: this tensor is not there by the index");
  refuses(R"({"a":"1.safetensors"})", "1.safetensors: b: this tensor is not there by the index");
  refuses(R"({"a":"1.safetensors","b":"1.safetensors","d":"1.safetensors"})",
          "1.safetensors: d: this tensor is missing, the index has it");
  refuses(R"({"a":"extra.safetensors","b":"1.safetensors"})", "not there by the index");
  refuses(R"({"a":"3.safetensors"})", "3.safetensors: cannot be opened");
  for (const char* name : {"../1.safetensors", "/etc/1.safetensors", "a\\\\b.safetensors",
                           "c:1.safetensors", "1.bin", "", "..", "1.safetensors\\u0000"})
    refuses(std::string(R"({"a":")") + name + "\"}", "a: its file, ");
  refuses(R"({"a":1})", "index.json: a: its file is not a string");
  refuses("[]", "index.json: has no object weight_map");
  folder.write("model.safetensors.index.json", "[]");
  expect_throws<ef::ModelFileError>([&] { ef::Safetensors model(path); },
                                    {"index.json: has no object weight_map"});
  expect_throws<ef::ModelFileError>([] { ef::Safetensors model("/nonexistent"); },
                                    {"/nonexistent: cannot be opened"});
}

TEST(Safetensors, SurvivesDamage) {
  const ef::MappedFile file(EIGENFORMER_GOLDEN_DIR "/model.safetensors");
  const std::string good = file_of(R"({"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                   R"("y":{"dtype":"F32","shape":[1],"data_offsets":[24,28]}})",
                                   28);
  for (const std::string_view text : {std::string_view(good), text_of(file.bytes())}) {
    const int accepted = accepted_of_damaged(text, 5000, 7, [](std::string_view damaged) {
      for (const auto& [name, tensor] : parse(damaged).tensors) values_of(tensor);
    });
    EXPECT_GT(accepted, 0);  // damage to the data alone is still a file
    EXPECT_LT(accepted, 4000);
  }
}

}  // namespace
