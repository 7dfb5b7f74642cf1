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
// The same on one line: newline and tab too; at most `columns` columns of a terminal, what was cut shown as a "…" after
// them. 0: no limit.
std::string printable_line(std::string_view text, size_t columns = 0);

// Columns of a terminal that text without control characters takes: 2 for a wide character (CJK, most emoji), 0 for a
// combining mark. By the Unicode tables; terminals that know an older version differ in a few characters.
size_t text_width(std::string_view text);

// One JSON value and a newline on standard output; broken UTF-8 becomes U+FFFD.
void print_json(const nlohmann::json& value);

// Columns as wide as their widest cell (text_width), two spaces apart; columns in `right` are right-aligned.
class Table {
 public:
  explicit Table(std::vector<std::string> header, std::vector<size_t> right = {});
  void row(std::vector<std::string> cells);  // REQUIRES as many as the header has
  void print() const;                        // the last column is not padded

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<size_t> right_;
};

// A field of a CSV file (RFC 4180): quoted where it holds a comma, a quote or a line break. A text that a spreadsheet
// would take for a formula (it begins with = + - @ or a tab) gets ' before it. Text as printable() makes it.
std::string csv_field(std::string_view text);

// A word of a command line as a shell takes it: in '...' where it holds anything but letters, digits and @%+=:,./_-; control
// characters as printable_line makes them.
std::string shell_word(std::string_view text);

// "1 step", "2 steps".
std::string counted(int64_t n, std::string_view one, std::string_view many);

// "2026-11-21 23:15:02" UTC, from microseconds since 1970; "-" for 0.
std::string utc(int64_t us);
// A duration: "0.8 s", "41 s", "3 min 05 s", "2 h 10 min".
std::string duration(double seconds);

}  // namespace perigee::apps
