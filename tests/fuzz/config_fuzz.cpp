// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh.
#include <eigenformer/model/families.h>

#include "model_files.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace ef = eigenformer;
  try {
    ef::parse_model_config(eigenformer_test::text_of(data, size), "f");
  } catch (const ef::ModelFileError&) {
  }
  return 0;
}
