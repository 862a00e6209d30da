// GGUF: files of the reference are read, blocks are what the reference makes of them, and no byte
// string makes the reader misbehave.
#include <eigenformer/model/gguf_outline.h>

#include <eigenformer/model/stored_matrix.h>

#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

using Shape = std::vector<std::int64_t>;

std::vector<float> values_of(const ef::StoredTensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.rows() * tensor.columns()));
  ef::dequantize_rows(tensor, 0, values);
  return values;
}

/// Puts a file together, number by number.
struct Writer {
  std::string text;
  template <typename T>
  Writer& put(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Writer& put_text(std::string_view characters) {
    put(std::uint64_t{characters.size()});
    text += characters;
    return *this;
  }
  Writer& header(std::uint64_t tensors, std::uint64_t values, std::uint32_t version = 3) {
    text += "GGUF";
    return put(version).put(tensors).put(values);
  }
  /// Key, type; the value is put by hand.
  Writer& key(std::string_view name, ef::GgufType type) {
    return put_text(name).put(static_cast<std::uint32_t>(type));
  }
  Writer& tensor(std::string_view name, const std::vector<std::uint64_t>& sizes,
                 std::uint32_t format, std::uint64_t offset) {
    put_text(name).put(static_cast<std::uint32_t>(sizes.size()));
    for (const std::uint64_t size : sizes) put(size);
    return put(format).put(offset);
  }
  Writer& data(std::size_t bytes, std::size_t alignment = 32) {
    text.append((alignment - text.size() % alignment) % alignment, '\0');
    text.append(bytes, '\x3f');
    return *this;
  }
};

ef::detail::GgufContents parse(std::string_view text) {
  return ef::detail::parse_gguf(bytes_of(text), "f.gguf");
}
void refuses(const Writer& writer, const std::string& why) {
  expect_throws<ef::ModelFileError>([&] { parse(writer.text); }, {"f.gguf: ", why});
}

// tests/golden/model_files.py wrote it with PyPI's gguf.
const ef::Gguf& golden() {
  static const ef::Gguf file(EIGENFORMER_GOLDEN_DIR "/model.gguf");
  return file;
}

TEST(Gguf, ReadsMetadataOfEveryType) {
  const auto& metadata = golden().metadata();
  EXPECT_EQ(golden().version(), 3u);
  EXPECT_EQ(metadata.text("general.architecture"), "llama");
  EXPECT_EQ(metadata.integer("uint8"), 200);
  EXPECT_EQ(metadata.integer("int8"), -100);
  EXPECT_EQ(metadata.integer("uint16"), 60000);
  EXPECT_EQ(metadata.integer("int16"), -30000);
  EXPECT_EQ(metadata.integer("uint32"), 4000000000);
  EXPECT_EQ(metadata.integer("int32"), -2000000000);
  EXPECT_EQ(metadata.integer("int64"), -(std::int64_t{1} << 62));
  EXPECT_EQ(metadata.number("float32"), 0.5);
  EXPECT_EQ(metadata.number("float64"), 1e300);
  EXPECT_EQ(metadata.number("uint64"), std::ldexp(1.0, 63));
  EXPECT_EQ(metadata.number("int8"), -100);
  EXPECT_TRUE(metadata.boolean("bool"));
  EXPECT_EQ(metadata.text("string"),
            "gr\xc3\xbc\xc3\x9f"
            "e");
  EXPECT_EQ(metadata.texts("strings"), (std::vector<std::string_view>{"<s>", "", "\xc3\xa9"}));
  EXPECT_EQ(metadata.numbers("floats"), (std::vector<double>{1.5, -2.0}));
  EXPECT_EQ(metadata.integers("integers"), (std::vector<std::int64_t>{3, -4, 5}));
  EXPECT_FALSE(metadata.contains("none"));
}

TEST(Gguf, RefusesOtherKinds) {
  const auto& metadata = golden().metadata();
  const auto wrong = [](auto call, const std::string& why) {
    expect_throws<ef::ModelFileError>(call, {"model.gguf: ", why});
  };
  wrong([&] { metadata.text("none"); }, "none: this key is missing");
  wrong([&] { metadata.text("int8"); }, "int8: is not a string");
  wrong([&] { metadata.boolean("int8"); }, "int8: is not a boolean");
  wrong([&] { metadata.integer("float32"); }, "float32: is not an integer below 2^63");
  wrong([&] { metadata.integer("uint64"); }, "uint64: is not an integer below 2^63");
  wrong([&] { metadata.number("string"); }, "string: is not a number");
  wrong([&] { metadata.number("bool"); }, "bool: is not a number");
  wrong([&] { metadata.texts("string"); }, "string: is not an array");
  wrong([&] { metadata.texts("floats"); }, "floats: is not a string");
  wrong([&] { metadata.integers("floats"); }, "floats: is not an integer");
}

TEST(Gguf, BlocksHaveTheBitsOfTheReference) {
  int formats = 0;
  for (const auto& [name, expected] : golden().tensors().map()) {
    if (!name.ends_with(".float")) continue;
    const std::string format = name.substr(0, name.size() - 6);
    const auto& tensor = golden().tensors().at(format, expected.shape);
    EXPECT_EQ(ef::layout_of(tensor.format).name, format);
    const auto actual = values_of(tensor), values = values_of(expected);
    ASSERT_FALSE(values.empty());
    EXPECT_EQ(std::memcmp(actual.data(), values.data(), values.size() * sizeof(float)), 0)
        << format;
    // A row alone is the same.
    const auto columns = static_cast<std::size_t>(tensor.columns());
    std::vector<float> row(columns);
    ef::dequantize_rows(tensor, 1, row);
    EXPECT_EQ(std::memcmp(row.data(), values.data() + columns, columns * sizeof(float)), 0);
    ++formats;
  }
  EXPECT_EQ(formats, 11);
  EXPECT_EQ(golden().tensors().at("Q4_K").shape, (Shape{3, 512}));
  EXPECT_EQ(values_of(golden().tensors().at("F32", Shape{2, 3}))[4], 1.0f);
}

TEST(Gguf, ThreadsConvertToTheSameBits) {
  std::string bytes(34 * 16 * 300, 0);
  for (std::size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<char>(i % 34 == 1 ? 0x2c : i * 7 % 251);
  const ef::StoredTensor tensor{"t", ef::StoredFormat::q8_0, {300, 512}, bytes_of(bytes)};
  const ef::StoredTensor fours{
      "f", ef::StoredFormat::q4_0, {300, 512}, tensor.bytes.first(18 * 16 * 300)};
  const auto expected = values_of(tensor);
  const ef::detail::StoredInt4 alone(Eigen::DefaultDevice{}, fours);
  for (const int count : {1, 2, 3}) {
    Threads threads(count);
    const ef::detail::StoredInt4 shared(threads.device, fours);
    EXPECT_TRUE(same_bits(shared.view().values, alone.view().values));
    EXPECT_TRUE(same_bits(shared.view().scales, alone.view().scales));
    std::vector<float> values(290 * 512);
    ef::detail::convert_rows(threads.device, tensor, 7, values);
    EXPECT_EQ(std::memcmp(values.data(), expected.data() + 7 * 512, values.size() * sizeof(float)),
              0);
  }
}

TEST(Gguf, DequantizeRefusesOtherSizes) {
  const auto& tensor = golden().tensors().at("Q8_0");  // (3, 64)
  std::vector<float> values(4 * 64);
  const auto refuses_rows = [&](std::int64_t first, std::size_t count, const std::string& why) {
    expect_throws<std::invalid_argument>(
        [&] { ef::dequantize_rows(tensor, first, std::span(values).first(count)); },
        {"dequantize_rows: ", why});
  };
  refuses_rows(0, 65, "values has 65 elements, expected a multiple of 64");
  refuses_rows(0, 256, "4 rows from 0 on are asked for, Q8_0 has 3");
  refuses_rows(3, 64, "1 rows from 3 on");
  refuses_rows(-1, 64, "1 rows from -1 on");
  EXPECT_NO_THROW(ef::dequantize_rows(tensor, 3, {}));
  const auto refuses_row = [&](std::size_t bytes, std::size_t count, const std::string& why) {
    expect_throws<std::invalid_argument>(
        [&] {
          ef::dequantize_row(tensor.format, tensor.bytes.first(bytes),
                             std::span(values).first(count));
        },
        {"dequantize_row: ", why});
  };
  refuses_row(34, 31, "values has 31 elements, expected a multiple of 32");
  refuses_row(33, 32, "bytes has 33 bytes, 32 elements of Q8_0 are 34");
}

TEST(Gguf, ReadsBothVersionsNestedArraysAndAlignments) {
  for (const std::uint32_t version : {2u, 3u}) {
    Writer writer;
    writer.header(2, 2, version).key("general.alignment", ef::GgufType::uint32).put(64u);
    writer.key("nested", ef::GgufType::array);
    writer.put(9u).put(std::uint64_t{2});  // of arrays
    writer.put(8u).put(std::uint64_t{1}).put_text("a");
    writer.put(5u).put(std::uint64_t{2}).put(7).put(-8);
    writer.tensor("b", {3}, 0, 64).tensor("a", {4, 2}, 0, 0).data(64 + 12, 64);
    const auto contents = parse(writer.text);
    EXPECT_EQ(contents.version, version);
    EXPECT_EQ(contents.tensors.at("a").shape, (Shape{2, 4}));
    EXPECT_EQ(contents.tensors.at("b").shape, (Shape{3}));
    EXPECT_EQ(contents.tensors.at("b").bytes.data() - contents.tensors.at("a").bytes.data(), 64);
    const auto elements = contents.metadata.elements("nested");
    ASSERT_EQ(elements.size(), 2u);
    EXPECT_EQ(elements[0].element_type, ef::GgufType::string);
    EXPECT_EQ(elements[1].count, 2u);
    EXPECT_EQ(elements[1].bytes.size(), 8u);
  }
  EXPECT_TRUE(parse(Writer{}.header(0, 0).text).tensors.empty());
  const auto empty = parse(Writer{}.header(1, 0).tensor("e", {0, 4}, 0, 0).data(0).text);
  EXPECT_TRUE(empty.tensors.at("e").bytes.empty());
}

// A file without its weights, whatever it is aligned to: all else is what it was.
TEST(Gguf, AnOutlineKeepsWhatIsNoWeight) {
  Writer writer;
  writer.header(3, 3).key("general.alignment", ef::GgufType::uint32).put(64u);
  writer.key("nested", ef::GgufType::array).put(9u).put(std::uint64_t{1});
  writer.put(8u).put(std::uint64_t{2}).put_text("a").put_text("");
  writer.key("name", ef::GgufType::string).put_text("x");
  writer.tensor("rope_freqs.weight", {3}, 0, 0).tensor("w", {32, 2}, 8, 64);
  writer.tensor("rope_more", {1}, 0, 192).data(192 + 4, 64);
  const ef::Gguf whole(bytes_of(writer.text), "f");
  const std::string text = ef::detail::gguf_outline(whole);
  const ef::Gguf outline(bytes_of(text), "g");
  EXPECT_FALSE(outline.metadata().contains("general.alignment"));
  EXPECT_EQ(outline.metadata().map().size(), 2u);
  EXPECT_EQ(outline.metadata().text("name"), "x");
  EXPECT_EQ(text_of(outline.metadata().at("nested").bytes),
            text_of(whole.metadata().at("nested").bytes));
  EXPECT_EQ(outline.tensors().at("w").shape, (Shape{2, 0}));
  EXPECT_EQ(outline.tensors().at("w").format, ef::StoredFormat::q8_0);
  for (const char* const kept : {"rope_freqs.weight", "rope_more"})
    EXPECT_EQ(text_of(outline.tensors().at(kept).bytes), text_of(whole.tensors().at(kept).bytes));
}

TEST(Gguf, RefusesEveryLieOfItsHeader) {
  using enum ef::GgufType;
  Writer magic;
  magic.text = "GGML";
  refuses(magic, "header: does not begin with GGUF");
  refuses(Writer{}, "header: the file ends here, too early");
  refuses(Writer{}.header(0, 0, 1), "header: has version 1, 2 and 3 are read");
  refuses(Writer{}.header(0, 0, 4), "header: has version 4");
  refuses(Writer{}.header(0, 0, 0x03000000), "header: is of a big-endian file");
  refuses(Writer{}.header(UINT64_MAX, 0), "tensors: the file ends here");
  refuses(Writer{}.header(0, UINT64_MAX), "metadata: the file ends here");
  refuses(Writer{}.header(0, 1).put(UINT64_MAX), "metadata: the file ends here");
  refuses(Writer{}.header(0, 1).put_text("k").put(13u), "k: has the unknown type 13");
  refuses(Writer{}.header(0, 1).key("k", uint32).put('a'), "k: the file ends here");
  refuses(Writer{}.header(0, 1).key("k", boolean).put('\2'), "k: is a boolean that is neither");
  refuses(Writer{}.header(0, 1).key("k", string).put(UINT64_MAX), "k: the file ends here");
  for (const auto type : {uint8, float64, boolean, string, array})
    refuses(Writer{}
                .header(0, 1)
                .key("k", array)
                .put(static_cast<std::uint32_t>(type))
                .put(UINT64_MAX)
                .put(std::uint64_t{0}),
            "k: ");
  refuses(Writer{}.header(0, 2).key("k", uint8).put('a').key("k", uint8).put('b'),
          "k: is there twice");
  Writer bomb;
  bomb.header(0, 1).key("k", array);
  for (int i = 0; i < 100000; ++i) bomb.put(9u).put(std::uint64_t{1});
  refuses(bomb, "k: has arrays nested more than 4 deep");
  for (const std::uint32_t alignment : {0u, 3u, 48u, 0x80000000u})
    refuses(Writer{}.header(0, 1).key("general.alignment", uint32).put(alignment),
            "general.alignment: is " + std::to_string(alignment));
  refuses(Writer{}.header(0, 1).key("general.alignment", string).put_text("32"),
          "general.alignment: is not an integer");
  refuses(Writer{}.header(0, 1).key("split.count", uint16).put(std::uint16_t{2}),
          "split.count: this is one of several files");
}

TEST(Gguf, RefusesEveryLieOfItsTensors) {
  constexpr std::uint32_t f32 = 0, q8_0 = 8, q3_k = 11;
  const auto one = [](const std::vector<std::uint64_t>& sizes, std::uint32_t format,
                      std::uint64_t offset, std::size_t bytes) {
    return Writer{}.header(1, 0).tensor("t", sizes, format, offset).data(bytes);
  };
  EXPECT_NO_THROW(parse(one({4}, f32, 0, 16).text));
  EXPECT_NO_THROW(parse(one({4}, f32, 0, 1000).text));  // what follows is nobody's business
  refuses(one({1, 1, 1, 1, 1}, f32, 0, 4), "t: has 5 dimensions, more than 4");
  refuses(one({4}, q3_k, 0, 16), "t: is stored in the format Q3_K, which is not read");
  refuses(one({4}, 999, 0, 16), "t: is stored in the format number 999");
  refuses(one({33}, q8_0, 0, 68), "t: its shape (33) overflows, or its rows are no multiple");
  refuses(one({16, 2}, q8_0, 0, 34), "t: its shape (2, 16) overflows");
  refuses(one({UINT64_MAX}, f32, 0, 16), "t: its shape (-1) overflows");
  refuses(one({1ull << 32, 1ull << 32}, f32, 0, 16), "overflows");
  refuses(one({1ull << 61}, f32, 0, 16), "overflows");
  refuses(one({1ull << 60}, f32, 0, 16), "t: its data lie outside the file");
  refuses(one({4}, f32, 0, 15), "t: its data lie outside the file");
  refuses(one({4}, f32, 64, 16), "t: its data lie outside the file");
  refuses(one({4}, f32, UINT64_MAX - 31, 16), "t: its data lie outside the file");
  refuses(one({4}, f32, 4, 20), "t: its data are not at a multiple of 32");
  refuses(one({4}, f32, 32, 48), "t: bytes of data before it belong to no tensor");
  const auto two = [](std::uint64_t second, std::string_view name) {
    return Writer{}.header(2, 0).tensor("t", {9}, f32, 0).tensor(name, {1}, f32, second).data(200);
  };
  EXPECT_NO_THROW(parse(two(64, "u").text));
  refuses(two(32, "u"), "u: its data overlap those of another tensor");
  refuses(two(0, "u"), "its data overlap those of another tensor");
  refuses(two(96, "u"), "u: bytes of data before it belong to no tensor");
  refuses(two(64, "t"), "t: this tensor is there twice");
}

TEST(Gguf, SurvivesDamage) {
  Writer writer;
  writer.header(2, 3).key("general.alignment", ef::GgufType::uint32).put(32u);
  writer.key("s", ef::GgufType::array).put(8u).put(std::uint64_t{2}).put_text("a").put_text("b");
  writer.key("n", ef::GgufType::array).put(9u).put(std::uint64_t{1}).put(0u).put(std::uint64_t{0});
  writer.tensor("q", {32, 2}, 8, 0).tensor("f", {3}, 0, 96).data(108);
  for (const std::string_view text :
       {std::string_view(writer.text), text_of(golden().file().bytes())}) {
    const int accepted = accepted_of_damaged(text, 5000, 11, [](std::string_view damaged) {
      const auto contents = parse(damaged);
      for (const auto& [name, tensor] : contents.tensors) values_of(tensor);
      for (const auto& [key, value] : contents.metadata.map())
        if (value.type == ef::GgufType::array) contents.metadata.elements(key);
    });
    EXPECT_GT(accepted, 0);
    EXPECT_LT(accepted, 4500);
  }
}

}  // namespace
