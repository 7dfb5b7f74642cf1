// The `format` keyword: those that the OpenAI API knows, each as a pattern of what is written for it.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace perigee::policy {

// A pattern (pattern.h) of texts of that format, not of all of them; "" for an unknown one.
std::string format_pattern(std::string_view name);
std::vector<std::string> format_names();

}  // namespace perigee::policy
