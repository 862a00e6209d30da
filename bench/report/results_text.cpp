// The table, and the JSON of the same.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "results.h"

namespace bench {
namespace {

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

std::string pad_left(const std::string& text, std::size_t width) {
  return text.size() >= width ? text : std::string(width - text.size(), ' ') + text;
}
std::string pad_right(const std::string& text, std::size_t width) {
  return text.size() >= width ? text : text + std::string(width - text.size(), ' ');
}

/// The rate of what bounds the row.
std::string format_rate(const RowResult& row, double seconds) {
  if (!row.bound_by_memory) return format("%.1f GFLOP/s", row.limit.operations / seconds * 1e-9);
  return format("%.1f GB/s", (row.limit.bytes_read + row.limit.bytes_written) / seconds * 1e-9);
}

std::string format_ratio(const CallResult* peer_result, const CallResult* our_result) {
  if (peer_result == nullptr || our_result == nullptr) return "-";
  return format("%.2f", peer_result->timing.median / our_result->timing.median);
}

std::string format_limits(const Limits& l) {
  const auto rates = [](const Bandwidth& b) {
    return format("%.0f / ", b.l2 * 1e-9) + format("%.0f / ", b.l3 * 1e-9) +
           format("%.0f", b.dram * 1e-9);
  };
  std::string text =
      "limits, " + std::to_string(l.threads) + (l.threads == 1 ? " thread:  " : " threads: ");
  text += "GB/s of L2 / L3 / DRAM: read " + rates(l.read) + ", write " + rates(l.write) +
          ", copy " + rates(l.copy);
  text += "; GFLOP/s: float " + format("%.0f", l.float_fma * 1e-9);
  text += l.bfloat16 > 0 ? ", bfloat16 " + format("%.0f", l.bfloat16 * 1e-9)
                         : ", bfloat16 held against float";
  text += l.int8 > 0 ? ", int8 " + format("%.0f", l.int8 * 1e-9) : ", int8 held against float";
  if (!l.dot_instruction.empty()) text += " (" + l.dot_instruction + ")";
  return text + "\n";
}

std::string header(const Results& results) {
  const Machine& m = results.machine;
  std::string text = m.cpu + ", " + std::to_string(m.cores) + (m.cores == 1 ? " core" : " cores") +
                     ", ISA " + m.isa + ", " + m.compiler + ", Eigen " + m.eigen + "\n";
  text += "peers: Eigen, as its users would write it";
  for (const std::string& name : m.peers) text += ", " + name;
  for (const char* optional : {"oneDNN", "OpenBLAS"})
    if (std::none_of(m.peers.begin(), m.peers.end(),
                     [&](const std::string& name) { return name.rfind(optional, 0) == 0; }))
      text += std::string("; ") + optional +
              " was not found when this was built (see bench/CMakeLists.txt)";
  text += "\n";
  for (const Limits& limits : results.limits) text += format_limits(limits);
  if (m.load > 0.5)
    text += "note: the load average was " + format("%.1f", m.load) +
            " at start; other programs disturb these figures, those on all cores most\n";
  return text;
}

/// Geometric mean of peer over ours, for each peer and number of threads.
std::string summary(const Results& results) {
  std::string text;
  for (const Limits& limits : results.limits) {
    std::string line;
    for (const std::string& name : peer_columns()) {
      double logarithms = 0;
      int count = 0;
      for (const RowResult& row : results.rows) {
        const CallResult *mine = ours(row), *theirs = peer(row, name);
        if (row.threads != limits.threads || mine == nullptr || theirs == nullptr) continue;
        logarithms += std::log(theirs->timing.median / mine->timing.median);
        ++count;
      }
      if (count > 0)
        line += "  " + name + " " + format("%.2f", std::exp(logarithms / count)) + " (" +
                std::to_string(count) + " rows)";
    }
    if (!line.empty())
      text += "geometric mean, " + std::to_string(limits.threads) +
              (limits.threads == 1 ? " thread: " : " threads:") + line + "\n";
  }
  return text;
}

nlohmann::ordered_json json_of(const Bandwidth& b) {
  return {{"l2", b.l2}, {"l3", b.l3}, {"dram", b.dram}};
}

nlohmann::ordered_json json_of(const Limits& l) {
  return {{"threads", l.threads},
          {"l2_bytes", l.l2_bytes},
          {"l3_bytes", l.l3_bytes},
          {"read_bytes_per_second", json_of(l.read)},
          {"write_bytes_per_second", json_of(l.write)},
          {"copy_bytes_per_second", json_of(l.copy)},
          {"float_operations_per_second", l.float_fma},
          {"bfloat16_operations_per_second", l.bfloat16},
          {"int8_operations_per_second", l.int8},
          {"dot_instruction", l.dot_instruction}};
}

nlohmann::ordered_json json_of(const RowResult& row) {
  nlohmann::ordered_json calls = nlohmann::ordered_json::array();
  const CallResult* mine = ours(row);
  for (const CallResult& call : row.calls) {
    nlohmann::ordered_json entry = {{"name", call.name},
                                    {"seconds", call.timing.median},
                                    {"lower_quartile", call.timing.lower_quartile},
                                    {"upper_quartile", call.timing.upper_quartile},
                                    {"samples", call.timing.samples}};
    if (row.floor > 0) entry["share_of_limit"] = row.floor / call.timing.median;
    if (mine != nullptr && &call != mine)
      entry["times_ours"] = call.timing.median / mine->timing.median;
    calls.push_back(std::move(entry));
  }
  return {{"name", row.name},
          {"threads", row.threads},
          {"bytes_read", row.limit.bytes_read},
          {"bytes_written", row.limit.bytes_written},
          {"operations", row.limit.operations},
          {"floor_seconds", row.floor},
          {"bound_by", row.bound_by_memory ? "memory" : "arithmetic"},
          {"calls", std::move(calls)}};
}

}  // namespace

const std::vector<std::string>& peer_columns() {
  static const std::vector<std::string> columns{"Eigen", "oneDNN", "OpenBLAS"};
  return columns;
}

const CallResult* ours(const RowResult& row) {
  return !row.calls.empty() && row.calls.front().name == "eigenformer" ? &row.calls.front()
                                                                       : nullptr;
}

const CallResult* peer(const RowResult& row, const std::string& name) {
  const auto begins_with = [](const CallResult& call, const std::string& start) {
    return call.name.rfind(start, 0) == 0;
  };
  const CallResult* best = nullptr;
  for (const CallResult& call : row.calls) {
    if (&call == ours(row)) continue;
    const bool has_column =
        std::any_of(peer_columns().begin(), peer_columns().end(),
                    [&](const std::string& column) { return begins_with(call, column); });
    if (name.empty() ? has_column : !begins_with(call, name)) continue;
    if (best == nullptr || call.timing.median < best->timing.median) best = &call;
  }
  return best;
}

std::string format_seconds(double seconds) {
  if (seconds < 1e-3) return format("%.2f us", seconds * 1e6);
  if (seconds < 1) return format("%.2f ms", seconds * 1e3);
  return format("%.2f s", seconds);
}

std::string to_table(const Results& results) {
  std::size_t width = 3;
  for (const RowResult& row : results.rows) width = std::max(width, row.name.size());
  std::string text = header(results) + "\n" + pad_right("row", width) +
                     "  threads        time      IQR            rate  of limit";
  for (const std::string& name : peer_columns()) text += "  " + pad_left(name, 9);
  text += "  other\n";
  for (const RowResult& row : results.rows) {
    const CallResult* mine = ours(row);
    text += pad_right(row.name, width) + "  " + pad_left(std::to_string(row.threads), 7);
    if (mine != nullptr) {
      const Timing& t = mine->timing;
      text += "  " + pad_left(format_seconds(t.median), 10) + "  " +
              pad_left(format("%.0f%%", 100 * (t.upper_quartile - t.lower_quartile) / t.median), 7);
      text += "  " + pad_left(format_rate(row, t.median), 14) + "  " +
              pad_left(row.floor > 0 ? format("%.0f%%", 100 * row.floor / t.median) : "-", 8);
    } else {
      text += "  " + pad_left("-", 10) + "  " + pad_left("-", 7) + "  " + pad_left("-", 14) + "  " +
              pad_left("-", 8);
    }
    for (const std::string& name : peer_columns())
      text += "  " + pad_left(format_ratio(peer(row, name), mine), 9);
    const CallResult* other = peer(row, "");
    text += "  " +
            (other != nullptr ? format_ratio(other, mine) + " " + other->name : std::string("-")) +
            "\n";
  }
  text += "\n" + summary(results);
  text +=
      "Peer columns: time of the peer over ours, above 1 we are faster. IQR: spread of the middle "
      "half of the samples.\n";
  for (const std::string& sentence : results.left_out) text += "left out: " + sentence + "\n";
  return text;
}

std::string to_json(const Results& results) {
  const Machine& m = results.machine;
  nlohmann::ordered_json json = {{"machine",
                                  {{"cpu", m.cpu},
                                   {"cores", m.cores},
                                   {"isa", m.isa},
                                   {"compiler", m.compiler},
                                   {"eigen", m.eigen},
                                   {"peers", m.peers},
                                   {"load_at_start", m.load}}}};
  json["limits"] = nlohmann::ordered_json::array();
  for (const Limits& limits : results.limits) json["limits"].push_back(json_of(limits));
  json["rows"] = nlohmann::ordered_json::array();
  for (const RowResult& row : results.rows) json["rows"].push_back(json_of(row));
  json["left_out"] = results.left_out;
  return json.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace bench
