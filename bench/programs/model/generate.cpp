// Continues a text with a model, or answers in a chat, word by word as it is made.
#include <iostream>

#include "../demo/progress.h"
#include "chat.h"
#include "loading.h"
#include "machine.h"
#include "program.h"

namespace {

namespace ef = eigenformer;
using demo::Clock;
using programs::stopped;

constexpr const char* kUsage =
    R"(generate: continues a text with a model, or chats with it, and says how fast.

  generate --model DIR|FILE --prompt TEXT [options]
  generate --model DIR|FILE --chat [options]

  --prompt TEXT     the text to continue (default: none, the model begins one)
  --chat            by the model's chat template: --prompt is what a user says; without it each
                    line of the input is, until it ends. Ctrl-C ends an answer, while its
                    prompt is read too, and between answers the chat; twice at once the program
  --system TEXT     in a chat: what is said before all
  --tokens N        tokens to write at most (default 128; in a chat 1024 an answer); fewer where the
                    model ends the text
  --chunk N         tokens of a prompt that are computed at once (default 512), before Ctrl-C counts
  --context N       tokens of the whole text at most (default: what the model was made for);
                    rotations that depend on it (longrope, dynamic NTK) are those of such a text
  --temperature T   0, the default, takes the likeliest token each time
  --top-k K         of the K likeliest tokens (0: all)
  --top-p P         of the likeliest tokens that have P of the probability together
  --min-p P         of tokens at least P times as likely as the likeliest
  --typical-p P     of the tokens nearest to the expected surprise that have P together
  --repetition-penalty R   divides the logits of tokens that the text holds (1: none)
  --frequency-penalty F    subtracted for each time that a token was written (0: none)
  --presence-penalty F     subtracted where a token was written (0: none)
  --seed N          of the draws (default 0)
  --ids             writes ids of tokens in place of their text
  --device NAME     cpu or cuda (default: what the program was built for)
  --json            one JSON object a text, with text, ids and rates
  --help            this text
)";

struct Options {
  programs::ModelOptions model;
  std::string prompt, system, device = programs::kDevice;
  long tokens = -1, chunk = 512, top_k = 0, seed = 0;
  double temperature = 0, top_p = 1, min_p = 0, typical_p = 1;
  double repetition = 1, frequency = 0, presence = 0;
  bool chat = false, json = false, ids = false;

  void declare(programs::CommandLine& line) {
    model.declare(line);
    line.text("--prompt", prompt);
    line.flag("--chat", chat);
    line.text("--system", system);
    line.integer("--tokens", 0, 1L << 30, tokens);
    line.integer("--chunk", 1, 1L << 40, chunk);
    line.integer("--context", 1, 1L << 40, model.length);
    line.number("--temperature", temperature);
    line.integer("--top-k", 0, 1L << 30, top_k);
    line.number("--top-p", top_p);
    line.number("--min-p", min_p);
    line.number("--typical-p", typical_p);
    line.number("--repetition-penalty", repetition);
    line.number("--frequency-penalty", frequency);
    line.number("--presence-penalty", presence);
    line.integer("--seed", 0, 1L << 62, seed);
    line.text("--device", device);
    line.flag("--json", json);
    line.flag("--ids", ids);
  }
  bool writes_text() const { return !json && !ids; }
};

ef::GenerateOptions how_to_write(const Options& options, const ef::ModelConfig& config) {
  ef::GenerateOptions how;
  how.max_new_tokens = options.tokens >= 0 ? options.tokens : options.chat ? 1024 : 128;
  how.chunk = options.chunk;
  how.max_length = options.model.length > 0 ? options.model.length : config.positions;
  how.sampling = {.temperature = options.temperature,
                  .top_k = options.top_k,
                  .top_p = options.top_p,
                  .min_p = options.min_p,
                  .typical_p = options.typical_p,
                  .repetition_penalty = options.repetition,
                  .frequency_penalty = options.frequency,
                  .presence_penalty = options.presence};
  how.seed = static_cast<std::uint64_t>(options.seed);
  return how;
}

/// What was computed and how long it took.
struct Work {
  std::size_t read = 0, written = 0, steps = 0;  // the first token written comes with the reading
  double reading = 0, writing = 0;

  void operator+=(const Work& other) {
    read += other.read, written += other.written, steps += other.steps;
    reading += other.reading, writing += other.writing;
  }
  static double rate(std::size_t count, double seconds) {
    return count > 0 && seconds > 0 ? static_cast<double>(count) / seconds : 0;
  }
  double reading_rate() const { return rate(read, reading); }
  double writing_rate() const { return rate(steps, writing); }
  void print() const {
    std::fprintf(stderr, "%s%zu tokens of prompt at %.1f tokens/s, %zu written at %.1f tokens/s\n",
                 stopped != 0 ? "stopped: " : "", read, reading_rate(), written, writing_rate());
  }
};

