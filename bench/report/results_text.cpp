// The table.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "results.h"

namespace bench {
namespace {

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
  std::string text = "limits, " + pad_right(thread_count(l.threads) + ":", 11);
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
  std::string text = machine_line(m) + "\n";
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
      text += "geometric mean, " + pad_right(thread_count(limits.threads) + ":", 10) + line + "\n";
  }
  return text;
}

}  // namespace

const std::vector<std::string>& peer_columns() {
  static const std::vector<std::string> columns{"Eigen", "oneDNN", "OpenBLAS", "llama.cpp",
                                                "ik_llama.cpp"};
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

std::size_t lane_of(const Results& results, const RowResult& row) {
  const auto at = std::find_if(results.limits.begin(), results.limits.end(),
                               [&](const Limits& limits) { return limits.threads == row.threads; });
  return static_cast<std::size_t>(at - results.limits.begin());
}

std::string thread_count(int threads) {
  return std::to_string(threads) + (threads == 1 ? " thread" : " threads");
}

std::string machine_line(const Machine& m) {
  return m.cpu + ", " + std::to_string(m.cores) + (m.cores == 1 ? " core" : " cores") + ", ISA " +
         m.isa + ", " + m.compiler + ", Eigen " + m.eigen;
}

std::string to_table(const Results& results) {
  std::vector<std::string> columns;
  for (const std::string& name : peer_columns())
    if (std::any_of(results.rows.begin(), results.rows.end(),
                    [&](const RowResult& row) { return peer(row, name) != nullptr; }))
      columns.push_back(name);
  std::size_t width = 3;
  for (const RowResult& row : results.rows) width = std::max(width, row.name.size());
  std::string text = header(results) + "\n" + pad_right("row", width) +
                     "  threads        time      IQR            rate  of limit";
  for (const std::string& name : columns) text += "  " + pad_left(name, 9);
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
    for (const std::string& name : columns)
      text += "  " + pad_left(format_ratio(peer(row, name), mine),
                              (std::max)(name.size(), std::size_t{9}));
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

}  // namespace bench
