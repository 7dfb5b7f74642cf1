// Small services on text for messages to the user.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace perigee {

// Edits between two strings: insertions, deletions, replacements and swaps of neighbours, ignoring ASCII
// case, with '-' equal to '_'. (Optimal string alignment: no part is edited twice.)
int edit_distance(std::string_view a, std::string_view b);

// The candidate nearest to name, or "" when none is near enough to be what the user meant: at most a third of
// the name's length (and at least one, at most four) edits away, or the same last component of a dotted name.
// Ties go to the first.
std::string nearest(std::string_view name, std::span<const std::string> candidates);

// "; did you mean train.lr?" or "": to append to a message.
std::string did_you_mean(std::string_view name, std::span<const std::string> candidates);

// "a, b, c"
std::string join(std::span<const std::string> parts, std::string_view separator = ", ");

// "17 B", "1.5 KiB", "91.5 GiB"
std::string human_bytes(uint64_t bytes);

// The text between double quotes for a one-line message: control characters and broken UTF-8 become \xNN, a
// long text is cut after limit bytes.
std::string quote(std::string_view text, size_t limit = 60);

// The length in bytes of the well-formed UTF-8 sequence at the start of text (RFC 3629: no surrogates, no
// overlong forms), or 0 when there is none.
size_t utf8_sequence_bytes(std::string_view text);
bool is_utf8(std::string_view text);

}  // namespace perigee
