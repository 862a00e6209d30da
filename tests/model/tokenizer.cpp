// Tokenizers against PyPI's tokenizers and sentencepiece (golden/make_tokenizers.py), and the laws
// that hold for text of every kind.
#include <eigenformer/model/tokenizer.h>

#include <cstdlib>
#include <sstream>

#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

using Ids = std::vector<std::int32_t>;
using Json = nlohmann::json;

std::string file_text(const std::filesystem::path& path) {
  const ef::MappedFile file(path);
  return std::string(text_of(file.bytes()));
}
const Json& golden() {
  static const Json all = Json::parse(file_text(EIGENFORMER_GOLDEN_DIR "/tokenizers.json"));
  return all;
}
const std::vector<std::string>& strings() {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> made;
    for (const Json& entry : golden()["strings"]) {
      if (entry.is_string()) {
        made.push_back(entry);
        continue;
      }
      const std::string hex = entry[0];
      std::string text;
      for (std::size_t i = 0; i < hex.size(); i += 2)
        text += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
      made.push_back(text);
    }
    return made;
  }();
  return all;
}
std::uint32_t fnv(std::string_view bytes) {
  std::uint32_t value = 0x811C9DC5;
  for (const char byte : bytes) value = (value ^ static_cast<unsigned char>(byte)) * 0x01000193;
  return value;
}
std::uint32_t sum_of(const Ids& ids) {
  std::string bytes;
  for (const std::int32_t id : ids)
    for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(id >> shift);
  return fnv(bytes);
}
std::uint32_t expected_sum(const Json& sums, std::size_t index) {
  return static_cast<std::uint32_t>(
      std::stoul(sums.get_ref<const std::string&>().substr(index * 8, 8), nullptr, 16));
}
ef::Tokenizer named(const std::string& name) {
  return ef::Tokenizer::from_json(golden()["tokenizers"][name]["file"].dump(), name);
}
/// The text of a stream, every part of which must be whole characters.
std::string streamed(const ef::Tokenizer& tokenizer, const Ids& ids) {
  ef::TextStream stream = tokenizer.stream({.skip_special = false});
  std::string text;
  for (const std::int32_t id : ids) {
    const std::string part = stream.push(id);
    EXPECT_TRUE(ef::detail::is_whole_utf8(part));
    text += part;
  }
  return text + stream.finish();
}

TEST(Tokenizer, GivesTheIdsAndTextsOfTokenizers) {
  ASSERT_EQ(strings().size(), 200u);
  for (const auto& [name, expected] : golden()["tokenizers"].items()) {
    SCOPED_TRACE(name);
    const ef::Tokenizer tokenizer = named(name);
    std::string texts;
    for (std::size_t i = 0; i < strings().size(); ++i) {
      const Ids ids = tokenizer.encode(strings()[i]);
      if (i < expected["ids"].size()) {
        EXPECT_EQ(ids, expected["ids"][i].get<Ids>()) << strings()[i];
      }
      EXPECT_EQ(sum_of(ids), expected_sum(expected["sums"], i)) << strings()[i];
      const std::string text = tokenizer.decode(ids, {.skip_special = false});
      EXPECT_EQ(streamed(tokenizer, ids), text);
      texts += (i > 0 ? std::string(1, '\0') : "") + text;
    }
    EXPECT_EQ(fnv(texts), expected["text_sum"].get<std::uint32_t>());
  }
}

