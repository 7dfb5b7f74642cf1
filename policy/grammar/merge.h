// One schema that says what two say: for allOf, and for keywords that stand beside $ref, anyOf and oneOf.
#pragma once
#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace perigee::policy {

// Whether the list has the value, in whatever order its keys stand.
bool holds(const nlohmann::ordered_json& list, const nlohmann::ordered_json& value);

// Keywords that say nothing of values.
bool is_annotation(const std::string& keyword);

// "" and the schema in *out, or why the two cannot be merged into one: the keyword in which they differ.
std::string merge_schemas(const nlohmann::ordered_json& a, const nlohmann::ordered_json& b,
                          nlohmann::ordered_json* out);

// True when no value satisfies both schemas, as far as types, const, enum and required properties with a const or enum
// tell: what makes oneOf the same as anyOf. References are not followed.
bool are_disjoint(const nlohmann::ordered_json& a, const nlohmann::ordered_json& b);

// The types a schema names by type, const or enum: "string", ... ; all seven where it says nothing. With `implied`, a
// schema without them means what its keywords are about: one with properties means objects.
std::vector<std::string> schema_types(const nlohmann::ordered_json& schema, bool implied);

}  // namespace perigee::policy
