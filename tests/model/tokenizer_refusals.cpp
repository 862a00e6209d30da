// Tokenizer files that lie: each lie has one clear error, and no text makes the reader misbehave.
#include <eigenformer/model/tokenizer.h>

#include "compare.h"
#include "model_files.h"

using namespace eigenformer_test;

namespace {

using Json = nlohmann::json;

Json base(const std::string& name) {
  const ef::MappedFile file(std::filesystem::path(EIGENFORMER_GOLDEN_DIR) / (name + ".tokenizer"));
  return Json::parse(text_of(file.bytes()));
}
ef::Tokenizer load(const Json& json) { return ef::Tokenizer::from_json(json.dump(), "f.json"); }

/// The file with one value set, as JSON Pointer (RFC 6901) names it.
void refuses(const std::string& name, const std::string& pointer, const Json& value,
             const std::string& why) {
  SCOPED_TRACE(pointer + " = " + value.dump().substr(0, 200));
  Json json = base(name);
  json[Json::json_pointer(pointer)] = value;
  expect_throws<ef::ModelFileError>([&] { load(json); }, {"f.json: ", why});
}

TEST(TokenizerRefusals, OfFilesOfWrongTypes) {
  for (const char* text : {"", "[]", "7", "{}", R"({"model":null})", R"({"model":{}})",
                           R"({"model":{"type":"BPE"}})", R"({"model":{"type":"BPE","vocab":{}}})"})
    EXPECT_THROW(ef::Tokenizer::from_json(text), ef::ModelFileError) << text;
  // Every value of the files, one by one, as a value of every other type.
  for (const char* name : {"bpe", "unigram"}) {
    const Json json = base(name);
    EXPECT_NO_THROW(load(json).encode("ab AB 12, \xC3\xA9 <s> <w> 's"));
    const Json flat = json.flatten();
    for (const auto& [pointer, value] : flat.items()) {
      for (const Json& other :
           {Json("x"), Json(-1), Json(1e300), Json(true), Json(nullptr), Json::array(),
            Json::object(), Json({1, 2}), Json(18446744073709551615u)}) {
        Json changed = json;
        changed[Json::json_pointer(pointer)] = other;
        try {
          load(changed).encode("ab AB 12, \xC3\xA9 <s> <w> 's");
        } catch (const ef::ModelFileError& error) {
          EXPECT_NE(std::string(error.what()).find("f.json: "), std::string::npos);
        }
      }
    }
  }
}

TEST(TokenizerRefusals, NameThePlaceAndTheReason) {
  refuses("bpe", "/model/vocab/a", "1", "a: has the id -1, which is not in [0, ");
  refuses("bpe", "/model/vocab/a", -7, "a: has the id -7");
  refuses("bpe", "/model/vocab/a", 4194304, "a: has the id 4194304");
  refuses("bpe", "/model/vocab/a", 2, "has the id 2 of token a");
  refuses("bpe", "/model/vocab/" + std::string(70000, 'x'), 11, "has more than 65536 bytes");
  refuses("bpe", "/model/merges/0", "a x", "merge 0: of or into \"x\", which is no token");
  refuses("bpe", "/model/merges/0", "b a", "merge 0: of or into \"ba\", which is no token");
  refuses("bpe", "/model/merges/0", "ab", "model.merges[0]: is not two tokens");
  refuses("bpe", "/model/merges/0", 7, "model.merges[0]: is not a string");
  refuses("bpe", "/model/unk_token", "?", "model.unk_token: is no token");
  refuses("bpe", "/model/dropout", 0.1, "model.dropout: is not 0");
  refuses("bpe", "/model/type", "WordPiece", "model: is of type WordPiece; BPE and Unigram");
  refuses("bpe", "/added_tokens/0/id", -1, "<s>: has the id -1");
  refuses("bpe", "/added_tokens/0/id", 1, "has the id 1 of token a");
  refuses("bpe", "/added_tokens/0/content", std::string(5000, 'y'),
          "is added and has more than 4096");
  refuses("bpe", "/added_tokens/0", 3, "added_tokens[0]: is not an object");
  refuses("bpe", "/normalizer/normalizers/0/type", "Precompiled",
          "normalizer.normalizers[0]: is of type Precompiled, which is not supported");
  refuses("bpe", "/normalizer/normalizers/3/pattern/String", "", "pattern.String: is empty");
  refuses("bpe", "/pre_tokenizer/pretokenizers/0/behavior", "Odd", "behavior: is not known");
  refuses("bpe", "/pre_tokenizer/pretokenizers/3/replacement", "__", "is not one character");
  refuses("bpe", "/pre_tokenizer/pretokenizers/3/prepend_scheme", "no", "is not always, first");
  refuses("bpe", "/pre_tokenizer/pretokenizers/1/type", "UnicodeScripts", "not supported");
  refuses("bpe", "/post_processor/single/1/Sequence/id", "B", "single[1]: is not the one place");
  refuses("bpe", "/post_processor/single", Json::array(), "single: has no place for the text");
  refuses("bpe", "/post_processor/special_tokens/<s>/ids/0", 77, "is the id of no token");
  refuses("bpe", "/decoder/decoders/3/start", -1, "start: is not in [0, 65536]");
  refuses("bpe", "/decoder/decoders/0/type", "CTC", "decoder.decoders[0]: is of type CTC");
  refuses("unigram", "/model/unk_id", 7, "model.unk_id: is not the index of a token");
  refuses("unigram", "/model/vocab/1", {"a"}, "model.vocab[1]: is not a token and its score");
  refuses("unigram", "/model/vocab/1/0", std::string(5000, 'z'), "has more than 4096 bytes");
  refuses("unigram", "/model/vocab", Json::array(), "model.vocab: is empty");
  refuses("unigram", "/post_processor/processors/1/sep/1", 99, "sep: is not a token and its id");
  Json deep = {{"type", "NFC"}};
  for (int i = 0; i < 100; ++i) deep = {{"type", "Sequence"}, {"normalizers", Json::array({deep})}};
  refuses("bpe", "/normalizer", deep, "is nested more than 64 deep");
}

TEST(TokenizerRefusals, OfPatterns) {
  const std::string pattern = "/pre_tokenizer/pretokenizers/0/pattern/Regex";
  for (const auto& [text, why] : std::vector<std::pair<std::string, std::string>>{
           {"(", "is no regular expression: "},
           {"[a&&b]", "uses && in a class"},
           {"[a[b]]", "uses [ in a class"},
           {"[\\S]", "uses \\S in a class"},
           {"\\h", "uses \\h"},
           {"(?m:a)", "uses (?m"},
           {"(?#a)", "uses (?#"},
           {"(*LIMIT_MATCH=1)a", "uses (*"},
           {"a{,3}", "uses {,"},
           {"a{2}+", "uses }+"},
           {"\\", "is no regular expression"},
           {std::string(70000, 'a'), "has more than 65536 bytes"}})
    refuses("bpe", pattern, text, why);
  // Not wrong, but endless: two to the power of the text's length.
  Json json = base("bpe");
  json[Json::json_pointer(pattern)] = "(?:x+x+)+y";
  const ef::Tokenizer tokenizer = load(json);
  expect_throws<ef::ModelFileError>([&] { tokenizer.encode(std::string(1000, 'x') + " y"); },
                                    {"f.json: a pattern: cannot be matched"});
}

TEST(TokenizerRefusals, OfGgufArrays) {
  const auto file = [] {
    return ef::GgufVocabulary{.model = "llama",
                              .tokens = {"<unk>", "<s>", "a", "b", "ab"},
                              .scores = {0, 0, -2, -3, -1},
                              .types = {2, 3, 1, 1, 1}};
  };
  const auto refuses = [](const ef::GgufVocabulary& vocabulary, const std::string& why) {
    expect_throws<ef::ModelFileError>([&] { ef::Tokenizer::from_gguf(vocabulary); },
                                      {"the GGUF file: ", why});
  };
  EXPECT_NO_THROW(ef::Tokenizer::from_gguf(file()));
  auto changed = file();
  changed.scores.pop_back();
  refuses(changed, "tokenizer.ggml.scores: has 4 values for 5 tokens");
  changed = file();
  changed.types.pop_back();
  refuses(changed, "tokenizer.ggml.token_type: has 4 values for 5 tokens");
  changed = file();
  changed.scores[2] = std::numeric_limits<float>::quiet_NaN();
  refuses(changed, "tokenizer.ggml.scores: holds a value that is not finite");
  changed = file();
  changed.model = "bert";
  refuses(changed, "tokenizer.ggml.model: is bert; llama, t5 and gpt2 are supported");
  changed = file();
  changed.tokens.clear();
  changed.types.clear();
  refuses(changed, "tokenizer.ggml.tokens: is missing or empty");
  changed = file();
  changed.model = "gpt2";
  changed.pre = "odd";
  refuses(changed, "tokenizer.ggml.pre: is odd, which is not supported");
  changed.pre = "gpt-2";
  changed.merges = {"a c"};
  refuses(changed, "merge 0: of or into \"c\"");
  changed.merges = {"a"};
  refuses(changed, "tokenizer.ggml.merges: holds \"a\", which is not two tokens");
  changed = file();
  changed.types = {99, -1, 0, 6, 5};
  changed.bos = changed.eos = changed.unk = std::int64_t{1} << 40;
  changed.more_ends = {-5, 3};
  EXPECT_EQ(ef::Tokenizer::from_gguf(changed).eos(), std::vector<std::int32_t>{3});
}

TEST(TokenizerRefusals, DamagedFilesAreReadOrRefused) {
  std::mt19937 random(5);
  for (const char* name : {"bpe", "unigram"}) {
    const std::string whole = base(name).dump();
    for (int round = 0; round < 3000; ++round) {
      std::string text = whole;
      for (unsigned n = 1 + random() % 3; n > 0; --n) {
        const std::size_t at = random() % text.size();
        const std::size_t count = (std::min)(std::size_t{1 + random() % 8}, text.size() - at);
        if (random() % 2 == 0)
          text[at] = static_cast<char>(random());
        else if (random() % 2 == 0)
          text.erase(at, count);
        else
          text.insert(at, whole, random() % whole.size(), count);
      }
      try {
        const ef::Tokenizer tokenizer = ef::Tokenizer::from_json(text);
        const auto ids = tokenizer.encode("ab A'B 12, \xC3\xA9\xFF <s> <w>");
        tokenizer.decode(ids);
        ef::TextStream stream = tokenizer.stream();
        for (const std::int32_t id : ids) stream.push(id);
        stream.finish();
      } catch (const ef::ModelFileError&) {
      }
    }
  }
}

}  // namespace
