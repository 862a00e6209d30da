// Continues a text with a model, word by word as it is made.
#include <csignal>
#include <exception>
#include <iostream>

#include "../demo/progress.h"
#include "loading.h"

namespace {

namespace ef = eigenformer;
using demo::Clock;

constexpr const char* kUsage =
    R"(generate: continues a text with a model and says how fast.

  generate --model DIR|FILE.gguf --prompt TEXT [options]

  --prompt TEXT     the text to continue (default: none, the model begins one)
  --tokens N        tokens to write at most (default 128); fewer where the model ends the text
  --temperature T   0, the default, takes the likeliest token each time
  --top-k K         of the K likeliest tokens (0: all)
  --top-p P         of the likeliest tokens that have P of the probability together
  --min-p P         of tokens at least P times as likely as the likeliest
  --seed N          of the draws (default 0)
  --ids             writes ids of tokens in place of their text
  --json            one JSON object with text, ids and rates in place of the text
  --help            this text
)";

volatile std::sig_atomic_t stopped = 0;

struct Options {
  programs::ModelOptions model;
  std::string prompt;
  long tokens = 128, top_k = 0, seed = 0;
  double temperature = 0, top_p = 1, min_p = 0;
  bool json = false, ids = false;
};

int write(const Options& options, programs::LoadedModel& model) {
  const std::vector<std::int32_t> prompt = model.tokenizer().encode(options.prompt);
  if (prompt.empty())
    throw std::invalid_argument(
        "the prompt has no tokens, and this model begins texts with none: give --prompt TEXT");
  auto stream = model.tokenizer().stream();
  const bool text = !options.json && !options.ids;
  if (text) std::cout << options.prompt << std::flush;
  const auto start = Clock::now();
  double first = 0;
  std::size_t count = 0;
  ef::GenerateOptions how;
  how.max_new_tokens = options.tokens;
  how.sampling = {.temperature = options.temperature,
                  .top_k = options.top_k,
                  .top_p = options.top_p,
                  .min_p = options.min_p};
  how.seed = static_cast<std::uint64_t>(options.seed);
  how.on_token = [&](std::int32_t id) {
    if (count++ == 0) first = demo::seconds_since(start);
    if (text) std::cout << stream.push(id) << std::flush;
    if (options.ids && !options.json) std::cout << id << ' ' << std::flush;
    return stopped == 0;
  };
  const std::vector<std::int32_t> ids = model.generate(prompt, how);
  const double rest = demo::seconds_since(start) - first;
  const double prefill = static_cast<double>(prompt.size()) / first,
               decode = count > 1 ? static_cast<double>(count - 1) / rest : 0;
  if (options.json) {
    const nlohmann::json result{{"prompt_ids", prompt},
                                {"ids", ids},
                                {"text", model.tokenizer().decode(ids)},
                                {"prefill_tokens_per_second", prefill},
                                {"decode_tokens_per_second", decode}};
    std::cout << result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
    return 0;
  }
  if (text) std::cout << stream.finish();
  std::cout << std::endl;
  std::fprintf(stderr, "%s%zu tokens of prompt at %.1f tokens/s, %zu written at %.1f tokens/s\n",
               stopped != 0 ? "stopped: " : "", prompt.size(), prefill, count, decode);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  programs::CommandLine line("generate", std::string(kUsage) + programs::kModelUsage);
  options.model.declare(line);
  line.text("--prompt", options.prompt);
  line.integer("--tokens", 0, 1L << 30, options.tokens);
  line.number("--temperature", options.temperature);
  line.integer("--top-k", 0, 1L << 30, options.top_k);
  line.number("--top-p", options.top_p);
  line.number("--min-p", options.min_p);
  line.integer("--seed", 0, 1L << 62, options.seed);
  line.flag("--json", options.json);
  line.flag("--ids", options.ids);
  line.parse(argc, argv);
  options.model.check(line);
  std::signal(SIGINT, [](int) { stopped = 1; });
  try {
    return write(options, *programs::load(options.model, stderr));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n", error.what());
    return 1;
  }
}
