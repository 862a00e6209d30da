// The parts of the report that are arithmetic and text: quantiles, floors, ratios, and output that
// other programs can read.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include <nlohmann/json.hpp>

#include "results.h"

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

TEST(ReportJson, ReadsBack) {
  bench::Results results = two_rows();
  results.machine.cpu += "\xff";  // not UTF-8
  const auto json = nlohmann::json::parse(bench::to_json(results));
  EXPECT_EQ(json.at("rows").size(), 2u);
  EXPECT_EQ(json.at("rows").at(0).at("name"), results.rows[0].name);
  EXPECT_EQ(json.at("rows").at(0).at("calls").at(2).at("times_ours"), 2.5);
  EXPECT_EQ(json.at("rows").at(0).at("calls").at(0).at("share_of_limit"), 0.5);
  EXPECT_FALSE(json.at("rows").at(1).at("calls").at(0).contains("times_ours"));
}

TEST(ReportSvg, EscapesNamesAndClosesWhatItOpens) {
  EXPECT_EQ(bench::escape_xml("a<b>&\"c\"\n"), "a&lt;b&gt;&amp;&quot;c&quot; ");
  const std::string svg = bench::to_svg(two_rows());
  EXPECT_NE(svg.find("a &lt; b &amp; &quot;c&quot;"), std::string::npos);
  EXPECT_EQ(svg.find("a < b"), std::string::npos);
  EXPECT_EQ(svg.substr(svg.size() - 7), "</svg>\n");
  EXPECT_NE(bench::to_svg(bench::Results{}).find("</svg>"), std::string::npos);
}

}  // namespace
