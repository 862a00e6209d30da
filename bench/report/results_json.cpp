// The JSON of results: one row per line, and four significant digits, which is more than a timing
// repeats.
#include <cstdlib>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "results.h"

namespace bench {
namespace {

using Json = nlohmann::ordered_json;

double four_digits(double value) { return std::strtod(format("%.4g", value).c_str(), nullptr); }

Json json_of(const Bandwidth& b) {
  return {{"l2", four_digits(b.l2)}, {"l3", four_digits(b.l3)}, {"dram", four_digits(b.dram)}};
}

Json json_of(const Machine& m) {
  return {{"cpu", m.cpu},
          {"cores", m.cores},
          {"isa", m.isa},
          {"compiler", m.compiler},
          {"eigen", m.eigen},
          {"peers", m.peers},
          {"load_at_start", four_digits(m.load)}};
}

Json json_of(const Limits& l) {
  return {{"threads", l.threads},
          {"l2_bytes", four_digits(l.l2_bytes)},
          {"l3_bytes", four_digits(l.l3_bytes)},
          {"read_bytes_per_second", json_of(l.read)},
          {"write_bytes_per_second", json_of(l.write)},
          {"copy_bytes_per_second", json_of(l.copy)},
          {"float_operations_per_second", four_digits(l.float_fma)},
          {"bfloat16_operations_per_second", four_digits(l.bfloat16)},
          {"int8_operations_per_second", four_digits(l.int8)},
          {"dot_instruction", l.dot_instruction}};
}

/// share_of_limit and times_ours are quotients of the figures as they stand here.
Json json_of(const RowResult& row) {
  const auto seconds = [](const CallResult& call) { return four_digits(call.timing.median); };
  const double floor = four_digits(row.floor);
  const CallResult* mine = ours(row);
  Json calls = Json::array();
  for (const CallResult& call : row.calls) {
    Json entry = {{"name", call.name},
                  {"seconds", seconds(call)},
                  {"lower_quartile", four_digits(call.timing.lower_quartile)},
                  {"upper_quartile", four_digits(call.timing.upper_quartile)},
                  {"samples", call.timing.samples}};
    if (floor > 0) entry["share_of_limit"] = four_digits(floor / seconds(call));
    if (mine != nullptr && &call != mine)
      entry["times_ours"] = four_digits(seconds(call) / seconds(*mine));
    calls.push_back(std::move(entry));
  }
  return {{"operator", row.operator_name},
          {"name", row.name},
          {"threads", row.threads},
          {"bytes_read", four_digits(row.limit.bytes_read)},
          {"bytes_written", four_digits(row.limit.bytes_written)},
          {"operations", four_digits(row.limit.operations)},
          {"floor_seconds", floor},
          {"bound_by", row.bound_by_memory ? "memory" : "arithmetic"},
          {"calls", std::move(calls)}};
}

Json json_of(const std::string& sentence) { return sentence; }

std::string on_one_line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

/// An array, one item a line.
template <typename Item>
std::string lines_of(const std::vector<Item>& items) {
  std::string text;
  for (const Item& item : items)
    text += (text.empty() ? "\n  " : ",\n  ") + on_one_line(json_of(item));
  return "[" + text + (text.empty() ? "]" : "\n ]");
}

Bandwidth bandwidth_from(const Json& json) {
  return {json.at("l2"), json.at("l3"), json.at("dram")};
}

Limits limits_from(const Json& json) {
  Limits l;
  l.threads = json.at("threads");
  l.l2_bytes = json.at("l2_bytes");
  l.l3_bytes = json.at("l3_bytes");
  l.read = bandwidth_from(json.at("read_bytes_per_second"));
  l.write = bandwidth_from(json.at("write_bytes_per_second"));
  l.copy = bandwidth_from(json.at("copy_bytes_per_second"));
  l.float_fma = json.at("float_operations_per_second");
  l.bfloat16 = json.at("bfloat16_operations_per_second");
  l.int8 = json.at("int8_operations_per_second");
  l.dot_instruction = json.at("dot_instruction");
  return l;
}

RowResult row_from(const Json& json) {
  RowResult row;
  row.operator_name = json.at("operator");
  row.name = json.at("name");
  row.threads = json.at("threads");
  row.limit.bytes_read = json.at("bytes_read");
  row.limit.bytes_written = json.at("bytes_written");
  row.limit.operations = json.at("operations");
  row.floor = json.at("floor_seconds");
  row.bound_by_memory = json.at("bound_by") == "memory";
  for (const Json& call : json.at("calls"))
    row.calls.push_back({call.at("name"),
                         {call.at("seconds"), call.at("lower_quartile"), call.at("upper_quartile"),
                          call.at("samples")}});
  return row;
}

}  // namespace

std::string to_json(const Results& results) {
  return "{\n \"machine\": " + on_one_line(json_of(results.machine)) +
         ",\n \"limits\": " + lines_of(results.limits) + ",\n \"rows\": " + lines_of(results.rows) +
         ",\n \"left_out\": " + lines_of(results.left_out) + "\n}\n";
}

Results from_json(const std::string& text) {
  try {
    const Json json = Json::parse(text);
    const Json& m = json.at("machine");
    Results results;
    results.machine = {m.at("cpu"),   m.at("cores"), m.at("isa"),          m.at("compiler"),
                       m.at("eigen"), m.at("peers"), m.at("load_at_start")};
    for (const Json& limits : json.at("limits")) results.limits.push_back(limits_from(limits));
    for (const Json& row : json.at("rows")) results.rows.push_back(row_from(row));
    results.left_out = json.at("left_out").get<std::vector<std::string>>();
    return results;
  } catch (const nlohmann::json::exception& error) {
    throw std::invalid_argument(std::string("not results of report: ") + error.what());
  }
}

}  // namespace bench
