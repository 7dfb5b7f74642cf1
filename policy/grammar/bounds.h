// The bounds of numbers, as a schema's keywords give them. Private to the room.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <utility>

#include "policy/grammar/numbers.h"

namespace perigee::policy {

// The least and the largest integer. ERRORS (input): none is within the bounds, or a bound beyond 64 bits.
std::pair<int64_t, int64_t> integer_bounds(const nlohmann::ordered_json& schema, const std::string& path,
                                           const std::string& where);
// ERRORS (input): none is within the bounds.
NumberBounds number_bounds(const nlohmann::ordered_json& schema, const std::string& path,
                           const std::string& where);

}  // namespace perigee::policy