/// The tokens that follow `prompt`, streamed as the options say to a reader who has seen `stream`.
std::vector<std::int32_t> write(const Options& options, programs::LoadedModel& model,
                                std::span<const std::int32_t> prompt, ef::TextStream stream,
                                Work& total) {
  std::string text;
  const auto start = Clock::now();
  Work work;
  const bool terminal = ::isatty(STDERR_FILENO) != 0;
  ef::GenerateOptions how = how_to_write(options, model.config());
  if (how.max_length > 0 && std::ssize(prompt) > how.max_length)
    throw std::length_error("the text has " + std::to_string(prompt.size()) +
                            " tokens, and the context " + std::to_string(how.max_length) +
                            ": --context sets another");
  how.on_prompt = [&](ef::Index done, ef::Index all) {
    work.read = static_cast<std::size_t>(done - model.reused());
    work.reading = demo::seconds_since(start);
    if (terminal && all > options.chunk)
      std::fprintf(stderr, done < all ? "\r%td of %td tokens of prompt \033[K" : "\r\033[K", done,
                   all);
    return stopped == 0;
  };
  how.on_token = [&](std::int32_t id) {
    if (work.written++ == 0) work.reading = demo::seconds_since(start);
    const std::string piece = stream.push(id);
    text += piece;
    if (options.writes_text()) std::cout << piece << std::flush;
    if (options.ids && !options.json) std::cout << id << ' ' << std::flush;
    return stopped == 0;
  };
  const std::vector<std::int32_t> ids = model.generate(prompt, how);
  work.writing = demo::seconds_since(start) - work.reading;
  work.steps = work.written > 0 ? work.written - 1 : 0;
  const std::string rest = stream.finish();
  if (options.json) {
    const nlohmann::json result{{"prompt_ids", prompt},
                                {"prompt_tokens_reused", model.reused()},
                                {"ids", ids},
                                {"text", text + rest},
                                {"prefill_tokens_per_second", work.reading_rate()},
                                {"decode_tokens_per_second", work.writing_rate()}};
    std::cout << result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
  } else {
    std::cout << (options.ids ? "" : rest) << std::endl;
  }
  total += work;
  return ids;
}

int continue_text(const Options& options, programs::LoadedModel& model) {
  const std::vector<std::int32_t> prompt = model.tokenizer().encode(options.prompt);
  if (prompt.empty())
    throw std::invalid_argument(
        "the prompt has no tokens, and this model begins texts with none: give --prompt TEXT");
  ef::TextStream stream = model.tokenizer().stream();
  for (const std::int32_t id : prompt) {
    const std::string piece = stream.push(id);
    if (options.writes_text()) std::cout << piece;
  }
  std::cout << std::flush;
  Work work;
  write(options, model, prompt, stream, work);
  if (!options.json) work.print();
  return 0;
}

int chat(const Options& options, programs::LoadedModel& model) {
  programs::Chat chat(model.tokenizer(), options.system);
  Work work;
  const auto answer = [&](const std::string& message) {
    const auto prompt = chat.ask(message);
    chat.answer(write(options, model, prompt, model.tokenizer().stream(), work));
  };
  if (!options.prompt.empty()) {
    answer(options.prompt);
  } else {
    const bool terminal = ::isatty(STDIN_FILENO) != 0;
    for (std::string line;;) {
      stopped = 0;
      if (terminal) std::fputs("> ", stderr);
      if (!std::getline(std::cin, line)) break;
      if (!line.empty()) answer(line);
    }
    if (terminal) std::fputs("\n", stderr);
  }
  if (!options.json) work.print();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  programs::CommandLine line("generate", kUsage + programs::model_usage());
  options.declare(line);
  line.parse(argc, argv);
  options.model.check(line);
  if (!options.chat && !options.system.empty()) line.fail("--system goes with --chat");
  if (options.device != "cpu" && options.device != "cuda")
    line.fail("--device takes cpu or cuda, not \"" + options.device + "\"");
  return programs::run_program("generate", [&] {
    if (options.device != programs::kDevice) programs::run_on_other_device(argv);
    programs::require_sampling(how_to_write(options, {}).sampling);
    const auto model = programs::load(options.model, stderr);
    // Ends what is being written, or between two chunks what is being read of a prompt; where a
    // line is being read, the input.
    programs::stop_on_interrupt();
    return options.chat ? chat(options, *model) : continue_text(options, *model);
  });
}
