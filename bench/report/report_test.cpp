// The parts of the report that are arithmetic and text: quantiles, floors, ratios, and output that
// other programs can read.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "results.h"
#include "svg.h"

namespace {

bench::Limits round_limits() {
  bench::Limits limits;
  limits.l2_bytes = 1e6;
  limits.l3_bytes = 1e7;
  limits.read = {100, 50, 10};
  limits.write = {80, 40, 5};
  limits.copy = {120, 60, 12};
  limits.float_fma = 1000;
  limits.bfloat16 = 4000;
  return limits;
}

bench::Results two_rows() {
  bench::Results results;
  results.machine = {"A \"CPU\" <1> & more", 2, "avx2", "GCC", "3.4.0", {"oneDNN 2.6.3"}, 0};
  results.limits = {round_limits()};
  bench::RowResult row;
  row.operator_name = "compare";
  row.name = "a < b & \"c\"";
  row.limit = bench::Limit::read_bytes(100);
  row.floor = 1.0;
  row.calls = {{"eigenformer", bench::timing_of({2.0, 2.0, 2.0})},
               {"Eigen one way", bench::timing_of({6.0})},
               {"Eigen another way", bench::timing_of({5.0})},
               {"plain loop", bench::timing_of({1.0})}};
  results.rows = {row};
  row.name = "peers only";
  row.calls = {{"oneDNN", bench::timing_of({4.0})}};
  results.rows.push_back(row);
  results.left_out = {"somebody, because"};
  return results;
}

TEST(ReportStatistics, QuantilesInterpolate) {
  EXPECT_EQ(bench::median({}), 0);
  EXPECT_EQ(bench::median({3}), 3);
  EXPECT_EQ(bench::median({4, 1}), 2.5);
  const bench::Timing timing = bench::timing_of({5, 1, 4, 2, 3});
  EXPECT_EQ(timing.median, 3);
  EXPECT_EQ(timing.lower_quartile, 2);
  EXPECT_EQ(timing.upper_quartile, 4);
  EXPECT_EQ(timing.samples, 5u);
}

TEST(ReportFloor, TakesTheLevelThatHoldsTheFootprint) {
  const bench::Limits limits = round_limits();
  EXPECT_DOUBLE_EQ(bench::floor_seconds(bench::Limit::read_bytes(5e5), limits), 5e5 / 100);
  EXPECT_DOUBLE_EQ(bench::floor_seconds(bench::Limit::read_bytes(4e6), limits), 4e6 / 50);
  EXPECT_DOUBLE_EQ(bench::floor_seconds(bench::Limit::write_bytes(4e7), limits), 4e7 / 5);
  EXPECT_DOUBLE_EQ(
      bench::floor_seconds(bench::Limit::read_bytes(5e5).rotating_through(1e9), limits), 5e5 / 10);
  // 2e7 bytes read and written, and 1e7 more read: a copy of 4e7 bytes, then reads.
  EXPECT_DOUBLE_EQ(bench::floor_seconds(bench::Limit::copy_bytes(3e7, 2e7), limits),
                   std::max(2e7 / 5, 4e7 / 12 + 1e7 / 10));
}

TEST(ReportFloor, TakesThePeakOfTheInstructionOrFloats) {
  const bench::Limits limits = round_limits();
  EXPECT_DOUBLE_EQ(bench::floor_seconds(bench::Limit::product(1e9, 8), limits), 1e6);
  EXPECT_DOUBLE_EQ(
      bench::floor_seconds(bench::Limit::product(1e9, 8, bench::Peak::bfloat16), limits),
      1e9 / 4000);
  EXPECT_DOUBLE_EQ(bench::floor_seconds(bench::Limit::product(1e9, 8, bench::Peak::int8), limits),
                   1e6);
}

TEST(ReportTable, RatioIsTheFastestPeerOverOurs) {
  const bench::Results results = two_rows();
  EXPECT_EQ(bench::peer(results.rows[0], "Eigen")->name, "Eigen another way");
  EXPECT_EQ(bench::peer(results.rows[0], "")->name, "plain loop");
  EXPECT_EQ(bench::peer(results.rows[0], "OpenBLAS"), nullptr);
  EXPECT_EQ(bench::ours(results.rows[1]), nullptr);
  const std::string table = bench::to_table(results);
  for (const char* fragment :
       {"2.50", "0.50 plain loop", "50%", "OpenBLAS was not found", "left out: somebody, because"})
    EXPECT_NE(table.find(fragment), std::string::npos) << fragment << "\n" << table;
}

TEST(ReportTable, SecondsHaveAUnit) {
  EXPECT_EQ(bench::format_seconds(1.234e-6), "1.23 us");
  EXPECT_EQ(bench::format_seconds(0.0456), "45.60 ms");
  EXPECT_EQ(bench::format_seconds(7.5), "7.50 s");
}

TEST(ReportJson, IsWhatOtherProgramsRead) {
  bench::Results results = two_rows();
  results.machine.cpu += "\xff";  // not UTF-8
  const auto json = nlohmann::json::parse(bench::to_json(results));
  EXPECT_EQ(json.at("rows").size(), 2u);
  EXPECT_EQ(json.at("rows").at(0).at("name"), results.rows[0].name);
  EXPECT_EQ(json.at("rows").at(0).at("calls").at(2).at("times_ours"), 2.5);
  EXPECT_EQ(json.at("rows").at(0).at("calls").at(0).at("share_of_limit"), 0.5);
  EXPECT_FALSE(json.at("rows").at(1).at("calls").at(0).contains("times_ours"));
}

TEST(ReportJson, OneRowIsOneLine) {
  bench::Results results = two_rows();
  results.rows[0].name = "two\nlines";
  for (std::string text : {bench::to_json(results), bench::to_json(bench::Results{})})
    EXPECT_TRUE(nlohmann::json::accept(text)) << text;
  std::istringstream lines(bench::to_json(results));
  std::size_t rows = 0;
  for (std::string line; std::getline(lines, line);)
    if (line.find("\"operator\"") != std::string::npos) {
      ++rows;
      if (line.back() == ',') line.pop_back();
      EXPECT_TRUE(nlohmann::json::accept(line)) << line;
    }
  EXPECT_EQ(rows, results.rows.size());
}

void expect_same_figures(const bench::Results& a, const bench::Results& b, double tolerance) {
  const auto near = [&](double x, double y) { EXPECT_NEAR(x, y, tolerance * std::abs(x)); };
  EXPECT_EQ(a.machine.cpu, b.machine.cpu);
  EXPECT_EQ(a.machine.peers, b.machine.peers);
  EXPECT_EQ(a.left_out, b.left_out);
  ASSERT_EQ(a.limits.size(), b.limits.size());
  for (std::size_t i = 0; i < a.limits.size(); ++i) {
    EXPECT_EQ(a.limits[i].threads, b.limits[i].threads);
    near(a.limits[i].copy.l3, b.limits[i].copy.l3);
    near(a.limits[i].bfloat16, b.limits[i].bfloat16);
  }
  ASSERT_EQ(a.rows.size(), b.rows.size());
  for (std::size_t i = 0; i < a.rows.size(); ++i) {
    const bench::RowResult &x = a.rows[i], &y = b.rows[i];
    EXPECT_EQ(x.operator_name, y.operator_name);
    EXPECT_EQ(x.name, y.name);
    EXPECT_EQ(x.threads, y.threads);
    EXPECT_EQ(x.bound_by_memory, y.bound_by_memory);
    near(x.limit.bytes_read, y.limit.bytes_read);
    near(x.limit.bytes_written, y.limit.bytes_written);
    near(x.limit.operations, y.limit.operations);
    near(x.floor, y.floor);
    ASSERT_EQ(x.calls.size(), y.calls.size());
    for (std::size_t call = 0; call < x.calls.size(); ++call) {
      EXPECT_EQ(x.calls[call].name, y.calls[call].name);
      EXPECT_EQ(x.calls[call].timing.samples, y.calls[call].timing.samples);
      near(x.calls[call].timing.median, y.calls[call].timing.median);
      near(x.calls[call].timing.lower_quartile, y.calls[call].timing.lower_quartile);
      near(x.calls[call].timing.upper_quartile, y.calls[call].timing.upper_quartile);
    }
  }
}

TEST(ReportJson, ReadsBackToFourDigits) {
  bench::Results results = two_rows();
  results.limits[0].copy.l3 = 277359020210.23047;
  results.rows[0].limit = {536870912, 67108864, 1.0 / 3, bench::Peak::float_fma};
  results.rows[0].bound_by_memory = false;
  results.rows[0].floor = 0.01265597425;
  results.rows[0].calls[0].timing = {0.014000111, 0.013830727, 0.014070326, 25};
  const std::string text = bench::to_json(results);
  const bench::Results read = bench::from_json(text);
  expect_same_figures(results, read, 5e-4);
  EXPECT_EQ(read.rows[0].floor, 0.01266);
  EXPECT_EQ(bench::to_json(read), text);  // what is written again does not change
}

TEST(ReportJson, RefusesWhatIsNoResults) {
  for (const char* text : {"", "{", "[]", "{\"machine\": 1}", "{\"rows\": []}"})
    EXPECT_THROW(bench::from_json(text), std::invalid_argument) << text;
}

/// What is wrong with the XML, empty where every element closes, attributes are quoted and no
/// character stands bare that must not. Knows what the charts use, not all of XML.
std::string xml_error(const std::string& xml) {
  static const std::regex tag(
      R"re(<(/?)([a-z]+)((?: [A-Za-z0-9]+="[^"<]*")*)(/?)>|&(amp|lt|gt|quot);|[^<&]+)re");
  std::vector<std::string> open;
  std::size_t at = 0;
  for (std::sregex_iterator i(xml.begin(), xml.end(), tag), end; i != end; ++i) {
    if (static_cast<std::size_t>(i->position()) != at) break;
    at += static_cast<std::size_t>(i->length());
    const std::string name = (*i)[2];
    if (name.empty() || (*i)[4].length() > 0) continue;
    if ((*i)[1].length() == 0) {
      open.push_back(name);
    } else {
      if (open.empty() || open.back() != name) return "</" + name + "> closes nothing";
      open.pop_back();
    }
  }
  if (at != xml.size()) return "not XML from here on: " + xml.substr(at, 60);
  return open.empty() ? "" : "<" + open.back() + "> does not close";
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t times = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size())
    ++times;
  return times;
}

