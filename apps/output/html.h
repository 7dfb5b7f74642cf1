// Text put into HTML so that it stays text, whatever a policy or a tool wrote: everything that a page or an exported file
// takes from a run goes through one of these, or is set by textContent.
#pragma once
#include <nlohmann/json.hpp>

#include <string>
#include <string_view>

namespace perigee::apps {

// For the content of an element and for attribute values in quotes (of either kind). & < > " ' ` become references.
// What would not be seen as what it is becomes visible: bytes that are not UTF-8 and control characters other than
// newline and tab as \xNN, marks that turn the direction of the text around them (U+202E and the like), line separators
// and byte order marks as \u{NNNN}. Time and result are linear in the text.
// Not for the names of tags or attributes, unquoted values, URLs, styles or scripts.
std::string escape_html(std::string_view text);

// JSON that can stand inside a <script> element, as data or as an expression: ASCII only, and without <, > and &, so
// no "</script", "<!--" or "]]>" occurs in it. A JSON parser reads the value that went in; bytes that are not UTF-8
// become U+FFFD.
std::string script_json(const nlohmann::json& value);

// What allows the inline script or style with exactly these bytes in a Content-Security-Policy: 'sha256-...'.
std::string csp_hash(std::string_view text);

}  // namespace perigee::apps