/// The vocabulary of one of the byte-level tokenizers as a GGUF file has it.
struct Gguf {
  explicit Gguf(const std::string& name) {
    const Json& file = golden()["tokenizers"][name]["file"];
    for (const auto& [text, id] : file["model"]["vocab"].items()) set(text, id, 1);
    for (const Json& token : file["added_tokens"])
      set(token["content"], token["id"], token["special"].get<bool>() ? 3 : 4);
    for (const Json& merge : file["model"]["merges"])
      merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  void set(const std::string& text, std::size_t id, std::int32_t type) {
    tokens.resize((std::max)(tokens.size(), id + 1));
    types.resize(tokens.size());
    tokens[id] = text;
    types[id] = type;
  }
  ef::GgufVocabulary vocabulary(std::string_view pre) const {
    return {.model = "gpt2",
            .pre = pre,
            .tokens = {tokens.begin(), tokens.end()},
            .types = types,
            .merges = {merges.begin(), merges.end()}};
  }
  std::vector<std::string> tokens, merges;
  std::vector<std::int32_t> types;
};

TEST(Tokenizer, ReadsTheSameFromGguf) {
  for (const auto& [name, pre] : {std::pair{"llama3", "llama-bpe"},
                                  {"qwen2", "qwen2"},
                                  {"o200k", "gpt-4o"},
                                  {"starcoder", "starcoder"},
                                  {"starcoder", "smollm"}}) {
    SCOPED_TRACE(pre);
    const Gguf file(name);
    const ef::Tokenizer from_json = named(name);
    ef::GgufVocabulary vocabulary = file.vocabulary(pre);
    vocabulary.bos = *from_json.find("<s>");
    const ef::Tokenizer tokenizer = ef::Tokenizer::from_gguf(vocabulary);
    EXPECT_EQ(tokenizer.vocabulary_size(), from_json.vocabulary_size());
    for (const std::string& text : strings()) {
      // GGUF knows no token that takes white space along, or that must stand alone.
      if (text.find("<|x|>") != text.npos || text.find("word") != text.npos ||
          text.find("<t>") != text.npos || text.find("[MASK]") != text.npos)
        continue;
      EXPECT_EQ(tokenizer.encode(text), from_json.encode(text)) << text;
    }
  }
}

TEST(Tokenizer, SpecialTokensOfPhi3TakeWhiteSpaceAlong) {
  const Gguf file("llama3");
  ef::GgufVocabulary vocabulary = file.vocabulary("llama-bpe");
  const ef::Tokenizer plain = ef::Tokenizer::from_gguf(vocabulary);
  vocabulary.special_takes_right = true;
  const ef::Tokenizer tokenizer = ef::Tokenizer::from_gguf(vocabulary);
  EXPECT_EQ(tokenizer.encode("<|im_start|> \n a"), plain.encode("<|im_start|>a"));
  EXPECT_EQ(tokenizer.encode("<s> \n a"), plain.encode("<s> \n a"));
  EXPECT_NE(plain.encode("<|im_start|> \n a"), plain.encode("<|im_start|>a"));
}

TEST(Tokenizer, ReadsSentencePieceFromGguf) {
  for (const Json& file : golden()["sentencepiece"]) {
    SCOPED_TRACE(file["kind"]);
    const bool is_bpe = file["kind"] == "bpe";
    const auto tokens = file["tokens"].get<std::vector<std::string>>();
    const auto types = file["types"].get<Ids>();
    ef::GgufVocabulary vocabulary{.model = is_bpe ? "llama" : "t5",
                                  .tokens = {tokens.begin(), tokens.end()},
                                  .scores = file["scores"].get<std::vector<float>>(),
                                  .types = types,
                                  .bos = 1,
                                  .eos = 2};
    const bool has_bytes = std::count(types.begin(), types.end(), 6) == 256;
    const ef::Tokenizer tokenizer = ef::Tokenizer::from_gguf(vocabulary);
    EXPECT_EQ(tokenizer.encode("").size(), 1u);
    EXPECT_EQ(tokenizer.encode(""), Ids{is_bpe ? 1 : 2});
    for (std::size_t i = 0; i < strings().size(); ++i) {
      const Ids ids =
          tokenizer.encode(strings()[i], {.add_special = false, .parse_special = false});
      EXPECT_EQ(sum_of(ids), expected_sum(file["sums"], i)) << strings()[i];
      if (has_bytes && strings()[i].find("\xE2\x96\x81") == std::string::npos) {
        EXPECT_EQ(tokenizer.decode(ids), ef::detail::whole_utf8(strings()[i]));
      }
    }
    EXPECT_EQ(tokenizer.eos(), Ids{2});
    EXPECT_EQ(tokenizer.unk(), 0);
    vocabulary.add_bos = false;
    vocabulary.add_eos = true;
    EXPECT_EQ(ef::Tokenizer::from_gguf(vocabulary).encode(""), Ids{2});
    vocabulary.add_space_prefix = false;
    const ef::Tokenizer bare = ef::Tokenizer::from_gguf(vocabulary);
    EXPECT_EQ(bare.decode(bare.encode(" a  b")), " a  b");
    vocabulary.remove_extra_whitespaces = true;
    const ef::Tokenizer trims = ef::Tokenizer::from_gguf(vocabulary);
    EXPECT_EQ(trims.decode(trims.encode("  a   b ")), "a b");
  }
}

TEST(Tokenizer, ReproducesATrainedModelsText) {
  const char* const set = std::getenv("EIGENFORMER_STORIES");
  const std::filesystem::path folder =
      set != nullptr ? set : EIGENFORMER_GOLDEN_DIR "/../../../shared/models/stories260K";
  if (!std::filesystem::exists(folder / "tokenizer.json")) GTEST_SKIP() << "no model in " << folder;
  const ef::Tokenizer tokenizer = ef::Tokenizer::from_folder(folder);
  const Json file = Json::parse(file_text(folder / "greedy_ids.json"));
  const Ids ids = (file.is_object() ? file.begin().value() : file).get<Ids>();
  std::string text = file_text(folder / "greedy.txt");
  while (text.ends_with('\n')) text.pop_back();
  std::string decoded = tokenizer.decode(ids);
  while (decoded.ends_with('\n')) decoded.pop_back();
  EXPECT_EQ(decoded, text);
  EXPECT_EQ(tokenizer.bos(), 1);
  EXPECT_EQ(tokenizer.eos(), Ids{2});
  const Ids again = tokenizer.encode("Once upon a time");
  EXPECT_EQ(again, Ids(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(again.size())));
  const ef::Tokenizer from_gguf = ef::Tokenizer::from_gguf(ef::Gguf(folder / "model.gguf"));
  EXPECT_EQ(from_gguf.eos(), Ids{2});
  EXPECT_EQ(from_gguf.decode(ids), tokenizer.decode(ids));
  for (const std::string& each : strings())
    EXPECT_EQ(from_gguf.encode(each), tokenizer.encode(each));
}

TEST(Tokenizer, ReadsTheFilesOfAFolder) {
  const Folder folder;
  folder.write("tokenizer.json", golden()["tokenizers"]["llama3"]["file"].dump());
  const auto load = [&] { return ef::Tokenizer::from_folder(folder.path()); };
  EXPECT_FALSE(load().bos().has_value());
  EXPECT_TRUE(load().eos().empty());
  const ef::Tokenizer bare = load();
  const std::int32_t s = *bare.find("<s>"), end = *bare.find("</s>"),
                     im = *bare.find("<|im_start|>");
  folder.write("tokenizer_config.json",
               R"({"bos_token":{"content":"<s>"},"eos_token":"</s>","pad_token":"gone",
                   "chat_template":[{"name":"x","template":"no"},
                                    {"name":"default","template":"yes"}]})");
  folder.write("config.json", R"({"eos_token_id":)" + std::to_string(end) +
                                  R"(,"text_config":{"pad_token_id":5},"bos_token_id":null})");
  folder.write("generation_config.json", R"({"eos_token_id":[)" + std::to_string(im) + ",999999]}");
  const ef::Tokenizer tokenizer = load();
  EXPECT_EQ(tokenizer.bos(), s);
  EXPECT_EQ(tokenizer.eos(), (Ids{im, end}));
  EXPECT_EQ(tokenizer.pad(), 5);
  EXPECT_EQ(tokenizer.chat_template(), "yes");
  folder.write("chat_template.json", R"({"chat_template":"other"})");
  EXPECT_EQ(load().chat_template(), "yes");
  folder.write("chat_template.jinja", "newer");
  EXPECT_EQ(load().chat_template(), "newer");
  folder.write("config.json", R"({"eos_token_id":"two"})");
  expect_throws<ef::ModelFileError>(load, {"config.json: eos_token_id: is not an integer"});
}