TEST(ReportSvg, XmlErrorsAreSeen) {
  EXPECT_EQ(xml_error("<svg a=\"1\"><b/>x &lt; y</svg>\n"), "");
  for (const char* broken : {"<svg>", "<a></b>", "<a b=1/>", "<a>&</a>", "<a>1 < 2</a>", "</a>"})
    EXPECT_NE(xml_error(broken), "") << broken;
}

TEST(ReportSvg, EscapesNamesAndClosesWhatItOpens) {
  EXPECT_EQ(bench::svg::escape("a<b>&\"c\"\n"), "a&lt;b&gt;&amp;&quot;c&quot; ");
  for (const auto& draw : {bench::to_limits_svg, bench::to_peers_svg}) {
    const std::string svg = draw(two_rows());
    EXPECT_EQ(xml_error(svg), "");
    EXPECT_NE(svg.find("a &lt; b &amp; &quot;c&quot;"), std::string::npos);
    EXPECT_EQ(xml_error(draw(bench::Results{})), "");
  }
}

TEST(ReportSvg, OneBarForEachCaseAndPeer) {
  bench::Results results = two_rows();
  // The row has Eigen, of which the faster way counts, and a plain loop; the other row has no ours.
  EXPECT_EQ(count(bench::to_peers_svg(results), "<rect class=\"bar "), 2u);
  bench::RowResult row = results.rows[0];
  row.threads = 2;
  row.calls.push_back({"oneDNN", bench::timing_of({4.0})});
  results.limits.push_back(round_limits());
  results.limits[1].threads = 2;
  results.rows.push_back(row);
  row.name = "nobody to compare with";
  row.calls.resize(1);
  results.rows.push_back(row);
  const std::string svg = bench::to_peers_svg(results);
  EXPECT_EQ(xml_error(svg), "");
  EXPECT_EQ(count(svg, "<rect class=\"bar "), 5u);
  EXPECT_EQ(count(svg, "<rect class=\"bar good"), 3u);  // Eigen twice, oneDNN
  EXPECT_EQ(count(svg, "<rect class=\"bar bad"), 2u);   // the plain loop is faster
  EXPECT_EQ(count(svg, ">0.50</text>"), 2u);
  EXPECT_EQ(count(svg, ">oneDNN 2.6.3</text>"), 1u);
  EXPECT_EQ(count(svg, ">plain loop</text>"), 1u);
  EXPECT_EQ(svg.find("nobody to compare with"), std::string::npos);
  EXPECT_EQ(count(svg, "a &lt; b"), 1u);  // one line for all numbers of threads
}

TEST(ReportSvg, ABarBeyondTheAxisKeepsItsNumber) {
  bench::Results results = two_rows();
  results.rows[0].calls[3].timing = bench::timing_of({246.8});
  EXPECT_EQ(count(bench::to_peers_svg(results), "\u00bb 123</text>"), 1u);
  results.rows[0].calls[3].timing = bench::timing_of({0.0063});
  EXPECT_EQ(count(bench::to_peers_svg(results), "\u00ab 0.003</text>"), 1u);
}

TEST(ReportRows, AnOperatorIsNamedByItsFile) {
  const auto name_of = [](const char* file) {
    bench::Registration(file, "cases", nullptr);
    const std::string name = bench::registered_cases().back().operator_name;
    bench::registered_cases().pop_back();
    return name;
  };
  EXPECT_EQ(name_of("/a/bench/operators/kv_cache_bench.cpp"), "kv_cache");
  EXPECT_EQ(name_of("linear_bench.cpp"), "linear");
}

}  // namespace
