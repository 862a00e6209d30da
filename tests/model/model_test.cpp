// What every reader of model files stands on: texts of errors, JSON under limits, mapped files.
#include <eigenformer/model/json.h>
#include <eigenformer/model/mapped_file.h>

#if !defined(_WIN32)
#include <sys/stat.h>
#endif

#include "compare.h"
#include "model_files.h"

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

TEST(MappedFile, HasTheBytesOfTheFile) {
  const Folder folder;
  std::string text(70000, 'x');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 7);
  ef::MappedFile file(folder.write("a", text));
  EXPECT_TRUE(text_of(file.bytes()) == text);
  const std::byte* const address = file.bytes().data();
  ef::MappedFile other = std::move(file);
  EXPECT_TRUE(file.bytes().empty());
  EXPECT_EQ(other.bytes().data(), address);
  file = ef::MappedFile(folder.write("b", "second"));
  other = std::move(file);
  EXPECT_EQ(text_of(other.bytes()), "second");
  EXPECT_NE(other.name().find("b"), std::string::npos);
  EXPECT_TRUE(ef::MappedFile(folder.write("empty", "")).bytes().empty());
  EXPECT_TRUE(ef::MappedFile().bytes().empty());
}

TEST(MappedFile, AdviceChangesNothing) {
  const Folder folder;
  const std::string text(70001, 'q');
  const ef::MappedFile file(folder.write("a", text));
  for (const auto advice :
       {ef::FileAdvice::sequential, ef::FileAdvice::soon, ef::FileAdvice::done}) {
    file.advise(file.bytes(), advice);
    file.advise(file.bytes().subspan(5000, 60000), advice);
    file.advise(file.bytes().subspan(70001), advice);
    file.advise(bytes_of(text), advice);  // another's bytes
    EXPECT_TRUE(text_of(file.bytes()) == text);
  }
}

TEST(MappedFile, RefusesWhatIsNoFile) {
  const Folder folder;
  const auto refuses = [](const std::filesystem::path& path, const std::string& why) {
    expect_throws<ef::ModelFileError>([&] { ef::MappedFile file(path); },
                                      {path.filename().string() + ": ", why});
  };
  refuses(folder.path() / "missing", "cannot be opened: ");
#if !defined(_WIN32)
  refuses(folder.path(), "is not a regular file");
  const auto pipe = folder.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  refuses(pipe, "is not a regular file");
#endif
}

}  // namespace
