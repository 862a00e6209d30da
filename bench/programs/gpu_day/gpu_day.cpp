// The day a GPU is there: one program runs all that waits for one, within a budget of seconds, and
// goes on where it stopped when it is called again. It starts the programs beside it (gpu_rows, the
// tests named *_test_cuda, peers.py), so that a folder of built programs is all that travels.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <list>
#include <map>
#include <regex>
#include <sstream>
#include <thread>

#include <nlohmann/json.hpp>

#include "../../report/statistics.h"
#include "chart.h"
#include "process.h"

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using gpu_day::Process;

constexpr int kNoDevice = 3;         // exit status of gpu_rows
constexpr double kLeastOfStep = 10;  // seconds; with fewer left nothing is begun

constexpr const char* kUsage =
    R"(gpu_day: runs all device tests, times every CUDA benchmark against the limits of this GPU and
against its peers (cuBLASLt; PyTorch, and through it cuDNN, where python3 has it), and runs the
tests under compute-sanitizer (memcheck, racecheck, initcheck, synccheck) where that is found.

  --json FILE        what was found, written after each step (default gpu_day.json); steps that
                     stand there are not run again, so that the same command goes on after a stop
  --svg FILE         the benchmarks drawn (default: that of --json, .svg)
  --budget SECONDS   what this call may take (default 540)
  --programs FOLDER  where the programs are (default: beside this one, and in ../tests)
  --only REGEX       steps whose names it matches
  --jobs N           tests at once (default: half of the processors); benchmarks run alone
  --again            forget what stands in the JSON
  --help             this text

Without a CUDA device it says so, writes nothing and exits with 0. It exits with 1 where a step
failed.
)";

struct Options {
  fs::path json = "gpu_day.json", svg;
  std::vector<fs::path> folders;
  double budget = 540;
  std::string only;
  unsigned jobs = std::max(1u, std::thread::hardware_concurrency() / 2);
  bool again = false;
};

[[noreturn]] void refuse(const std::string& what) {
  std::fprintf(stderr, "gpu_day: %s\n\n%s", what.c_str(), kUsage);
  std::exit(2);
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= count) refuse(argument + " needs a value");
      return arguments[++i];
    };
    const auto positive = [&] {
      const double number = std::atof(value().c_str());
      if (!(number > 0)) refuse(argument + " takes a positive number");
      return number;
    };
    if (argument == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    if (argument == "--json")
      options.json = value();
    else if (argument == "--svg")
      options.svg = value();
    else if (argument == "--budget")
      options.budget = positive();
    else if (argument == "--programs")
      options.folders.emplace_back(value());
    else if (argument == "--only")
      options.only = value();
    else if (argument == "--jobs")
      options.jobs = static_cast<unsigned>(positive());
    else if (argument == "--again")
      options.again = true;
    else
      refuse("unknown argument " + argument);
  }
  if (options.svg.empty()) options.svg = fs::path(options.json).replace_extension(".svg");
  if (options.folders.empty()) {
    const fs::path here = fs::canonical("/proc/self/exe").parent_path();
    options.folders = {here, here.parent_path() / "tests"};
  }
  return options;
}

std::string text_of(const fs::path& file) {
  std::ifstream in(file);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

/// The objects of JSON among the lines of a text.
Json objects_of(const std::string& text) {
  Json objects = Json::array();
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    Json object = Json::parse(line, nullptr, false);
    if (object.is_object()) objects.push_back(std::move(object));
  }
  return objects;
}

std::string tail_of(const std::string& text) {
  constexpr std::size_t most = 2000;
  return text.size() <= most ? text : text.substr(text.size() - most);
}

/// In the folders, or empty.
fs::path find(const std::vector<fs::path>& folders, const std::string& name) {
  for (const fs::path& folder : folders)
    if (fs::exists(folder / name)) return fs::absolute(folder / name);
  return {};
}

fs::path find_sanitizer() {
  std::vector<fs::path> folders;
  std::istringstream path(std::getenv("PATH") != nullptr ? std::getenv("PATH") : "");
  for (std::string folder; std::getline(path, folder, ':');) folders.emplace_back(folder);
  folders.emplace_back("/usr/local/cuda/bin");
  return find(folders, "compute-sanitizer");
}

struct Step {
  std::string name;
  std::vector<std::string> command;
  double limit = 60;  // seconds
  bool alone = false;
};

/// What was found so far, in its file. A line of "rows" is one benchmark and its peers.
class Day {
 public:
  Day(const Options& options, Json gpu) : options_(options) {
    const std::string before = options.again ? "" : text_of(options.json);
    if (!before.empty()) {
      found_ = Json::parse(before, nullptr, false);
      if (!found_.is_object() || !found_.contains("steps") || found_.value("gpu", Json()) != gpu)
        refuse(options.json.string() + " is not of this GPU: name another file, or say --again");
    }
    found_["gpu"] = std::move(gpu);
    if (!found_.contains("steps")) found_["steps"] = Json::array();
  }

