// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh.
#include <eigenformer/model/gguf.h>

#include "model_files.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace ef = eigenformer;
  try {
    const auto contents = ef::detail::parse_gguf(std::as_bytes(std::span(data, size)), "f");
    eigenformer_test::read_all(contents.tensors);
    for (const auto& [key, value] : contents.metadata.map()) {
      try {
        contents.metadata.elements(key);
        contents.metadata.texts(key);
        contents.metadata.numbers(key);
      } catch (const ef::ModelFileError&) {
      }
    }
  } catch (const ef::ModelFileError&) {
  }
  return 0;
}