TEST(Tokenizer, SpecialTokensAreOptional) {
  const ef::Tokenizer tokenizer = named("llama3");
  const std::int32_t s = *tokenizer.find("<s>"), end = *tokenizer.find("</s>");
  EXPECT_EQ(tokenizer.encode("</s>"), (Ids{s, end}));
  EXPECT_EQ(tokenizer.encode("</s>", {.add_special = false}), Ids{end});
  EXPECT_GT(tokenizer.encode("</s>", {.parse_special = false}).size(), 2u);
  EXPECT_EQ(tokenizer.encode(""), Ids{s});
  EXPECT_TRUE(tokenizer.encode("", {.add_special = false}).empty());
  EXPECT_EQ(tokenizer.decode(Ids{s, end}), "");
  EXPECT_EQ(tokenizer.decode(Ids{s, end}, {.skip_special = false}), "<s></s>");
  EXPECT_EQ(tokenizer.token(s), "<s>");
  EXPECT_TRUE(tokenizer.is_special(s));
  for (const std::int32_t id : {-1, -2147483647 - 1, 99999, 2147483647}) {
    EXPECT_EQ(tokenizer.decode(Ids{id}), "");
    EXPECT_EQ(tokenizer.token(id), "");
    EXPECT_FALSE(tokenizer.is_special(id));
    EXPECT_EQ(tokenizer.stream().push(id), "");
  }
  EXPECT_FALSE(tokenizer.find("nowhere").has_value());
  EXPECT_EQ(ef::Tokenizer().encode("text"), Ids{});
}

