// Packs a model into one file that the other programs map.
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "../demo/progress.h"
#include "loading.h"
#include "program.h"

namespace {

namespace fs = std::filesystem;

constexpr const char* kUsage =
    R"(quantize: packs a model into one file, with all that belongs to it: --model FILE of generate,
perplexity and model_bench maps it in place of packing again. Ctrl-C ends it before OUT is written;
while OUT is written, a second one ends it and leaves a file OUT.*.partial.

  quantize IN OUT [options]

  IN                a folder (config.json, *.safetensors, tokenizer.json) or a .gguf file
  OUT               the file, for this version of the program and the kernels of this machine; its
                    name does not end with .gguf. Another such file is replaced. Linear layers are
                    in INT8 unless an option says otherwise
  --json            one JSON object in place of the text
  --help            this text
)";

struct Options {
  programs::ModelOptions model;
  std::string out;
  bool json = false;

  void declare(programs::CommandLine& line) {
    line.word("IN", model.path);
    line.word("OUT", out);
    model.declare_weights(line);
    line.flag("--json", json);
  }
  void check(const programs::CommandLine& line) {
    if (!(model.int4 || model.half || model.bf16 || model.as_stored)) model.int8 = true;
    model.check(line);
  }
};

/// Of a file, or of the files of a folder.
std::uintmax_t bytes_of(const fs::path& path) {
  if (!fs::is_directory(path)) return fs::file_size(path);
  std::uintmax_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.is_regular_file()) bytes += entry.file_size();
  return bytes;
}

void run(const Options& options) {
  const auto start = demo::Clock::now();
  programs::pack(options.model, options.out, stderr);
  const double seconds = demo::seconds_since(start);
  const auto from = bytes_of(options.model.path), to = bytes_of(options.out);
  if (options.json)
    std::cout << nlohmann::json{{"source", options.model.path},
                                {"source_bytes", from},
                                {"packed", options.out},
                                {"packed_bytes", to},
                                {"seconds", seconds}}
              << '\n';
  else
    std::printf("%s: %.1f MB out of %.1f MB in %.2f s\n", options.out.c_str(),
                static_cast<double>(to) / 1e6, static_cast<double>(from) / 1e6, seconds);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  programs::CommandLine line("quantize", std::string(kUsage) + programs::kWeightsUsage);
  options.declare(line);
  line.parse(argc, argv);
  options.check(line);
  return programs::run_program("quantize", [&] {
    programs::stop_on_interrupt();  // between two matrices; what is being written becomes whole
    run(options);
    return 0;
  });
}
