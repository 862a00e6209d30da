// How well a model predicts a text.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>

#include "../demo/progress.h"
#include "loading.h"
#include "program.h"

namespace {

namespace ef = eigenformer;

constexpr const char* kUsage =
    R"(perplexity: exp of the mean of -log p(token) over a text, p the model's probability of each
token after those before it in a window of the text. Ctrl-C ends it after the window that is being
read, with the result up to there.

  perplexity --model DIR|FILE --text FILE [options]

  --text FILE       the text
  --window N        tokens of a window (default: what the model was made for, at most 2048), and
                    the length of texts for rotations that depend on it (there 2048 where
                    none is given)
  --json            one JSON object in place of the text
  --help            this text
)";

constexpr ef::Index kWindow = 2048;

struct Options {
  programs::ModelOptions model;
  std::string text;
  long window = 0;
  bool json = false;
};

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path))
    throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

int measure(const Options& options, const std::string& text, programs::LoadedModel& model) {
  const std::vector<std::int32_t> ids = model.tokenizer().encode(text, {.parse_special = false});
  if (ids.size() < 2) throw std::runtime_error(options.text + " has fewer than two tokens");
  const auto window = static_cast<std::size_t>(
      options.window > 0 ? options.window
                         : (std::min)(kWindow, (std::max)(ef::Index{2}, model.config().positions)));
  const auto start = demo::Clock::now();
  double sum = 0;
  std::size_t count = 0;
  const bool shows = !options.json && ::isatty(STDERR_FILENO) != 0;
  for (std::size_t begin = 0; begin + 1 < ids.size() && programs::stopped == 0; begin += window) {
    const std::size_t size = (std::min)(window, ids.size() - begin);
    if (size < 2) break;
    const std::span<const std::int32_t> part(ids.data() + begin, size);
    const ef::Tensor<float, 2> logits = model.logits(part.first(size - 1));
    const auto scores = ef::log_probabilities_of(logits, part.subspan(1));
    for (ef::Index i = 0; i < scores.size(); ++i) sum -= static_cast<double>(scores(i));
    count += size - 1;
    if (shows)
      std::fprintf(stderr, "\r%zu of %zu tokens, perplexity %.4f \033[K", begin + size, ids.size(),
                   std::exp(sum / static_cast<double>(count)));
  }
  if (count == 0) throw std::runtime_error("stopped before anything was read");
  const double seconds = demo::seconds_since(start),
               value = std::exp(sum / static_cast<double>(count)),
               rate = static_cast<double>(count) / seconds;
  if (options.json) {
    std::cout << nlohmann::json{{"perplexity", value},
                                {"tokens", count},
                                {"window", window},
                                {"tokens_per_second", rate}}
              << '\n';
  } else {
    if (shows) std::fprintf(stderr, "\r\033[K");
    std::printf("perplexity %.4f over %zu tokens in windows of %zu, %.0f tokens/s\n", value, count,
                window, rate);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  programs::CommandLine line("perplexity", kUsage + programs::model_usage());
  options.model.declare(line);
  line.text("--text", options.text);
  line.integer("--window", 2, 1L << 30, options.window);
  line.flag("--json", options.json);
  line.parse(argc, argv);
  options.model.check(line);
  options.model.length = options.window > 0 ? options.window : kWindow;
  if (options.text.empty()) line.fail("--text is missing: a file");
  return programs::run_program("perplexity", [&] {
    const std::string text = text_of(options.text);  // before the model is loaded for it
    const auto model = programs::load(options.model, stderr);
    programs::stop_on_interrupt();
    return measure(options, text, *model);
  });
}
