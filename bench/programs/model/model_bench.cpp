// How fast a model reads prompts and writes tokens, beside what the machine's memory allows and
// beside llama.cpp on the same file.
#include <exception>
#include <iostream>
#include <thread>

#include "../../report/machine_limits.h"
#include "../../report/statistics.h"
#include "../demo/progress.h"
#include "loading.h"
#include "peer.h"

namespace {

namespace ef = eigenformer;
using nlohmann::json;

constexpr const char* kUsage =
    R"(model_bench: tokens per second of a model, of prompts and of tokens one by one, as
llama-bench measures them: random tokens, sequences that begin empty, logits of the last token,
medians.

  model_bench --model DIR|FILE [options]

  --prompt-tokens N    tokens of the prompt, read in one step (default 512)
  --decode-tokens N    tokens written one by one (default 32)
  --batch N            writes N sequences at once as well (default 1: one only)
  --repetitions N      of each measurement, after one that does not count (default 5)
  --peer LLAMA_BENCH   runs this program of llama.cpp on the same .gguf file with the same threads,
                       after ours, and prints our rates over its rates
  --json               one JSON object in place of the table
  --help               this text
)";

struct Options {
  programs::ModelOptions model;
  std::string peer;
  long prompt_tokens = 512, decode_tokens = 32, batch = 1, repetitions = 5;
  bool as_json = false;

  void declare(programs::CommandLine& line) {
    model.declare(line);
    line.integer("--prompt-tokens", 1, 1L << 20, prompt_tokens);
    line.integer("--decode-tokens", 1, 1L << 20, decode_tokens);
    line.integer("--batch", 1, 1L << 12, batch);
    line.integer("--repetitions", 1, 1000, repetitions);
    line.text("--peer", peer);
    line.flag("--json", as_json);
  }
  void check(const programs::CommandLine& line) const {
    model.check(line);
    if (!peer.empty() && std::filesystem::path(model.path).extension() != ".gguf")
      line.fail("--peer reads a .gguf file, and --model is another");
  }
};

/// A line of the table. A figure that there is not is 0.
struct Row {
  const char* what;
  ef::Index sequences, tokens, steps;  // tokens of a sequence in each step
  double seconds = 0;
  double of_bandwidth = 0;  // the weights' bytes over what memory gives in this time
  double peer_rate = 0;

  double rate() const { return static_cast<double>(sequences * tokens * steps) / seconds; }
  double over_peer() const { return peer_rate > 0 ? rate() / peer_rate : 0; }
};

void say(const std::string& text) {
  if (::isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r%s \033[K", text.c_str());
}

void measure(Row& row, programs::LoadedModel& model, long repetitions) {
  std::vector<double> seconds;
  for (long r = -1; r < repetitions; ++r) {  // the first warms up
    say(std::string(row.what) + " of " + std::to_string(row.tokens * row.steps) + " tokens, " +
        std::to_string(row.sequences) + " at once: " + std::to_string(r + 1) + " of " +
        std::to_string(repetitions));
    const double one = model.seconds_of_steps(row.sequences, row.tokens, row.steps);
    if (r >= 0) seconds.push_back(one);
  }
  row.seconds = bench::median(seconds);
}

/// Bytes per second of the memory, or of the cache that holds the weights.
double read_bandwidth(double bytes, int threads) {
  say("the machine's bandwidth");
  const bench::Limits limits = bench::measure_limits(threads);
  return bytes / bench::memory_seconds(bench::Limit::read_bytes(bytes), limits);
}

json as_json(const std::vector<Row>& rows, const Options& options, double bytes, double bandwidth,
             const programs::PeerRates& peer) {
  json result{{"model", options.model.path},
              {"threads", options.model.threads},
              {"kernels", ef::isa::best::name},
              {"weight_bytes_of_a_step", bytes},
              {"repetitions", options.repetitions},
              {"read_bytes_per_second", bandwidth},
              {"rows", json::array()}};
  if (!peer.model.empty()) result["peer"] = {{"program", options.peer}, {"model", peer.model}};
  for (const Row& row : rows) {
    json line{{"test", row.what},
              {"sequences", row.sequences},
              {"tokens", row.tokens * row.steps},
              {"seconds", row.seconds},
              {"tokens_per_second", row.rate()}};
    if (row.of_bandwidth > 0) line["of_read_bandwidth"] = row.of_bandwidth;
    if (row.peer_rate > 0) {
      line["peer_tokens_per_second"] = row.peer_rate;
      line["over_peer"] = row.over_peer();
    }
    result["rows"].push_back(std::move(line));
  }
  return result;
}

void print(const std::vector<Row>& rows, double bytes, double bandwidth,
           const programs::PeerRates& peer) {
  const auto figure = [](const char* pattern, double value) {
    return value > 0 ? bench::format(pattern, value) : std::string("-");
  };
  std::printf("%-8s %9s %7s %11s %10s", "test", "sequences", "tokens", "tokens/s", "bandwidth");
  if (!peer.model.empty()) std::printf(" %11s %6s", "peer's", "ratio");
  std::printf("\n");
  for (const Row& row : rows) {
    std::printf("%-8s %9td %7td %11.2f %10s", row.what, row.sequences, row.tokens * row.steps,
                row.rate(), figure("%.1f%%", 100 * row.of_bandwidth).c_str());
    if (!peer.model.empty())
      std::printf(" %11s %6s", figure("%.2f", row.peer_rate).c_str(),
                  figure("%.2f", row.over_peer()).c_str());
    std::printf("\n");
  }
  std::printf("bandwidth: a step reads %.1f MB of weights, the machine %.1f GB/s\n", bytes / 1e6,
              bandwidth / 1e9);
  if (!peer.model.empty()) std::printf("peer: %s\n", peer.model.c_str());
}

void run(const Options& options, programs::LoadedModel& model) {
  std::vector<Row> rows{{"prefill", 1, options.prompt_tokens, 1},
                        {"decode", 1, 1, options.decode_tokens}};
  if (options.batch > 1) rows.push_back({"decode", options.batch, 1, options.decode_tokens});
  for (Row& row : rows) measure(row, model, options.repetitions);
  const auto bytes = static_cast<double>(model.step_bytes());
  const double bandwidth = read_bandwidth(bytes, static_cast<int>(options.model.threads));
  if (model.config().form.experts.count == 0)  // of which a token reads some
    for (Row& row : rows)
      if (row.tokens == 1)
        row.of_bandwidth = bytes * static_cast<double>(row.steps) / row.seconds / bandwidth;
  programs::PeerRates peer;
  if (!options.peer.empty()) {
    say("llama.cpp");
    peer = programs::run_llama_bench(options.peer, options.model.path, options.model.threads,
                                     options.prompt_tokens, options.decode_tokens,
                                     options.repetitions);
    rows[0].peer_rate = peer.prefill;
    rows[1].peer_rate = peer.decode;
  }
  say("");
  if (options.as_json)
    std::cout << as_json(rows, options, bytes, bandwidth, peer) << '\n';
  else
    print(rows, bytes, bandwidth, peer);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  programs::CommandLine line("model_bench", kUsage + programs::model_usage());
  options.declare(line);
  line.parse(argc, argv);
  options.check(line);
  if (options.model.threads == 0)
    options.model.threads = (std::max)(1L, long{std::thread::hardware_concurrency()});
  try {
    run(options, *programs::load(options.model, stderr));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "model_bench: %s\n", error.what());
    return 1;
  }
}
