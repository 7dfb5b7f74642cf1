#include "agents/tools/output.h"

#include <fmt/format.h>

#include "base/error.h"

namespace perigee::agents {

std::string_view beginning(std::string_view text, size_t limit) {
  if (text.size() <= limit) return text;
  size_t end = limit;
  // Back over at most three continuation bytes; what is no UTF-8 anyway is cut where it is.
  for (int back = 0; back < 3 && end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80; ++back)
    --end;
  if ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) end = limit;
  return text.substr(0, end);
}

std::string cut_output(std::string text, int64_t limit) {
  PERIGEE_CHECK(limit >= 0, "limit {}", limit);
  const size_t room = static_cast<size_t>(limit);
  if (text.size() <= room) return text;
  const auto note = [&](size_t shown) {
    return fmt::format("\n[cut: the first {} of {} bytes]", shown, text.size());
  };
  const size_t reserve = note(text.size()).size();
  if (room < reserve) return std::string(beginning(text, room));
  const std::string_view shown = beginning(text, room - reserve);
  return std::string(shown) + note(shown.size());
}

}  // namespace perigee::agents
