// The end of a long answer.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace perigee::agents {

// text, or its beginning and a line that says how much of it is shown, together at most limit bytes. Never cuts through
// a UTF-8 sequence. REQUIRES limit >= 0.
std::string cut_output(std::string text, int64_t limit);
// The longest beginning of at most limit bytes that does not cut through a UTF-8 sequence.
std::string_view beginning(std::string_view text, size_t limit);

}  // namespace perigee::agents
