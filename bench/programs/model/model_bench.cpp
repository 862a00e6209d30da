// How fast a model reads prompts and writes tokens, beside what the machine's memory allows and
// beside llama.cpp on the same file.
#include <iostream>
#include <thread>

#include "figures.h"
#include "loading.h"
#include "peer.h"
#include "program.h"

namespace {

namespace ef = eigenformer;

constexpr const char* kUsage =
    R"(model_bench: tokens per second of a model, of prompts and of tokens one by one, as
llama-bench measures them: random tokens, sequences that begin empty, logits of the last token,
medians.

  model_bench --model DIR|FILE [options]

  --prompt-tokens N    tokens of the prompt, read in one step (default 512)
  --decode-tokens N    tokens written one by one (default 32)
  --batch N            writes N sequences at once as well (default 1: one only)
  --repetitions N      of each measurement, after one that does not count (default 5)
  --peer [NAME=]LLAMA_BENCH
                       runs this program of llama.cpp (or of NAME) on the same .gguf file with the
                       same threads, after ours, and prints our rates over its rates; several
                       sequences by the llama-batched-bench beside it. May be given several times
  --json               one JSON object in place of the table
  --results FILE       adds the rows to FILE, which report --from reads
  --peers-svg FILE     draws what is in the --results
  --help               this text
)";

struct Options {
  programs::ModelOptions model;
  std::vector<std::string> peers;
  std::string results, peers_svg;
  long prompt_tokens = 512, decode_tokens = 32, batch = 1, repetitions = 5;
  bool as_json = false;

  void declare(programs::CommandLine& line) {
    model.declare(line);
    line.integer("--prompt-tokens", 1, 1L << 20, prompt_tokens);
    line.integer("--decode-tokens", 1, 1L << 20, decode_tokens);
    line.integer("--batch", 1, 1L << 12, batch);
    line.integer("--repetitions", 1, 1000, repetitions);
    line.texts("--peer", peers);
    line.text("--results", results);
    line.text("--peers-svg", peers_svg);
    line.flag("--json", as_json);
  }
  void check(const programs::CommandLine& line) const {
    model.check(line);
    if (!peers.empty() && std::filesystem::path(model.path).extension() != ".gguf")
      line.fail("--peer reads a .gguf file, and --model is another");
    if (!peers_svg.empty() && results.empty()) line.fail("--peers-svg draws --results");
  }
};

void say(const std::string& text) {
  if (::isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r%s \033[K", text.c_str());
}

void measure(programs::BenchRow& row, programs::LoadedModel& model, long repetitions) {
  for (long r = -1; r < repetitions; ++r) {  // the first warms up
    say(row.test + " of " + std::to_string(row.tokens * row.steps) + " tokens, " +
        std::to_string(row.sequences) + " at once: " + std::to_string(r + 1) + " of " +
        std::to_string(repetitions));
    const double one = model.seconds_of_steps(row.sequences, row.tokens, row.steps);
    if (r >= 0) row.seconds.push_back(one / static_cast<double>(row.steps));
  }
}

/// The rows of one kind of each peer.
void run_peers(programs::ModelFigures& figures, const Options& options) {
  const programs::BenchWork work{options.model.path,    options.model.threads,
                                 options.prompt_tokens, options.decode_tokens,
                                 options.batch,         options.repetitions};
  for (const std::string& text : options.peers) {
    const programs::Peer peer = programs::Peer::of(text);
    say(peer.name);
    const programs::PeerRates rates = programs::run_peer(peer, work);
    figures.peers.push_back({peer.name, rates.model, rates.peak_bytes});
    const std::vector<double>* const of_rows[] = {&rates.prefill, &rates.decode, &rates.batch};
    for (std::size_t r = 0; r < figures.rows.size(); ++r)
      figures.rows[r].peer_rates.push_back(*of_rows[r]);
  }
}

void run(const Options& options, programs::LoadedModel& model) {
  programs::ModelFigures figures;
  figures.model = std::filesystem::path(options.model.path).stem().string();
  const bool packed = std::filesystem::is_regular_file(options.model.path) &&
                      std::filesystem::path(options.model.path).extension() != ".gguf";
  figures.weights = packed ? "as packed" : options.model.weights_name();
  figures.rows = {{"prefill", 1, options.prompt_tokens, 1},
                  {"decode", 1, 1, options.decode_tokens}};
  if (options.batch > 1)
    figures.rows.push_back({"decode", options.batch, 1, options.decode_tokens});
  for (programs::BenchRow& row : figures.rows) measure(row, model, options.repetitions);
  ::rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  figures.peak_bytes = 1024.0 * static_cast<double>(usage.ru_maxrss);
  say("the machine's limits");
  figures.limits = bench::measure_limits(static_cast<int>(options.model.threads));
  if (model.config().form.experts.count == 0) {  // of which a token reads some
    figures.step_bytes = static_cast<double>(model.step_bytes());
    figures.work = model.work_of_token();
    if (options.model.int8 || (options.model.int4 && !options.model.w4a16))
      figures.peak = bench::Peak::int8;
    else if (options.model.int4)  // W4A16 multiplies floats
      figures.peak = bench::Peak::float_fma;
    else if (!options.model.as_stored && !packed)
      figures.peak = options.model.bf16 ? bench::Peak::bfloat16 : bench::Peak::float_fma;
  }
  run_peers(figures, options);
  say("");
  if (!options.results.empty()) {
    const bench::Results results = programs::add_to_results(options.results, figures);
    if (!options.peers_svg.empty())
      programs::write_text(options.peers_svg, bench::to_peers_svg(results));
  }
  std::cout << (options.as_json ? programs::to_json(figures) + "\n" : programs::to_table(figures));
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  programs::CommandLine line("model_bench", kUsage + programs::model_usage());
  options.declare(line);
  line.parse(argc, argv);
  options.check(line);
  options.model.length = (std::max)(options.prompt_tokens, options.decode_tokens);
  if (options.model.threads == 0)
    options.model.threads = (std::max)(1L, long{std::thread::hardware_concurrency()});
  return programs::run_program("model_bench", [&] {
    // Before minutes of measuring.
    for (const std::string& path : {options.results, options.peers_svg})
      if (!path.empty()) programs::require_writable(path);
    for (const std::string& text : options.peers) programs::Peer::of(text).require_there();
    run(options, *programs::load(options.model, stderr));
    return 0;
  });
}
