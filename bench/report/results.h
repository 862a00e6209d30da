/// \file
/// What `report` found, and the forms it is written in. `bench/results/` holds at most one JSON per
/// kind of machine.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "machine.h"
#include "machine_limits.h"
#include "statistics.h"

namespace bench {

struct CallResult {
  std::string name;
  Timing timing;
};

/// One row on one number of threads.
struct RowResult {
  std::string operator_name;
  std::string name;
  int threads = 1;
  Limit limit;
  double floor = 0;               ///< seconds, at the limits measured for this number of threads
  bool bound_by_memory = true;    ///< which of the two the floor is
  std::vector<CallResult> calls;  ///< ours first, where it ran
};

struct Results {
  Machine machine;
  std::vector<Limits> limits;  ///< for one thread, and for all where there are more
  std::vector<RowResult> rows;
  std::vector<std::string> left_out;  ///< sentences: which call of which row, and why
};

/// Ours, or nullptr where it did not run.
const CallResult* ours(const RowResult& row);
/// The fastest peer whose name begins with `name`, or nullptr. An empty name means all peers that
/// have no column of their own.
const CallResult* peer(const RowResult& row, const std::string& name);
/// Names that have a column of their own.
const std::vector<std::string>& peer_columns();

/// The place of the row's number of threads in results.limits.
std::size_t lane_of(const Results& results, const RowResult& row);

std::string to_table(const Results& results);
/// One row per line, figures with four significant digits.
std::string to_json(const Results& results);
/// What to_json wrote. Throws std::invalid_argument for anything else.
Results from_json(const std::string& text);
/// For each row the percentage of this machine's limit.
std::string to_limits_svg(const Results& results);
/// For each row the time of each peer over ours.
std::string to_peers_svg(const Results& results);

/// What the figures were measured on, without the peers.
std::string machine_line(const Machine& machine);
/// "1 thread", "2 threads".
std::string thread_count(int threads);

}  // namespace bench
