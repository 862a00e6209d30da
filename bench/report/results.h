/// \file
/// What `report` found, and the forms it is written in. `bench/results/` holds at most one JSON per
/// kind of machine.
#pragma once

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

std::string to_table(const Results& results);
std::string to_json(const Results& results);
std::string to_svg(const Results& results);

/// 1.23 us, 45.6 ms, 7.89 s.
std::string format_seconds(double seconds);
/// Text as it may stand in XML.
std::string escape_xml(const std::string& text);

}  // namespace bench
