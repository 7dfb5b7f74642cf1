#include "policy/grammar/merge.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

// Whatever the order of their keys.
bool same(const ordered_json& a, const ordered_json& b) {
  return a == b || (a.is_structured() && b.is_structured() && nlohmann::json(a) == nlohmann::json(b));
}

ordered_json merged_types(const ordered_json& a, const ordered_json& b) {
  const auto list = [](const ordered_json& t) { return t.is_array() ? t : ordered_json::array({t}); };
  ordered_json out = ordered_json::array();
  const ordered_json x = list(a), y = list(b);
  for (const auto& t : x)
    if (holds(y, t) || (t == "integer" && holds(y, "number"))) out.push_back(t);
  for (const auto& t : y)
    if (t == "integer" && holds(x, "number") && !holds(out, t)) out.push_back(t);
  return out;
}

bool among(const std::string& k, std::initializer_list<std::string_view> list) {
  return std::find(list.begin(), list.end(), k) != list.end();
}

// Keywords of which the larger, or the smaller, of two says what both say.
bool is_lower_bound(const std::string& k) {
  return among(k, {"minimum", "exclusiveMinimum", "minLength", "minItems"});
}
bool is_upper_bound(const std::string& k) {
  return among(k, {"maximum", "exclusiveMaximum", "maxLength", "maxItems"});
}

// The values of const or enum, or null.
ordered_json values_of(const ordered_json& schema) {
  if (!schema.is_object()) return nullptr;
  if (schema.contains("const")) return ordered_json::array({schema["const"]});
  if (schema.contains("enum") && schema["enum"].is_array()) return schema["enum"];
  return nullptr;
}

std::string type_of(const ordered_json& v) {
  switch (v.type()) {
    case ordered_json::value_t::null:
      return "null";
    case ordered_json::value_t::boolean:
      return "boolean";
    case ordered_json::value_t::string:
      return "string";
    case ordered_json::value_t::array:
      return "array";
    case ordered_json::value_t::object:
      return "object";
    case ordered_json::value_t::number_float:
      return "number";
    default:
      return "integer";
  }
}

}  // namespace

bool holds(const ordered_json& list, const ordered_json& value) {
  return std::any_of(list.begin(), list.end(), [&](const ordered_json& x) { return same(x, value); });
}

bool is_annotation(const std::string& k) {
  return among(k, {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly",
                   "writeOnly", "$schema", "$id", "$defs", "definitions"});
}

std::string merge_schemas(const ordered_json& a, const ordered_json& b, ordered_json* out) {
  if (a.is_boolean() || b.is_boolean()) {
    *out = a == true ? b : b == true ? a : ordered_json(false);
    return "";
  }
  if (!a.is_object() || !b.is_object()) return "a schema that is no object";
  // Declared properties of one side are undeclared ones of the other.
  const bool closed = (a.contains("additionalProperties") && a["additionalProperties"] != true) ||
                      (b.contains("additionalProperties") && b["additionalProperties"] != true);
  if (closed) {
    const auto keys = [](const ordered_json& s) {
      std::set<std::string> k;
      if (s.contains("properties") && s["properties"].is_object())
        for (const auto& [name, unused] : s["properties"].items()) k.insert(name);
      return k;
    };
    const auto x = keys(a), y = keys(b);
    if (x != y && (!y.empty() || b.contains("additionalProperties")) &&
        (!x.empty() || a.contains("additionalProperties")))
      return "additionalProperties";
  }
  // Items after the prefix of the one are all items of the other.
  const auto prefix = [](const ordered_json& s) { return s.contains("prefixItems") ? s["prefixItems"].size() : 0; };
  const ordered_json& shorter = prefix(a) < prefix(b) ? a : b;
  const auto says_nothing = [](const ordered_json& s) { return s == true || s == ordered_json::object(); };
  if (prefix(a) != prefix(b) && shorter.contains("items") && !says_nothing(shorter["items"])) return "items";
  ordered_json r = a;
  for (const auto& [k, v] : b.items()) {
    if (!r.contains(k)) {
      r[k] = v;
      continue;
    }
    ordered_json& mine = r[k];
    if (mine == v || is_annotation(k)) continue;
    if (k == "type") {
      mine = merged_types(mine, v);
    } else if (k == "required" && mine.is_array() && v.is_array()) {
      for (const auto& name : v)
        if (!holds(mine, name)) mine.push_back(name);
    } else if (k == "properties" && mine.is_object() && v.is_object()) {
      for (const auto& [name, schema] : v.items()) {
        if (!mine.contains(name)) {
          mine[name] = schema;
          continue;
        }
        ordered_json both;
        if (const std::string why = merge_schemas(mine[name], schema, &both); !why.empty()) return why;
        mine[name] = both;
      }
    } else if (k == "items" || k == "additionalProperties") {
      ordered_json both;
      if (const std::string why = merge_schemas(mine, v, &both); !why.empty()) return why;
      mine = both;
    } else if (is_lower_bound(k) && mine.is_number() && v.is_number()) {
      if (v > mine) mine = v;
    } else if (is_upper_bound(k) && mine.is_number() && v.is_number()) {
      if (v < mine) mine = v;
    } else if (k == "enum" && mine.is_array() && v.is_array()) {
      ordered_json both = ordered_json::array();
      for (const auto& x : mine)
        if (holds(v, x)) both.push_back(x);
      mine = both;
    } else {
      return k;
    }
  }
  *out = std::move(r);
  return "";
}

