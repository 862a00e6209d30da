// All rows of all operators, ours and the peers in turn, against this machine's limits. See kHelp.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "results.h"
#include "turns.h"

namespace {

constexpr const char* kHelp =
    R"(report: every benchmark row of eigenformer beside its peers and this machine's limits

  report [--filter REGEX] [--quick] [--threads N] [--list] [output]
  report --from FILE [--filter REGEX] [output]
  output: [--json FILE|-] [--svg FILE] [--peers-svg FILE]

  --filter REGEX    only rows whose name matches (ECMAScript, anywhere in the name)
  --quick           few repetitions, about a minute in all; judge by ratios, not the last percent
  --threads N       size of the second column; 1 leaves it out (default: the cores that this
                    process may use)
  --from FILE       measure nothing: take the results that --json wrote to FILE
  --json FILE       write the results to FILE; "-" writes them to standard output, and the table to
                    standard error
  --svg FILE        draw ours against this machine's limits as a bar chart
  --peers-svg FILE  draw ours against the peers as a bar chart
  --list            print the names of the rows and stop
  --help            print this

How it measures. First the limits, and once more at the end (the better counts): bandwidth of L2,
L3 and DRAM (read, write, copy), float multiply-adds, and the dot-product instructions of this
build. A row's floor is the longest of its bytes and its operations at these limits, with bytes
taken from the cache level that holds what repeated calls go through; "of limit" is floor / time.
Rows at the edge of a cache may pass 100%, and so do writes of zeros past the caches on some CPUs
(Zen 4: several times the bandwidth of other values, which the limits are measured with).
Then ours and the peers alternate: 5 turns of 5 samples each after a warm-up (fewer where a call
takes long), and the median counts. Peers are asked for their result before they are timed; a wrong
one is left out, and said so (exit status 2). A peer with threads of its own (oneDNN, OpenBLAS) runs
in a process of its own, because idle pools in one process stall each other; after its turn on
several threads we wait until its idle threads have stopped spinning. A turn on several threads
warms up for 30 ms, until Linux has put each on a core of its own, and ours runs inside a
ParallelRegion. On a shared machine compare ratios within one run.

Write bench/results/MACHINE.json with --json when a figure goes into a document, and quote the
command.
)";

struct Options {
  std::string filter, json, svg, peers_svg, from;
  bool quick = false, list = false;
  int threads = 0;  // 0: all cores
};

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument(what + "\nreport --help lists the options");
}

int positive_number(const std::string& option, const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 1 || value > 4096)
    refuse(option + " needs a number from 1 to 4096, got \"" + text + "\"");
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) refuse(option + " needs a value");
      return std::string(argv[++i]);
    };
    if (option == "--filter")
      options.filter = value();
    else if (option == "--json")
      options.json = value();
    else if (option == "--svg")
      options.svg = value();
    else if (option == "--peers-svg")
      options.peers_svg = value();
    else if (option == "--from")
      options.from = value();
    else if (option == "--threads")
      options.threads = positive_number(option, value());
    else if (option == "--quick")
      options.quick = true;
    else if (option == "--list")
      options.list = true;
    else
      refuse("unknown option \"" + option + "\"");
  }
  if (!options.from.empty() && (options.quick || options.list || options.threads > 0))
    refuse("--from measures nothing: --quick, --threads and --list do not go with it");
  return options;
}

std::regex filter_of(const Options& options) {
  try {
    return std::regex(options.filter);
  } catch (const std::regex_error& error) {
    refuse("--filter \"" + options.filter + "\" is not a regular expression: " + error.what());
  }
}

/// One line on standard error: rewritten on a terminal, printed in full elsewhere.
class Progress {
 public:
  void step(const std::string& row, const std::string& detail) {
    if (terminal_) {
      std::fprintf(stderr, "\r\033[K%s  %s", row.c_str(), detail.c_str());
    } else if (row != last_) {
      std::fprintf(stderr, "%s\n", row.c_str());
      last_ = row;
    }
    std::fflush(stderr);
  }
  ~Progress() {
    if (terminal_) std::fprintf(stderr, "\r\033[K");
  }

 private:
  bool terminal_ = isatty(STDERR_FILENO) != 0;
  std::string last_;
};

class Reporter {
 public:
  explicit Reporter(const Options& options) : options_(options), filter_(filter_of(options)) {
    results_.machine = bench::describe_machine();
    if (options_.threads == 0) options_.threads = results_.machine.cores;
  }