  bool knows(const std::string& step) const {
    return std::any_of(found_["steps"].begin(), found_["steps"].end(),
                       [&](const Json& known) { return known.value("name", "") == step; });
  }

  void add(const Step& step, const Process& process, const std::string& output) {
    const Json objects = objects_of(output);
    const bool failed = process.stopped() || process.exit_status() != 0;
    found_["steps"].push_back({{"name", step.name},
                               {"status", process.stopped() ? "took too long"
                                          : failed          ? "failed"
                                                            : "passed"},
                               {"seconds", process.seconds()},
                               {"found", objects},
                               {"output", failed || objects.empty() ? tail_of(output) : ""}});
    write();
  }

  int failures() const {
    return static_cast<int>(
        std::count_if(found_["steps"].begin(), found_["steps"].end(),
                      [](const Json& step) { return step.value("status", "") != "passed"; }));
  }

  void write() {
    std::vector<gpu_day::Bar> bars;
    found_["rows"] = rows(bars);
    const fs::path fresh = options_.json.string() + ".new";
    std::ofstream(fresh) << found_.dump(1, ' ', false, Json::error_handler_t::replace) << '\n';
    fs::rename(fresh, options_.json);
    const Json& gpu = found_["gpu"];
    std::ofstream(options_.svg) << gpu_day::to_svg(gpu.value("gpu", "a GPU") + ", CUDA " +
                                                       gpu.value("runtime", "?") + ", driver " +
                                                       gpu.value("driver", "?") + limits_text(),
                                                   bars);
  }

 private:
  Json all_found() const {
    Json all = Json::array();
    for (const Json& step : found_["steps"])
      for (const Json& object : step["found"]) all.push_back(object);
    return all;
  }

  /// The largest of the limits whose name begins so, 0 where there is none.
  double limit(const std::string& name) const {
    double largest = 0;
    for (const Json& object : all_found())
      if (object.value("limit", "").rfind(name, 0) == 0)
        largest = std::max(largest, object.value("per_second", 0.0));
    return largest;
  }

  std::string limits_text() const {
    return "; copies " + bench::format("%.2f TB/s", 1e-12 * limit("copy")) + ", bfloat16 " +
           bench::format("%.0f TFLOP/s", 1e-12 * limit("bfloat16"));
  }

  Json rows(std::vector<gpu_day::Bar>& bars) const {
    const Json all = all_found();
    Json rows = Json::array();
    for (const Json& object : all) {
      if (!object.contains("operator")) continue;
      gpu_day::Bar bar;
      bar.name = object.value("row", "");
      bar.seconds = object.value("seconds", 0.0);
      const auto at = [](double amount, double rate) { return rate > 0 ? amount / rate : 0.0; };
      const std::string peak = object.value("peak", "");
      const double floor =
          std::max(at(object.value("bytes", 0.0), limit("copy")),
                   peak.empty() ? 0.0 : at(object.value("operations", 0.0), limit(peak)));
      bar.share = floor / bar.seconds;
      Json peers = Json::array();
      for (const Json& peer : all) {
        if (!peer.contains("peer") || peer.value("row", "") != bar.name) continue;
        const double seconds = peer.value("seconds", 0.0), share = floor / seconds;
        peers.push_back(
            {{"name", peer["peer"]}, {"seconds", seconds}, {"times_ours", seconds / bar.seconds}});
        if (share > bar.peer_share) bar.peer = peer.value("peer", ""), bar.peer_share = share;
      }
      rows.push_back({{"operator", object["operator"]},
                      {"row", bar.name},
                      {"seconds", bar.seconds},
                      {"floor_seconds", floor},
                      {"share_of_limit", bar.share},
                      {"peers", peers}});
      bars.push_back(std::move(bar));
    }
    return rows;
  }

  const Options& options_;
  Json found_;
};