std::vector<std::string> schema_types(const ordered_json& s, bool implied) {
  const std::vector<std::string> all = {"object", "array", "string", "integer", "number", "boolean", "null"};
  if (!s.is_object()) return all;
  if (const ordered_json v = values_of(s); !v.is_null()) {
    std::vector<std::string> out;
    for (const auto& x : v) out.push_back(type_of(x));
    return out;
  }
  if (s.contains("type")) {
    std::vector<std::string> out;
    const ordered_json list = s["type"].is_array() ? s["type"] : ordered_json::array({s["type"]});
    for (const auto& t : list)
      if (t.is_string()) out.push_back(t.get<std::string>());
    return out;
  }
  if (!implied) return all;
  const auto has = [&](std::initializer_list<const char*> keys) {
    return std::any_of(keys.begin(), keys.end(), [&](const char* k) { return s.contains(k); });
  };
  std::vector<std::string> out;
  if (has({"properties", "required", "additionalProperties"})) out.push_back("object");
  if (has({"items", "prefixItems", "minItems", "maxItems"})) out.push_back("array");
  if (has({"minLength", "maxLength", "pattern", "format"})) out.push_back("string");
  if (has({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})) out.push_back("number");
  return out.empty() ? all : out;
}

bool are_disjoint(const ordered_json& a, const ordered_json& b) {
  if (a == false || b == false) return true;
  if (!a.is_object() || !b.is_object()) return false;
  if (a.contains("$ref") || b.contains("$ref")) return false;
  const ordered_json x = values_of(a), y = values_of(b);
  if (!x.is_null() && !y.is_null())
    return std::none_of(x.begin(), x.end(), [&](const ordered_json& v) { return holds(y, v); });
  const auto types_a = schema_types(a, false), types_b = schema_types(b, false);
  const auto numeric = [](const std::string& t) { return t == "integer" || t == "number"; };
  const auto shared = [&](const std::string& t) {
    return std::any_of(types_b.begin(), types_b.end(),
                       [&](const std::string& u) { return t == u || (numeric(t) && numeric(u)); });
  };
  if (std::none_of(types_a.begin(), types_a.end(), shared)) return true;
  const auto only_objects = [](const std::vector<std::string>& t) {
    return std::all_of(t.begin(), t.end(), [](const std::string& u) { return u == "object"; });
  };
  if (!only_objects(types_a) || !only_objects(types_b) || !x.is_null() || !y.is_null()) return false;
  // A property that both ask for and that cannot be the same.
  const auto asks = [](const ordered_json& s, const std::string& name) {
    return s.contains("required") && s["required"].is_array() && holds(s["required"], name) &&
           s.contains("properties") && s["properties"].is_object() && s["properties"].contains(name);
  };
  if (!a.contains("properties") || !a["properties"].is_object()) return false;
  for (const auto& [name, schema] : a["properties"].items())
    if (asks(a, name) && asks(b, name) && are_disjoint(schema, b["properties"][name])) return true;
  return false;
}

}  // namespace perigee::policy
