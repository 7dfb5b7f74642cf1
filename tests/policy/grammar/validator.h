// A JSON schema checker that shares nothing with the compiler: it walks values, not bytes.
#pragma once
#include <nlohmann/json.hpp>

#include <string>

namespace perigee::policy {

// "" or what is wrong: "#/a/0: not a number".
std::string schema_violation(const nlohmann::ordered_json& schema, const nlohmann::ordered_json& value);

// "" or why the text is not one of the form that docs/structured_output.md promises: one JSON value, UTF-8, no key
// twice, at most one space after ',' and ':' and no other white space.
std::string form_violation(const std::string& text);

}  // namespace perigee::policy