TEST(Tokenizer, StreamsWholeCharacters) {
  const ef::Tokenizer tokenizer = named("spm");
  ef::TextStream stream = tokenizer.stream();
  const auto byte = [&](const char* text) { return *tokenizer.find(text); };
  EXPECT_EQ(stream.push(byte("<0xE2>")), "");
  EXPECT_EQ(stream.push(byte("<0x82>")), "");
  EXPECT_EQ(stream.push(byte("<0xAC>")), "\xE2\x82\xAC");
  EXPECT_EQ(stream.push(byte("<0xE2>")), "");
  EXPECT_EQ(stream.push(byte("<0x41>")),
            "\xEF\xBF\xBD"
            "A");
  EXPECT_EQ(stream.push(byte("<0xF0>")), "");
  EXPECT_EQ(stream.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(tokenizer.decode(Ids{byte("<0xE2>"), byte("<0x82>")}, {.skip_special = false}),
            "\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(Tokenizer, LongTextWithoutAWordBreakTakesNoSquareOfItsLength) {
  std::string patterns[] = {"a", " ", "ab", "\xF0\x9F\x98\x80", "1", "\n", "<", "\xFF", "'", "A"};
  for (const char* name : {"gpt2", "qwen2", "o200k", "spm", "unigram", "words"}) {
    SCOPED_TRACE(name);
    const ef::Tokenizer tokenizer = named(name);
    for (const std::string& pattern : patterns) {
      std::string text;
      while (text.size() < (1 << 16)) text += pattern;
      const Ids ids = tokenizer.encode(text);
      EXPECT_LE(ids.size(), text.size() * 3 + 3);
    }
  }
}

}  // namespace
