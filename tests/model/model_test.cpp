// What every reader of model files stands on: texts of errors, JSON under limits.
#include <eigenformer/model/json.h>

#include "compare.h"

using namespace eigenformer_test;

namespace {

TEST(ModelFileError, NamesFilePartAndReason) {
  expect_throws<ef::ModelFileError>([] { ef::detail::fail_model("a.gguf", "x", "is short"); },
                                    {"a.gguf: x: is short"});
  expect_throws<ef::ModelFileError>([] { ef::detail::fail_model("a.gguf", "", "is short"); },
                                    {"a.gguf: is short"});
  EXPECT_EQ(ef::detail::printable("a\nb\x7f"), "a?b?");
  EXPECT_EQ(ef::detail::printable(std::string(200, 'x')), std::string(96, 'x') + "...");
}

TEST(ModelJson, ReadsWhatTheParserReads) {
  const std::string text = R"({"a":[1,-2,2.5,true,null,"\u00e9",[],{}],"b":{"c":{"a":[[3]]}}})";
  EXPECT_EQ(ef::detail::parse_json(text, "f"), nlohmann::json::parse(text));
  EXPECT_EQ(ef::detail::parse_json("7", "f"), nlohmann::json(7));
}

TEST(ModelJson, RefusesWhatItCannotHold) {
  const auto refuses = [](const std::string& text, const std::string& why) {
    expect_throws<ef::ModelFileError>([&] { ef::detail::parse_json(text, "f.json"); },
                                      {"f.json: ", why});
  };
  refuses("", "is not JSON");
  refuses("{", "is not JSON");
  refuses("[1,]", "is not JSON, seen at byte 4");
  refuses("[1] 2", "is not JSON");
  refuses("\"\xff\"", "is not JSON");
  refuses(R"({"a":1,"b":{},"a":2})", "\"a\" twice");
  refuses(R"([{"a":{"b":1,"b":2}}])", "\"b\" twice");
  refuses(std::string(65, '[') + std::string(65, ']'), "more than 64 deep");
  refuses(std::string(1000000, '['), "more than 64 deep");
  std::string objects;
  for (int i = 0; i < 65; ++i) objects += "{\"a\":";
  refuses(objects, "more than 64 deep");
  EXPECT_NO_THROW(ef::detail::parse_json(std::string(64, '[') + std::string(64, ']'), "f.json"));
}

}  // namespace