  void list() {
    for (std::size_t index = 0; index < bench::registered_cases().size(); ++index) {
      local_.open(index);
      for (const auto& row : local_.suite().rows)
        if (matches(*row)) std::cout << row->name << '\n';
    }
  }

  bench::Results run() {
    for (int threads : {1, options_.threads})
      if (threads > 1 || results_.limits.empty()) {
        progress_.step("measuring the limits of this machine",
                       std::to_string(threads) + " threads");
        results_.limits.push_back(bench::measure_limits(threads));
      }
    for (std::size_t index = 0; index < bench::registered_cases().size(); ++index)
      time_suite(index);
    if (!options_.quick) measure_limits_again();
    return std::move(results_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  /// Whatever disturbed the first measurement has perhaps gone.
  void measure_limits_again() {
    for (bench::Limits& limits : results_.limits) {
      progress_.step("measuring the limits again", std::to_string(limits.threads) + " threads");
      limits = bench::better_of(limits, bench::measure_limits(limits.threads));
      for (bench::RowResult& row : results_.rows)
        if (row.threads == limits.threads) set_floor(row, limits);
    }
  }

  static void set_floor(bench::RowResult& row, const bench::Limits& limits) {
    row.floor = bench::floor_seconds(row.limit, limits);
    row.bound_by_memory =
        bench::memory_seconds(row.limit, limits) >= bench::arithmetic_seconds(row.limit, limits);
  }

  bool matches(const bench::Row& row) const {
    return options_.filter.empty() || std::regex_search(row.name, filter_);
  }

  void time_suite(std::size_t index) {
    progress_.step("building the inputs of " + bench::registered_cases()[index].name, "");
    local_.open(index);
    index_ = index;
    opened_.clear();
    double columns = 0;  // calls that will be timed, a number of threads each
    for (const auto& row : local_.suite().rows)
      if (matches(*row)) columns += static_cast<double>(row->calls.size() * results_.limits.size());
    const double files_left = static_cast<double>(bench::registered_cases().size() - index);
    const double seconds = options_.quick ? std::max(0.5, kQuickSeconds - since(start_)) /
                                                files_left / std::max(columns, 1.0)
                                          : kSecondsPerCall;
    for (std::size_t row = 0; row < local_.suite().rows.size(); ++row)
      if (matches(*local_.suite().rows[row])) time_row(row, std::min(seconds, kSecondsPerCall));
  }

  void time_row(std::size_t row_index, double seconds) {
    const bench::Row& row = *local_.suite().rows[row_index];
    std::vector<bool> good(row.calls.size(), true);
    for (std::size_t call = 0; call < row.calls.size(); ++call) {
      progress_.step(row.name, "checking " + row.calls[call].name);
      attempt(row, call, good, [&](auto& timer) {
        const std::string wrong = timer.mismatch(row_index, call);
        if (!wrong.empty()) throw std::runtime_error(wrong);
      });
    }
    for (const bench::Limits& limits : results_.limits) {
      std::vector<std::vector<double>> samples(row.calls.size());
      const int turns = options_.quick ? 3 : 5;
      for (int turn = 0; turn < turns; ++turn)
        for (std::size_t call = 0; call < row.calls.size(); ++call) {
          if (limits.threads > 1 && !row.calls[call].pool) continue;
          progress_.step(row.name, row.calls[call].name + ", threads " +
                                       std::to_string(limits.threads) + ", turn " +
                                       std::to_string(turn + 1));
          attempt(row, call, good, [&](auto& timer) {
            for (double s : timer.take(
                     {row_index, call, limits.threads, options_.quick ? 3 : 5, seconds / turns}))
              samples[call].push_back(s);
          });
          if (limits.threads > 1 && !row.calls[call].family.empty())
            std::this_thread::sleep_for(kSpinning);
        }
      add_result(row, limits, good, samples);
    }
  }

  /// f(timer) with the timer of the call's family. A call that fails is left out from here on, with
  /// the reason.
  template <typename F>
  void attempt(const bench::Row& row, std::size_t call, std::vector<bool>& good, F f) {
    if (!good[call]) return;
    const std::string& family = row.calls[call].family;
    try {
      if (family.empty()) {
        f(local_);
        return;
      }
      auto& timer = remotes_[family];
      if (!timer) timer = std::make_unique<bench::RemoteTimer>();
      if (std::find(opened_.begin(), opened_.end(), family) == opened_.end()) {
        timer->open(index_);
        opened_.push_back(family);
      }
      f(*timer);
    } catch (const std::exception& error) {
      good[call] = false;
      results_.left_out.push_back(row.calls[call].name + " in \"" + row.name +
                                  "\": " + error.what());
      if (!family.empty() && !remotes_[family]->alive()) {
        remotes_.erase(family);  // the next row starts another process
        opened_.erase(std::remove(opened_.begin(), opened_.end(), family), opened_.end());
      }
    }
  }

  void add_result(const bench::Row& row, const bench::Limits& limits, const std::vector<bool>& good,
                  const std::vector<std::vector<double>>& samples) {
    bench::RowResult result;
    result.operator_name = bench::registered_cases()[index_].operator_name;
    result.name = row.name;
    result.threads = limits.threads;
    result.limit = row.limit;
    set_floor(result, limits);
    for (std::size_t call = 0; call < row.calls.size(); ++call)
      if (good[call] && !samples[call].empty())
        result.calls.push_back({row.calls[call].name, bench::timing_of(samples[call])});
    if (!result.calls.empty()) results_.rows.push_back(std::move(result));
  }

  static constexpr double kSecondsPerCall = 2.5;  // for all turns of a call on a number of threads
  // leaves room for inputs, checks and packing within a minute
  static constexpr double kQuickSeconds = 45;
  static constexpr std::chrono::milliseconds kSpinning{
      40};  // OpenBLAS threads spin for 2^26 cycles before they sleep

  Options options_;
  std::regex filter_;
  bench::Results results_;
  bench::Timer local_;
  std::map<std::string, std::unique_ptr<bench::RemoteTimer>> remotes_;  // by family
  std::vector<std::string> opened_;  // families whose process has the current suite
  std::size_t index_ = 0;
  Clock::time_point start_ = Clock::now();
  Progress progress_;
};

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file)
    throw std::runtime_error("cannot write " + path + ": " + std::strerror(errno) +
                             "; does its folder exist, and is there room?");
}

