/// \file
/// What model_bench found, as a table, as JSON, and as rows of a report's results.
#pragma once

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../report/results.h"
#include "loading.h"

namespace programs {

/// Steps of one kind.
struct BenchRow {
  std::string test;
  long sequences, tokens, steps;                     ///< tokens of a sequence in each step
  std::vector<double> seconds = {};                  ///< of a step, in each repetition
  std::vector<std::vector<double>> peer_rates = {};  ///< tokens per second; empty: not measured

  double tokens_of_step() const { return static_cast<double>(sequences * tokens); }
  double rate() const { return tokens_of_step() / bench::median(seconds); }
  double peer_rate(std::size_t peer) const { return bench::median(peer_rates[peer]); }
};

struct PeerFigures {
  std::string name, model;
  double peak_bytes;
};

struct ModelFigures {
  std::string model, weights;
  bench::Limits limits;
  // 0 and none where a step's part of the weights depends on its tokens, or their format on a file
  double step_bytes = 0;
  TokenWork work;
  bench::Peak peak = bench::Peak::none;
  double peak_bytes = 0;  ///< the most memory that was held
  std::vector<BenchRow> rows;
  std::vector<PeerFigures> peers;

  /// A step reads the weights once and multiplies them by all tokens; attention is left out.
  bench::Limit limit(const BenchRow& row) const {
    const double operations = peak == bench::Peak::none
                                  ? 0
                                  : 2 * (row.tokens_of_step() * work.layers +
                                         static_cast<double>(row.sequences) * work.head);
    return bench::Limit::product(operations, step_bytes, peak);
  }
  double of_limit(const BenchRow& row) const {
    return bench::floor_seconds(limit(row), limits) / bench::median(row.seconds);
  }
};

inline std::string to_json(const ModelFigures& figures) {
  using nlohmann::ordered_json;
  ordered_json result{{"model", figures.model},
                      {"weights", figures.weights},
                      {"threads", figures.limits.threads},
                      {"kernels", eigenformer::isa::best::name},
                      {"weight_bytes_of_a_step", figures.step_bytes},
                      {"peak_bytes", figures.peak_bytes},
                      {"read_bytes_per_second", figures.limits.read.dram},
                      {"rows", ordered_json::array()}};
  for (const PeerFigures& peer : figures.peers)
    result["peers"].push_back(
        {{"name", peer.name}, {"model", peer.model}, {"peak_bytes", peer.peak_bytes}});
  for (const BenchRow& row : figures.rows) {
    ordered_json line{{"test", row.test},
                      {"sequences", row.sequences},
                      {"tokens", row.tokens * row.steps},
                      {"seconds_of_a_step", bench::median(row.seconds)},
                      {"tokens_per_second", row.rate()}};
    if (figures.of_limit(row) > 0) line["of_limit"] = figures.of_limit(row);
    for (std::size_t p = 0; p < row.peer_rates.size(); ++p)
      if (row.peer_rate(p) > 0) {
        line["peer_tokens_per_second"][figures.peers[p].name] = row.peer_rate(p);
        line["over_peer"][figures.peers[p].name] = row.rate() / row.peer_rate(p);
      }
    result["rows"].push_back(std::move(line));
  }
  return result.dump();
}

inline std::string to_table(const ModelFigures& figures) {
  const auto cell = [](const std::string& text, std::size_t width) {
    return std::string(width - (std::min)(width, text.size()), ' ') + text + ' ';
  };
  const auto figure = [](const char* pattern, double value) {
    return value > 0 ? bench::format(pattern, value) : std::string("-");
  };
  std::string text = cell("test", 8) + cell("sequences", 9) + cell("tokens", 7) +
                     cell("tokens/s", 11) + cell("of limit", 9);
  for (const PeerFigures& peer : figures.peers) text += cell(peer.name, 13) + cell("ratio", 6);
  for (const BenchRow& row : figures.rows) {
    text += '\n' + cell(row.test, 8) + cell(std::to_string(row.sequences), 9) +
            cell(std::to_string(row.tokens * row.steps), 7) + cell(figure("%.2f", row.rate()), 11) +
            cell(figure("%.1f%%", 100 * figures.of_limit(row)), 9);
    for (std::size_t p = 0; p < row.peer_rates.size(); ++p) {
      const double theirs = row.peer_rate(p);
      text += cell(figure("%.2f", theirs), 13) +
              cell(figure("%.2f", theirs > 0 ? row.rate() / theirs : 0), 6);
    }
  }
  text += bench::format("\na step reads %.1f MB of weights", figures.step_bytes / 1e6) +
          bench::format(", the machine %.1f GB/s; ", figures.limits.read.dram / 1e9) +
          bench::format("peak memory %.0f MB", figures.peak_bytes / 1e6);
  for (const PeerFigures& peer : figures.peers)
    text += "\n" + peer.name + ": " + peer.model + ", peak memory " +
            bench::format("%.0f MB", peer.peak_bytes / 1e6);
  return text + '\n';
}

/// One number of threads beside another, each of one test, as `report` has them.
inline std::vector<bench::RowResult> report_rows(const ModelFigures& figures) {
  std::vector<bench::RowResult> rows;
  for (const BenchRow& row : figures.rows) {
    const bench::Limit limit = figures.limit(row);
    const auto per_step = [&](std::vector<double> rates) {
      for (double& rate : rates) rate = row.tokens_of_step() / rate;
      return bench::timing_of(std::move(rates));
    };
    std::string name = row.test;
    if (row.tokens > 1) name.append(" ").append(std::to_string(row.tokens));
    if (row.sequences > 1)
      name.append(" ").append(std::to_string(row.sequences)).append(" sequences");
    bench::RowResult result{figures.model,
                            name + ", " + figures.weights,
                            figures.limits.threads,
                            limit,
                            bench::floor_seconds(limit, figures.limits),
                            bench::memory_seconds(limit, figures.limits) >=
                                bench::arithmetic_seconds(limit, figures.limits),
                            {{"eigenformer", bench::timing_of(row.seconds)}}};
    for (std::size_t p = 0; p < row.peer_rates.size(); ++p)
      if (!row.peer_rates[p].empty())
        result.calls.push_back({figures.peers[p].name, per_step(row.peer_rates[p])});
    rows.push_back(std::move(result));
  }
  return rows;
}

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  if (!(file << text).flush()) throw std::runtime_error("cannot write " + path);
}