/// Runs one program to its end; its output.
std::string output_of(const std::vector<std::string>& command, const fs::path& log, int& status) {
  Process process(command, log, 60);
  while (!process.over()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  status = process.exit_status();
  return text_of(log);
}

/// All that there is to do here, in the order of what is wanted most.
std::vector<Step> steps_of(const Options& options, const fs::path& rows, const fs::path& log) {
  std::vector<Step> steps;
  std::map<std::string, std::string> tests;
  for (const fs::path& folder : options.folders)
    if (fs::is_directory(folder))
      for (const auto& entry : fs::directory_iterator(folder))
        if (entry.path().filename().string().ends_with("_test_cuda"))
          tests.emplace(entry.path().filename().string(), fs::absolute(entry.path()).string());
  if (tests.empty()) std::fprintf(stderr, "gpu_day: no programs *_test_cuda: no tests are run\n");
  for (const auto& [name, path] : tests) steps.push_back({"test " + name, {path}, 60, false});

  steps.push_back({"limits", {rows.string(), "--limits"}, 60, true});
  int status = 0;
  std::istringstream operators(output_of({rows.string(), "--list"}, log, status));
  for (std::string name; std::getline(operators, name);)
    steps.push_back({"rows " + name, {rows.string(), "--operator", name}, 60, true});
  if (const fs::path peers = find(options.folders, "peers.py"); !peers.empty())
    steps.push_back({"peers", {"python3", peers.string()}, 90, true});

  const fs::path sanitizer = find_sanitizer();
  if (sanitizer.empty())
    std::fprintf(stderr, "gpu_day: no compute-sanitizer: the tests run without it\n");
  else
    for (const char* tool : {"memcheck", "racecheck", "synccheck", "initcheck"})
      for (const auto& [name, path] : tests) {
        // A test may skip, or ask for an error of the runtime and look at it.
        std::vector<std::string> command = {
            sanitizer.string(),    "--tool", tool, "--error-exitcode", "9",
            "--require-cuda-init", "no"};
        if (std::string(tool) == "memcheck")
          command.insert(command.end(), {"--report-api-errors", "no"});
        command.insert(command.end(), {path, "--gtest_brief=1"});
        steps.push_back({std::string(tool) + " " + name, std::move(command), 150, false});
      }
  const std::regex only(options.only);
  std::erase_if(steps, [&](const Step& step) { return !std::regex_search(step.name, only); });
  return steps;
}

/// Runs the steps, as many at once as may be; those that the budget leaves no time for stay.
/// Returns how many stay.
std::size_t run(const std::vector<Step>& steps, Day& day, const Options& options,
                gpu_day::Time::time_point start) {
  struct Running {
    const Step* step;
    Process process;
    fs::path log;
    bool cut;  // has less time than it should: if that does not do, it is no result
  };
  const auto left = [&] { return options.budget - gpu_day::seconds_since(start) - 2; };
  std::list<Running> running;
  std::size_t next = 0, stay = 0;
  while (next < steps.size() || !running.empty()) {
    const bool alone = !running.empty() && running.front().step->alone;
    if (next < steps.size() && left() < kLeastOfStep)
      stay += steps.size() - next, next = steps.size();
    if (next < steps.size() && !alone && running.size() < options.jobs &&
        (running.empty() || !steps[next].alone)) {
      const Step& step = steps[next++];
      const fs::path log = options.json.string() + "." + std::to_string(next) + ".log";
      const double limit = std::min(step.limit, left());
      running.push_back({&step, Process(step.command, log, limit), log, limit < step.limit});
      continue;
    }
    for (auto each = running.begin(); each != running.end();) {
      if (!each->process.over()) {
        ++each;
        continue;
      }
      const Process& process = each->process;
      const bool result = !(process.stopped() && each->cut);
      if (result) day.add(*each->step, process, text_of(each->log));
      if (!result) ++stay;
      std::fprintf(stderr, "gpu_day: %5.0f s  %-50s %s\n", gpu_day::seconds_since(start),
                   each->step->name.c_str(),
                   !result                      ? "no time left"
                   : process.stopped()          ? "TOOK TOO LONG"
                   : process.exit_status() == 0 ? "passed"
                                                : "FAILED");
      fs::remove(each->log);
      each = running.erase(each);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return stay;
}

int work(const Options& options) {
  const auto start = gpu_day::Time::now();
  const fs::path rows = find(options.folders, "gpu_rows");
  if (rows.empty()) refuse("no program gpu_rows beside this one: build it, or name --programs");
  const fs::path log = fs::temp_directory_path() / ("gpu_day." + std::to_string(getpid()));
  int status = 0;
  const Json gpu = objects_of(output_of({rows.string(), "--device"}, log, status));
  const std::string said = text_of(log);
  if (status == kNoDevice) {
    std::printf("gpu_day: no CUDA device on this machine: nothing to run\n");
    fs::remove(log);
    return 0;
  }
  if (status != 0 || gpu.empty()) {
    std::fprintf(stderr, "gpu_day: %s --device fails: %s\n", rows.c_str(), said.c_str());
    fs::remove(log);
    return 1;
  }
  Day day(options, gpu[0]);
  std::vector<Step> steps = steps_of(options, rows, log);
  fs::remove(log);
  const std::size_t all = steps.size();
  std::erase_if(steps, [&](const Step& step) { return day.knows(step.name); });
  std::fprintf(stderr, "gpu_day: %s, %zu steps, %zu of them done before\n",
               gpu[0].value("gpu", "a GPU").c_str(), all, all - steps.size());
  const std::size_t stay = run(steps, day, options, start);
  day.write();
  if (stay > 0) std::printf("gpu_day: %zu steps are left: run the same command again\n", stay);
  std::printf("gpu_day: %d of the steps failed; see %s and %s\n", day.failures(),
              options.json.c_str(), options.svg.c_str());
  return day.failures() == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  const Options options = parse(count, arguments);
  try {
    return work(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_day: %s\n", error.what());
    return 1;
  }
}
