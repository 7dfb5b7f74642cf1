#include "tests/policy/grammar/validator.h"

#include <algorithm>
#include <cmath>
#include <regex>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

int64_t code_points(const std::string& s) {
  return std::count_if(s.begin(), s.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

// By code point.
std::wstring wide(const std::string& s) {
  std::wstring out;
  for (size_t i = 0; i < s.size();) {
    const size_t n = utf8_sequence_bytes(std::string_view(s).substr(i));
    uint32_t c = n == 1 ? static_cast<uint8_t>(s[i]) : static_cast<uint8_t>(s[i]) & (0x7Fu >> n);
    for (size_t k = 1; k < n; ++k) c = c << 6 | (static_cast<uint8_t>(s[i + k]) & 0x3F);
    out += static_cast<wchar_t>(c);
    i += n;
  }
  return out;
}

bool is_type(const std::string& t, const ordered_json& v) {
  if (t == "object") return v.is_object();
  if (t == "array") return v.is_array();
  if (t == "string") return v.is_string();
  if (t == "boolean") return v.is_boolean();
  if (t == "null") return v.is_null();
  if (t == "number") return v.is_number();
  return v.is_number_integer() || (v.is_number_float() && v.get<double>() == std::floor(v.get<double>()));
}

std::string check(const ordered_json& root, const ordered_json& s, const ordered_json& v,
                  const std::string& at) {
  const auto wrong = [&](const std::string& what) { return at + ": " + what; };
  if (s.is_boolean()) return s.get<bool>() ? "" : wrong("nothing is allowed here");
  for (const auto& [k, a] : s.items()) {
    if (k == "$ref") {
      const auto ref = a.get<std::string>();
      if (auto e = check(root, root.at(ordered_json::json_pointer(ref.substr(1))), v, at); !e.empty())
        return e;
    } else if (k == "type") {
      const ordered_json list = a.is_array() ? a : ordered_json::array({a});
      if (std::none_of(list.begin(), list.end(),
                       [&](const auto& t) { return is_type(t.template get<std::string>(), v); }))
        return wrong("not of type " + a.dump());
    } else if (k == "const") {
      if (v != a) return wrong("not " + a.dump());
    } else if (k == "enum") {
      if (std::find(a.begin(), a.end(), v) == a.end()) return wrong("not among " + a.dump());
    } else if (k == "anyOf" || k == "oneOf") {
      const auto n =
          std::count_if(a.begin(), a.end(), [&](const auto& x) { return check(root, x, v, at).empty(); });
      if (n == 0 || (k == "oneOf" && n != 1)) return wrong(std::to_string(n) + " of " + k);
    } else if (k == "allOf") {
      for (const auto& x : a)
        if (auto e = check(root, x, v, at); !e.empty()) return e;
    } else if (k == "properties" && v.is_object()) {
      for (const auto& [name, x] : a.items())
        if (v.contains(name))
          if (auto e = check(root, x, v[name], at + "/" + name); !e.empty()) return e;
    } else if (k == "required" && v.is_object()) {
      for (const auto& name : a)
        if (!v.contains(name.get<std::string>())) return wrong(name.get<std::string>() + " is missing");
    } else if (k == "additionalProperties" && v.is_object()) {
      for (const auto& [name, x] : v.items())
        if (!s.contains("properties") || !s["properties"].contains(name))
          if (auto e = check(root, a, x, at + "/" + name); !e.empty()) return e;
    } else if (k == "items" && v.is_array()) {
      for (size_t i = s.contains("prefixItems") ? s["prefixItems"].size() : 0; i < v.size(); ++i)
        if (auto e = check(root, a, v[i], at + "/" + std::to_string(i)); !e.empty()) return e;
    } else if (k == "prefixItems" && v.is_array()) {
      for (size_t i = 0; i < std::min(a.size(), v.size()); ++i)
        if (auto e = check(root, a[i], v[i], at + "/" + std::to_string(i)); !e.empty()) return e;
    } else if (k == "minItems" && v.is_array()) {
      if (v.size() < a.get<size_t>()) return wrong("too few items");
    } else if (k == "maxItems" && v.is_array()) {
      if (v.size() > a.get<size_t>()) return wrong("too many items");
    } else if (k == "minLength" && v.is_string()) {
      if (code_points(v.get<std::string>()) < a.get<int64_t>()) return wrong("too short");
    } else if (k == "maxLength" && v.is_string()) {
      if (code_points(v.get<std::string>()) > a.get<int64_t>()) return wrong("too long");
    } else if (k == "pattern" && v.is_string()) {
      if (!std::regex_search(wide(v.get<std::string>()), std::wregex(wide(a.get<std::string>()))))
        return wrong("not like " + a.dump());
    } else if (k == "minimum" && v.is_number()) {
      if (v < a) return wrong("below " + a.dump());
    } else if (k == "maximum" && v.is_number()) {
      if (v > a) return wrong("above " + a.dump());
    } else if (k == "exclusiveMinimum" && v.is_number()) {
      if (v <= a) return wrong("not above " + a.dump());
    } else if (k == "exclusiveMaximum" && v.is_number()) {
      if (v >= a) return wrong("not below " + a.dump());
    }
  }
  return "";
}

}  // namespace

std::string schema_violation(const ordered_json& schema, const ordered_json& value) {
  return check(schema, schema, value, "#");
}

std::string form_violation(const std::string& text) {
  if (!is_utf8(text)) return "not UTF-8";
  try {
    parse_json(text, "text");  // refuses keys that stand twice
  } catch (const Error& e) {
    return e.what();
  }
  bool inside = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (inside) {
      if (c == '\\')
        ++i;
      else if (c == '"')
        inside = false;
      continue;
    }
    if (c == '"') inside = true;
    if (c == '\t' || c == '\n' || c == '\r') return "white space";
    if (c == ' ' && (i == 0 || (text[i - 1] != ',' && text[i - 1] != ':'))) return "a space out of place";
  }
  return "";
}

}  // namespace perigee::policy
