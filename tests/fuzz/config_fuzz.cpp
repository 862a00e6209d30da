// clang++-16 -fsanitize=fuzzer,address,undefined: see run.sh. The input is a configuration, or a
// list of changes to one of golden/models.json: keys and odd values for them.
#include <eigenformer/model/families.h>

#include <fstream>

#include "model_files.h"
#include "odd_values.h"

namespace {

namespace ef = eigenformer;

const std::vector<nlohmann::json>& good_configs() {
  static const std::vector<nlohmann::json> all = [] {
    std::vector<nlohmann::json> made;
    std::ifstream file(EIGENFORMER_GOLDEN_DIR "/models.json");
    const auto models = nlohmann::json::parse(file);
    for (const auto& [name, model] : models.items()) made.push_back(model.at("config"));
    return made;
  }();
  return all;
}

void read(const std::string& text) {
  try {
    const ef::ModelConfig config = ef::parse_model_config(text, "f");
    config.form.validate(config.shape);  // what is accepted is a decoder's
  } catch (const ef::ModelFileError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 0 && data[0] != 0xff) {
    read(std::string(eigenformer_test::text_of(data, size)));
    return 0;
  }
  if (size < 2) return 0;
  nlohmann::json config = good_configs()[data[1] % good_configs().size()];
  for (std::size_t at = 2; at + 2 <= size; at += 2) {
    auto key = config.begin();
    std::advance(key, data[at] % config.size());
    if (data[at + 1] == 0xff)
      config.erase(key);
    else
      *key = eigenformer_test::odd_value(data[at + 1]);
    if (config.empty()) break;
  }
  read(config.dump());
  return 0;
}
