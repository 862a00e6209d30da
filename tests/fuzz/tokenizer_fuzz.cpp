// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh.
#include <eigenformer/model/tokenizer.h>

#include <algorithm>

/// A tokenizer.json, and after a zero byte, where there is one, the text to encode.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace ef = eigenformer;
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const std::size_t end = (std::min)(all.find('\0'), size);
  const std::string text = "ab A'B 12, \xC3\xA9\xFF <s> <w>";
  try {
    const ef::Tokenizer tokenizer = ef::Tokenizer::from_json(all.substr(0, end));
    const auto ids = tokenizer.encode(text + std::string(all.substr(end)));
    tokenizer.decode(ids);
    ef::TextStream stream = tokenizer.stream();
    for (const std::int32_t id : ids) stream.push(id);
    stream.finish();
  } catch (const ef::ModelFileError&) {
  }
  return 0;
}
