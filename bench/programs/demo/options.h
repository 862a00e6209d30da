/// \file
/// Command line of the main job.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace demo {

struct Options {
  std::filesystem::path text;        // what is learned
  std::filesystem::path save, load;  // folders of trained weights
  bool quick = false;
  int threads = 2;
};

inline constexpr const char* kUsage =
    R"(end_to_end: trains a small decoder on a text, quantizes it to INT8 and serves 16 concurrent
requests with it.

  --text FILE   learn this text instead of the LICENSE (at least 1,000 bytes; what fits the model
                is a few tens of kilobytes)
  --quick       a third of the training tokens, so less is recalled
  --save DIR    keep the trained model in DIR, which generate --model DIR takes as well
  --load DIR    serve with the model kept there instead of training
  --threads N   threads for training and ranks for serving (default 2)
  --help        this text
)";

/// Exits with a message that says what to do where the arguments make no sense.
inline Options parse_options(int argc, char** argv, const std::filesystem::path& default_text) {
  Options options;
  options.text = default_text;
  const auto fail = [](const std::string& what) {
    std::fprintf(stderr, "end_to_end: %s\n\n%s", what.c_str(), kUsage);
    std::exit(2);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) fail(argument + " needs a value");
      return argv[++i];
    };
    if (argument == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--text") {
      options.text = value();
    } else if (argument == "--save") {
      options.save = value();
    } else if (argument == "--load") {
      options.load = value();
    } else if (argument == "--threads") {
      options.threads = std::atoi(value().c_str());
      if (options.threads < 1 || options.threads > 256)
        fail("--threads takes a number from 1 to 256");
    } else {
      fail("unknown argument " + argument);
    }
  }
  return options;
}

}  // namespace demo
