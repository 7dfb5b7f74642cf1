#include "apps/output/output.h"

#include <fmt/format.h>
#include <unicode/uchar.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>

#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

uint32_t decode(std::string_view text, size_t bytes) {
  const auto at = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[i])); };
  switch (bytes) {
    case 1:
      return at(0);
    case 2:
      return (at(0) & 0x1f) << 6 | (at(1) & 0x3f);
    case 3:
      return (at(0) & 0x0f) << 12 | (at(1) & 0x3f) << 6 | (at(2) & 0x3f);
    default:
      return (at(0) & 0x07) << 18 | (at(1) & 0x3f) << 12 | (at(2) & 0x3f) << 6 | (at(3) & 0x3f);
  }
}

// Characters that change how their surroundings are shown, or the state of the terminal.
bool hidden(uint32_t c) {
  return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x61c || c == 0x200e || c == 0x200f ||
         (c >= 0x2028 && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f) || c == 0xfeff || c == 0x180e ||
         (c >= 0xfff9 && c <= 0xfffb) || (c >= 0xe0000 && c <= 0xe007f);
}

size_t width_of(uint32_t c) {
  if (c < 0x300) return c == 0xad ? 0 : 1;
  const auto code = static_cast<UChar32>(c);
  const auto kind = u_charType(code);
  if (kind == U_NON_SPACING_MARK || kind == U_ENCLOSING_MARK || kind == U_FORMAT_CHAR) return 0;
  if (c >= 0x1160 && c <= 0x11ff) return 0;  // vowels and finals of Hangul join the syllable before them
  const int wide = u_getIntPropertyValue(code, UCHAR_EAST_ASIAN_WIDTH);
  return wide == U_EA_WIDE || wide == U_EA_FULLWIDTH ? 2 : 1;
}

std::string make_safe(std::string_view text, bool one_line, size_t columns) {
  std::string out;
  size_t shown = 0;
  std::string escape;
  while (!text.empty()) {
    const size_t bytes = utf8_sequence_bytes(text);
    const uint32_t c = bytes == 0 ? 0 : decode(text, bytes);
    std::string_view next = text.substr(0, std::max<size_t>(bytes, 1));
    size_t width = 0;
    if (bytes == 0 || (c != '\n' && c != '\t' && hidden(c)) || ((c == '\n' || c == '\t') && one_line)) {
      if (bytes == 0)
        escape = fmt::format("\\x{:02x}", static_cast<unsigned char>(text[0]));
      else if (c == '\n' || c == '\t')
        escape = c == '\n' ? "\\n" : "\\t";
      else
        escape = c < 0x100 ? fmt::format("\\x{:02x}", c) : fmt::format("\\u{{{:04x}}}", c);
      width = escape.size();
      text.remove_prefix(next.size());
      next = escape;
    } else {
      if (columns != 0) width = width_of(c);
      text.remove_prefix(bytes);
    }
    // Marks without a width of their own are not a way around the limit.
    if (columns != 0 && (shown + width > columns || out.size() > 8 * columns + 64)) return out + "…";
    out += next;
    shown += width;
  }
  return out;
}

}  // namespace

std::string printable(std::string_view text) {
  return make_safe(text, false, 0);
}
std::string printable_line(std::string_view text, size_t columns) {
  return make_safe(text, true, columns);
}

size_t text_width(std::string_view text) {
  size_t columns = 0;
  while (!text.empty()) {
    const size_t bytes = utf8_sequence_bytes(text);
    columns += bytes == 0 ? 1 : width_of(decode(text, bytes));
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  return columns;
}

std::string csv_field(std::string_view text) {
  std::string out = printable(text);
  if (!out.empty() && std::string_view("=+-@\t").find(out[0]) != std::string_view::npos) out.insert(0, "'");
  if (out.find_first_of(",\"\n") == std::string::npos) return out;
  std::string quoted = "\"";
  for (const char c : out) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + '"';
}

void print_json(const nlohmann::json& value) {
  const std::string text = value.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  std::fwrite(text.data(), 1, text.size(), stdout);
}

Table::Table(std::vector<std::string> header, std::vector<size_t> right) : right_(std::move(right)) {
  rows_.push_back(std::move(header));
}

void Table::row(std::vector<std::string> cells) {
  PERIGEE_CHECK(cells.size() == rows_[0].size(), "{} cells, {} columns", cells.size(), rows_[0].size());
  rows_.push_back(std::move(cells));
}

void Table::print() const {
  const size_t columns = rows_[0].size();
  std::vector<size_t> widest(columns, 0);
  for (const auto& row : rows_)
    for (size_t i = 0; i < columns; ++i) widest[i] = std::max(widest[i], text_width(row[i]));
  std::string out;
  for (const auto& row : rows_) {
    for (size_t i = 0; i < columns; ++i) {
      const std::string pad(widest[i] - text_width(row[i]), ' ');
      const bool right = std::find(right_.begin(), right_.end(), i) != right_.end();
      if (right) out += pad;
      out += row[i];
      if (!right && i + 1 < columns) out += pad;
      if (i + 1 < columns) out += "  ";
    }
    out += '\n';
  }
  std::fwrite(out.data(), 1, out.size(), stdout);
}

std::string shell_word(std::string_view text) {
  const std::string shown = printable_line(text);
  const auto plain = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c & 0x80) != 0 ||
           std::string_view("@%+=:,./_-").find(c) != std::string_view::npos;
  };
  if (!shown.empty() && std::all_of(shown.begin(), shown.end(), plain)) return shown;
  std::string out = "'";
  for (const char c : shown) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

std::string counted(int64_t n, std::string_view one, std::string_view many) {
  return fmt::format("{} {}", n, n == 1 ? one : many);
}

std::string utc(int64_t us) {
  if (us == 0) return "-";
  const time_t seconds = static_cast<time_t>(us / 1000000);
  tm parts{};
  gmtime_r(&seconds, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  return text;
}

std::string duration(double seconds) {
  if (!(seconds >= 0)) return "-";
  if (seconds < 10) return fmt::format("{:.1f} s", seconds);
  const int64_t s = std::llround(seconds);
  if (s < 120) return fmt::format("{} s", s);
  if (s < 7200) return fmt::format("{} min {:02} s", s / 60, s % 60);
  return fmt::format("{} h {:02} min", s / 3600, s / 60 % 60);
}

}  // namespace perigee::apps