/// Throws std::runtime_error where write_text could not; what is there stays as it is.
inline void require_writable(const std::string& path) {
  const bool there = std::filesystem::exists(path);
  if (!std::ofstream(path, std::ios::binary | std::ios::app))
    throw std::runtime_error("cannot write " + path);
  if (!there) std::filesystem::remove(path);
}

/// Adds to the results in a file, or makes it; what it has of the same name and number of threads
/// is taken out. Throws std::runtime_error where it cannot, std::invalid_argument where the file
/// holds something else.
inline bench::Results add_to_results(const std::string& path, const ModelFigures& figures) {
  bench::Results results;
  if (std::ifstream file(path, std::ios::binary); file)
    results = bench::from_json(std::string(std::istreambuf_iterator<char>(file), {}));
  results.machine = bench::describe_machine();
  results.machine.peers.clear();
  std::vector<bench::RowResult> added = report_rows(figures);
  std::erase_if(results.rows, [&](const bench::RowResult& old) {
    return std::any_of(added.begin(), added.end(), [&](const bench::RowResult& row) {
      return row.operator_name == old.operator_name && row.name == old.name &&
             row.threads == old.threads;
    });
  });
  std::move(added.begin(), added.end(), std::back_inserter(results.rows));
  std::stable_sort(results.rows.begin(), results.rows.end(), [](const auto& a, const auto& b) {
    return std::tie(a.operator_name, a.name, a.threads) <
           std::tie(b.operator_name, b.name, b.threads);
  });
  for (const bench::RowResult& row : results.rows)
    for (const bench::CallResult& call : row.calls)
      if (&call != bench::ours(row) &&
          std::find(results.machine.peers.begin(), results.machine.peers.end(), call.name) ==
              results.machine.peers.end())
        results.machine.peers.push_back(call.name);
  const auto same_threads = std::find_if(
      results.limits.begin(), results.limits.end(),
      [&](const bench::Limits& limits) { return limits.threads == figures.limits.threads; });
  if (same_threads != results.limits.end())
    *same_threads = bench::better_of(*same_threads, figures.limits);
  else
    results.limits.push_back(figures.limits);
  std::sort(results.limits.begin(), results.limits.end(),
            [](const auto& a, const auto& b) { return a.threads < b.threads; });
  write_text(path, bench::to_json(results));
  return results;
}

}  // namespace programs