/// Fails now rather than after minutes of measuring.
void require_writable(const std::string& path) {
  if (path.empty() || path == "-") return;
  std::ofstream file(path, std::ios::app);
  if (!file)
    throw std::runtime_error("cannot write " + path + ": " + std::strerror(errno) +
                             "; create its folder first");
}

/// The rows of a results file that match the filter.
bench::Results read_results(const Options& options) {
  std::ifstream file(options.from, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + options.from + ": " + std::strerror(errno));
  std::ostringstream text;
  text << file.rdbuf();
  bench::Results results;
  try {
    results = bench::from_json(text.str());
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(options.from + ": " + error.what());
  }
  const std::regex filter = filter_of(options);
  std::erase_if(results.rows,
                [&](const bench::RowResult& row) { return !std::regex_search(row.name, filter); });
  return results;
}

int report(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.list) {
    Reporter(options).list();
    return 0;
  }
  for (const std::string& path : {options.json, options.svg, options.peers_svg})
    require_writable(path);
  const bench::Results results =
      options.from.empty() ? Reporter(options).run() : read_results(options);
  if (results.rows.empty())
    refuse(options.filter.empty() ? "there are no rows: no operator with a benchmark is enabled in "
                                    "cmake/operators.cmake, or --from names a file without any"
                                  : "no row matches --filter \"" + options.filter +
                                        "\"; report --list prints the names");
  (options.json == "-" ? std::cerr : std::cout) << bench::to_table(results) << std::flush;
  if (options.json == "-")
    std::cout << bench::to_json(results);
  else if (!options.json.empty())
    write_file(options.json, bench::to_json(results));
  if (!options.svg.empty()) write_file(options.svg, bench::to_limits_svg(results));
  if (!options.peers_svg.empty()) write_file(options.peers_svg, bench::to_peers_svg(results));
  return results.left_out.empty() ? 0 : 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--serve") == 0) {  // a peer's process, see turns.h
    bench::serve(std::atoi(argv[2]));
    return 0;
  }
  if (argc == 2 && (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0)) {
    std::cout << kHelp;
    return 0;
  }
  try {
    return report(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "report: " << error.what() << '\n';
    return 1;
  }
}
