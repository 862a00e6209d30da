/// \file
/// What fuzzers put in the place of a configuration's values.
#pragma once

#include <cstddef>
#include <vector>

#include <nlohmann/json.hpp>

namespace eigenformer_test {

inline const nlohmann::json& odd_value(std::size_t n) {
  static const std::vector<nlohmann::json> values = [] {
    std::vector<nlohmann::json> made{0,      1,  2,          3,         -1,   7,    16,
                                     32,     64, 1000000007, 1LL << 40, 1e19, 0.5,  1e300,
                                     -1e300, "", "x",        nullptr,   true, false};
    for (const char* const text :
         {"[]", "{}", "[0, 1]", "[[1]]", R"(["x"])", R"(["full_attention", "x"])",
          R"({"rope_type": "yarn", "factor": 1e-30})",
          R"({"rope_type": "longrope", "short_factor": [1], "long_factor": []})"})
      made.push_back(nlohmann::json::parse(text));
    return made;
  }();
  return values[n % values.size()];
}

}  // namespace eigenformer_test
