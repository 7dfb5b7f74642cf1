// The report of a comparison: report.json, report.csv and report.html, each a function of the plan and of what was found.
#pragma once
#include <filesystem>
#include <string>

#include "apps/compare/results.h"

namespace perigee::apps::compare {

struct ReportInput {
  const Plan& plan;
  const Results& results;
  const ContextResults* context = nullptr;  // null: not measured
  std::string machine;                      // where the report was made; runs may have been made elsewhere
  std::string program;                      // the commit
  int64_t jobs = 0, threads = 0;            // jobs 0: nothing was run, or not now
  std::vector<std::string> failures;
};

nlohmann::json report_json(const ReportInput& input);
// One value a line: table, variant, task, seed, phase, key, x, value. Text as csv_field() makes it.
std::string report_csv(const ReportInput& input);
// One file that fetches nothing and runs nothing.
std::string report_html(const ReportInput& input);

// All three into a directory, whole or not at all.
void write_report(const std::filesystem::path& out, const ReportInput& input);

// "AMD EPYC, 2 cores"
std::string machine_text();

}  // namespace perigee::apps::compare
