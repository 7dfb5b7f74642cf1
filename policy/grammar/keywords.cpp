#include "policy/grammar/keywords.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "policy/grammar/merge.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

const std::vector<std::string> kTypes = {"object", "array", "string", "integer", "number", "boolean", "null"};

}  // namespace

std::string pointer(const std::string& path, std::string_view key) {
  std::string out = path + "/";
  for (char c : key) out += c == '~' ? "~0" : c == '/' ? "~1" : std::string(1, c);
  return out;
}

std::string item_pointer(const std::string& path, std::string_view key, size_t i) {
  return fmt::format("{}/{}", pointer(path, key), i);
}

std::string brief(const ordered_json& v) {
  return quote(v.dump(-1, ' ', false, ordered_json::error_handler_t::replace));
}

void refuse_schema(const std::string& where, const std::string& path, std::string_view what) {
  const std::string shown = quote(path, 200);
  throw_input("{}: {}: {}", where, shown.substr(1, shown.rfind('"') - 1), what);
}

void check_keywords(const ordered_json& s, const std::string& path, const std::string& where) {
  const auto fail = [&](const std::string& at, std::string_view what) { refuse_schema(where, at, what); };
  const auto whole = [&](const std::string& k, const ordered_json& v) {
    const bool ok =
        v.is_number_unsigned() || (v.is_number_integer() && v.get<int64_t>() >= 0) ||
        (v.is_number_float() && v.get<double>() >= 0 && v.get<double>() == std::floor(v.get<double>()));
    if (!ok) fail(pointer(path, k), "a whole number from 0 is expected");
  };
  const auto expect = [&](const std::string& k, bool ok, std::string_view what) {
    if (!ok) fail(pointer(path, k), fmt::format("{} is expected", what));
  };
  for (const auto& [k, v] : s.items()) {
    if (is_annotation(k)) continue;
    if (k == "type" || k == "const") continue;
    if (k == "enum" || k == "anyOf" || k == "oneOf" || k == "allOf" || k == "prefixItems")
      expect(k, v.is_array() && (!v.empty() || k == "prefixItems"), "a list that is not empty");
    else if (k == "required")
      expect(k, v.is_array() && std::all_of(v.begin(), v.end(), [](const auto& x) { return x.is_string(); }),
             "a list of texts");
    else if (k == "properties")
      expect(k, v.is_object(), "an object of schemas");
    else if (k == "additionalProperties" || k == "items")
      expect(k, v.is_object() || v.is_boolean(), "a schema");
    else if (k == "minItems" || k == "maxItems" || k == "minLength" || k == "maxLength")
      whole(k, v);
    else if (k == "minimum" || k == "maximum" || k == "exclusiveMinimum" || k == "exclusiveMaximum")
      expect(k, v.is_number(), "a number");
    else if (k == "pattern" || k == "format" || k == "$ref")
      expect(k, v.is_string(), "a text");
    else if (k == "uniqueItems" && v == false)
      continue;
    else
      fail(pointer(path, k), "this keyword is not supported");
  }
  if (!s.contains("type")) return;
  const ordered_json& t = s["type"];
  const ordered_json list = t.is_array() ? t : ordered_json::array({t});
  for (const auto& x : list) {
    if (!x.is_string() || std::find(kTypes.begin(), kTypes.end(), x.get<std::string>()) == kTypes.end())
      fail(pointer(path, "type"), fmt::format("{} is no type; types are {}", brief(x), join(kTypes)));
  }
}

}  // namespace perigee::policy
