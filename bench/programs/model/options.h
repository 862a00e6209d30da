/// \file
/// Command lines of the programs that load a model.
#pragma once

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace programs {

/// Reads `--name value`, `--name` and words without a name. What makes no sense ends the program
/// with a message that says what to do.
class CommandLine {
 public:
  CommandLine(std::string program, std::string usage)
      : program_(std::move(program)), usage_(std::move(usage)) {}

  void flag(const std::string& name, bool& to) {
    actions_[name] = {false, [&to](const std::string&) { to = true; }};
  }
  void text(const std::string& name, std::string& to) {
    actions_[name] = {true, [&to](const std::string& value) { to = value; }};
  }
  /// Each time it is given one more.
  void texts(const std::string& name, std::vector<std::string>& to) {
    actions_[name] = {true, [&to](const std::string& value) { to.push_back(value); }};
  }
  void integer(const std::string& name, long least, long most, long& to) {
    actions_[name] = {true, [this, name, least, most, &to](const std::string& value) {
                        char* end = nullptr;
                        errno = 0;
                        to = std::strtol(value.c_str(), &end, 10);
                        if (value.empty() || *end != '\0' || errno != 0 || to < least || to > most)
                          fail(name + " takes a whole number from " + std::to_string(least) +
                               " to " + std::to_string(most) + ", not \"" + value + "\"");
                      }};
  }
  void number(const std::string& name, double& to) {
    actions_[name] = {true, [this, name, &to](const std::string& value) {
                        char* end = nullptr;
                        to = std::strtod(value.c_str(), &end);
                        if (value.empty() || *end != '\0')
                          fail(name + " takes a number, not \"" + value + "\"");
                      }};
  }

  /// The next word without a name.
  void word(const std::string& name, std::string& to) { words_.push_back({name, &to}); }

  void parse(int argc, char** argv) {
    std::size_t words = 0;
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i];
      if (name == "--help") {
        std::fputs(usage_.c_str(), stdout);
        std::exit(0);
      }
      if (!name.starts_with("--") && words < words_.size()) {
        *words_[words++].second = name;
        continue;
      }
      const auto action = actions_.find(name);
      if (action == actions_.end()) fail("there is no option " + name);
      if (action->second.takes_value && i + 1 == argc) fail(name + " needs a value");
      action->second.run(action->second.takes_value ? argv[++i] : "");
    }
    if (words < words_.size()) fail(words_[words].first + " is missing");
  }
  [[noreturn]] void fail(const std::string& what) const {
    std::fprintf(stderr, "%s: %s\n\n%s", program_.c_str(), what.c_str(), usage_.c_str());
    std::exit(2);
  }

 private:
  struct Action {
    bool takes_value;
    std::function<void(const std::string&)> run;
  };
  std::string program_, usage_;
  std::map<std::string, Action> actions_;
  std::vector<std::pair<std::string, std::string*>> words_;
};

/// Which model, and how it is held.
struct ModelOptions {
  std::string path, cache;
  bool int8 = false, int4 = false, bf16 = false, half = false, as_stored = false;
  bool symmetric = false, w4a16 = false;
  long group = 0, threads = 0;
  long length = 0;  ///< of the longest text, for rotations that depend on it; 0: what the model has

  void declare(CommandLine& line) {
    line.text("--model", path);
    line.text("--cache", cache);
    declare_weights(line);
  }
  void declare_weights(CommandLine& line) {
    line.flag("--int8", int8);
    line.flag("--int4", int4);
    line.flag("--symmetric", symmetric);
    line.flag("--w4a16", w4a16);
    line.flag("--bf16", bf16);
    line.flag("--half", half);
    line.flag("--as-stored", as_stored);
    line.integer("--group", 32, 128, group);
    line.integer("--threads", 1, 256, threads);
  }
  void check(const CommandLine& line) const {
    if (path.empty()) line.fail("--model is missing: a folder, a .gguf file or a packed one");
    if (int8 + int4 + half + as_stored > 1)
      line.fail("--int8, --int4, --half and --as-stored exclude each other");
    if (bf16 && half) line.fail("--bf16 and --half exclude each other");
    if (group != 0 && (!(int8 || int4) || (group != 32 && group != 64 && group != 128)))
      line.fail("--group takes 32, 64 or 128 and goes with --int8 or --int4");
    if (symmetric && !int4) line.fail("--symmetric goes with --int4");
    if (w4a16 && !(int4 || as_stored)) line.fail("--w4a16 goes with --int4 or --as-stored");
  }
  /// "INT8 by 32", "bfloat16".
  std::string weights_name() const {
    const std::string by = group == 0 ? "" : std::string(" by ") + std::to_string(group);
    const std::string how = std::string(symmetric ? ", symmetric" : "") + (w4a16 ? ", W4A16" : "");
    if (int8) return "INT8" + by;
    if (int4) return "INT4" + by + how;
    if (half) return "half";
    if (as_stored) return "as stored" + how;
    return bf16 ? "bfloat16" : "float";
  }
};

inline constexpr const char* kModelUsage =
    R"(  --model PATH      a folder (config.json, *.safetensors, tokenizer.json), a .gguf file, or one that
                    quantize wrote, whose weights stay what they are
)";

inline constexpr const char* kWeightsUsage =
    R"(  --int8            linear layers in INT8, quantized as they are read
  --int4            linear layers in INT4, the head in INT8, quantized as they are read
  --group N         one scale of INT8 or INT4 for 32, 64 or 128 inputs (default: one for each
                    output, with --int4 for 32 inputs)
  --symmetric       INT4 without minimums: fewer bytes, larger errors
  --w4a16           INT4 beside activations that are not quantized: slower
  --half            linear layers in half, rounded as they are read
  --as-stored       linear layers as the files hold them, blocks by groups of 32: INT4 or INT8
  --bf16            activations, caches and weights in bfloat16 (--int8, --int4: those weights)
  --threads N       threads (default: those of the machine)
)";

inline constexpr const char* kCacheUsage =
    R"(  --cache PATH      keeps packed weights in a file, or a folder of such files, and maps it from the
                    second start on
)";

/// Of programs that run a model.
inline std::string model_usage() { return std::string(kModelUsage) + kWeightsUsage + kCacheUsage; }

}  // namespace programs
