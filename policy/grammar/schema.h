// Compiles JSON schemas (2020-12) to rules of an automaton. What is supported: docs/structured_output.md.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>

#include "policy/grammar/automaton.h"

namespace perigee::policy {

// Adds the rule of the schema's values to the automaton. A document: "#/..." references are resolved inside of it.
// object_only: what is not an object is refused. ERRORS (input): "WHERE: #/pointer: what".
int32_t schema_rule(Automaton& a, const nlohmann::ordered_json& schema, const std::string& where,
                    bool object_only = false);
// Any JSON object.
int32_t any_object_rule(Automaton& a);

}  // namespace perigee::policy
