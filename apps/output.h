// What the commands print: text from models and tasks made safe for a terminal, tables, JSON.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace perigee::apps {

// Text as it may go to a terminal: well-formed UTF-8 passes; control characters (escape sequences among them)
// but newline and tab, C1 controls, bidirectional overrides and broken bytes become \xNN or \u{NNNN}.
std::string printable(std::string_view text);
// The same on one line: newline and tab too; at most `columns` code points, the cut shown as "…". 0: no
// limit.
std::string printable_line(std::string_view text, size_t columns = 0);

// One JSON value and a newline on standard output; broken UTF-8 becomes U+FFFD.
void print_json(const nlohmann::json& value);

// Columns as wide as their widest cell (in code points), two spaces apart; columns in `right` are
// right-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> header, std::vector<size_t> right = {});
  void row(std::vector<std::string> cells);  // REQUIRES as many as the header has
  void print() const;                        // the last column is not padded

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<size_t> right_;
};

// "2026-11-21 23:15:02" UTC, from microseconds since 1970; "-" for 0.
std::string utc(int64_t us);
// A duration: "0.8 s", "41 s", "3 min 05 s", "2 h 10 min".
std::string duration(double seconds);

}  // namespace perigee::apps
