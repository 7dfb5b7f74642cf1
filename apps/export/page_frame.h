// The frame of an exported HTML file: one file that fetches nothing, runs one script and applies one style, both named by hash
// in its content security policy.
#pragma once
#include <string>
#include <string_view>

namespace perigee::apps {

// Everything up to the content of <body>; title as text. And what ends the file.
std::string page_head(std::string_view title);
std::string page_foot();

}  // namespace perigee::apps
