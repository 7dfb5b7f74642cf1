// The keywords of a schema: which there are, of what form, and how what is wrong with one is told. Private to the room.
#pragma once
#include <nlohmann/json.hpp>

#include <cstddef>
#include <string>
#include <string_view>

namespace perigee::policy {

// JSON pointers as fragments: "#/properties/a~1b", "#/anyOf/2".
std::string pointer(const std::string& path, std::string_view key);
std::string item_pointer(const std::string& path, std::string_view key, size_t i);

// A value on one line, in quotes, cut when long.
std::string brief(const nlohmann::ordered_json& value);

// Throws "WHERE: PATH: what" as an input error.
[[noreturn]] void refuse_schema(const std::string& where, const std::string& path, std::string_view what);

// ERRORS (input): a keyword that is not supported or has a value of another form. REQUIRES an object.
void check_keywords(const nlohmann::ordered_json& schema, const std::string& path, const std::string& where);

}  // namespace perigee::policy
