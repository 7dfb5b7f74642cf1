#include "base/config.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee {
namespace {

using nlohmann::json;

bool bounded(const Range& r) {
  return std::isfinite(r.lo) || std::isfinite(r.hi);
}

std::string number_text(double x) {
  // Whole numbers up to 2^53 without an exponent: 1000000, not 1e+06.
  if (std::fabs(x) < 0x1p53 && x == std::floor(x)) return fmt::format("{}", static_cast<int64_t>(x));
  return fmt::format("{}", x);
}

std::string range_text(const Range& r) {
  if (!bounded(r)) return "";
  if (!std::isfinite(r.hi)) return fmt::format("at least {}", number_text(r.lo));
  if (!std::isfinite(r.lo)) return fmt::format("at most {}", number_text(r.hi));
  return fmt::format("{} to {}", number_text(r.lo), number_text(r.hi));
}

std::string expected(std::string_view what, const json& v) {
  return fmt::format("{} is expected, not {}", what, json_brief(v));
}

std::string check_range(const json& v, double x, const Range& r) {
  if (std::isfinite(x) && x >= r.lo && x <= r.hi) return "";
  return fmt::format("{} is out of range ({})", json_brief(v), bounded(r) ? range_text(r) : "finite numbers");
}

// A whole number: an integer, or a number such as 1e6 without a fraction.
std::string check_integer(const json& v, const Range& r, int64_t lowest, int64_t highest, int64_t* out) {
  if (!v.is_number()) return expected("a whole number", v);
  const double x = v.get<double>();
  if (v.is_number_float() && (x != std::floor(x) || std::fabs(x) > 0x1p53))
    return expected("a whole number", v);
  if (v.is_number_unsigned() && v.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
    return fmt::format("{} is out of range (at most {})", json_brief(v), highest);
  *out = v.is_number_float() ? static_cast<int64_t>(x) : v.get<int64_t>();
  if (*out < lowest || *out > highest)
    return fmt::format("{} is out of range ({} to {})", json_brief(v), lowest, highest);
  return check_range(v, static_cast<double>(*out), r);
}

std::string check_number(const json& v, const Range& r, double* out) {
  if (!v.is_number()) return expected("a number", v);
  *out = v.get<double>();
  return check_range(v, *out, r);
}

// A float shown with the digits somebody would write: 0.1, not 0.10000000149011612.
json plain(float x) {
  return std::isfinite(x) ? json(std::strtod(fmt::format("{}", x).c_str(), nullptr)) : json(nullptr);
}
json plain(double x) {
  return x;
}

std::string names_text(const Names& names) {
  return join(names, ", ");
}

std::string check_list(const json& v, const std::function<std::string(const json&)>& element) {
  if (!v.is_array()) return expected("a list", v);
  for (const json& e : v)
    if (std::string wrong = element(e); !wrong.empty()) return fmt::format("in the list: {}", wrong);
  return "";
}

}  // namespace

void Schema::section(std::string name, std::string meaning) {
  sections_.emplace_back(std::move(name), std::move(meaning));
}

void Schema::add(Field f) {
  PERIGEE_CHECK(!f.key.empty() && !index_.contains(f.key), "configuration key {} registered twice", f.key);
  for (const Field& other : fields_)
    PERIGEE_CHECK(!other.key.starts_with(f.key + ".") && !f.key.starts_with(other.key + "."),
                  "keys {} and {}", f.key, other.key);
  f.initial = f.get();
  const std::string wrong = f.put(f.initial, false);
  PERIGEE_CHECK(wrong.empty(), "default of {}: {}", f.key, wrong);
  index_[f.key] = fields_.size();
  fields_.push_back(std::move(f));
}

template <class T>
void Schema::integer_field(std::string key, T* p, std::string meaning, Range range) {
  add({.key = std::move(key),
       .type = "whole number",
       .range = range_text(range),
       .meaning = std::move(meaning),
       .get = [p] { return json(*p); },
       .put =
           [p, range](const json& v, bool apply) {
             int64_t x = 0;
             std::string wrong =
                 check_integer(v, range, std::numeric_limits<T>::min(), std::numeric_limits<T>::max(), &x);
             if (wrong.empty() && apply) *p = static_cast<T>(x);
             return wrong;
           }});
}
void Schema::field(std::string key, int64_t* p, std::string meaning, Range range) {
  integer_field(std::move(key), p, std::move(meaning), range);
}
void Schema::field(std::string key, int32_t* p, std::string meaning, Range range) {
  integer_field(std::move(key), p, std::move(meaning), range);
}

template <class T>
void Schema::number_field(std::string key, T* p, std::string meaning, Range range) {
  add({.key = std::move(key),
       .type = "number",
       .range = range_text(range),
       .meaning = std::move(meaning),
       .get = [p] { return plain(*p); },
       .put =
           [p, range](const json& v, bool apply) {
             double x = 0;
             std::string wrong = check_number(v, range, &x);
             if (wrong.empty() && !std::isfinite(static_cast<T>(x)))
               wrong = fmt::format("{} is out of range", json_brief(v));
             if (wrong.empty() && apply) *p = static_cast<T>(x);
             return wrong;
           }});
}
void Schema::field(std::string key, double* p, std::string meaning, Range range) {
  number_field(std::move(key), p, std::move(meaning), range);
}
void Schema::field(std::string key, float* p, std::string meaning, Range range) {
  number_field(std::move(key), p, std::move(meaning), range);
}

void Schema::field(std::string key, bool* p, std::string meaning) {
  add({.key = std::move(key),
       .type = "true or false",
       .meaning = std::move(meaning),
       .get = [p] { return json(*p); },
       .put =
           [p](const json& v, bool apply) {
             if (!v.is_boolean()) return expected("true or false", v);
             if (apply) *p = v.get<bool>();
             return std::string();
           }});
}

void Schema::field(std::string key, std::string* p, std::string meaning) {
  add({.key = std::move(key),
       .type = "text",
       .meaning = std::move(meaning),
       .get = [p] { return json(*p); },
       .put =
           [p](const json& v, bool apply) {
             if (!v.is_string()) return expected("a text in quotes", v);
             if (apply) *p = v.get<std::string>();
             return std::string();
           },
       .text = true});
}

void Schema::field(std::string key, std::string* p, std::string meaning, Names allowed) {
  enum_field(
      std::move(key),
      [p, allowed] {
        return static_cast<size_t>(std::find(allowed.begin(), allowed.end(), *p) - allowed.begin());
      },
      [p, allowed](size_t i) { *p = allowed[i]; }, std::move(meaning), allowed);
}

void Schema::enum_field(std::string key, std::function<size_t()> get, std::function<void(size_t)> put,
                        std::string meaning, Names names) {
  const std::string range = names_text(names);
  add({.key = std::move(key),
       .type = "one of",
       .range = range,
       .meaning = std::move(meaning),
       .get =
           [get, names] {
             PERIGEE_CHECK(get() < names.size(), "value {} of {}", get(), names_text(names));
             return json(names[get()]);
           },
       .put =
           [put, names, range](const json& v, bool apply) {
             if (!v.is_string()) return expected(fmt::format("one of {}", range), v);
             const auto it = std::find(names.begin(), names.end(), v.get<std::string>());
             if (it == names.end())
               return fmt::format("{} is not one of {}{}", json_brief(v), range,
                                  did_you_mean(v.get<std::string>(), names));
             if (apply) put(static_cast<size_t>(it - names.begin()));
             return std::string();
           },
       .text = true});
}

void Schema::field(std::string key, std::vector<int64_t>* p, std::string meaning, Range range) {
  add({.key = std::move(key),
       .type = "list of whole numbers",
       .range = range_text(range),
       .meaning = std::move(meaning),
       .get = [p] { return json(*p); },
       .put =
           [p, range](const json& v, bool apply) {
             std::vector<int64_t> values;
             std::string wrong = check_list(v, [&](const json& e) {
               return check_integer(e, range, INT64_MIN, INT64_MAX, &values.emplace_back());
             });
             if (wrong.empty() && apply) *p = values;
             return wrong;
           },
       .list = true});
}

void Schema::field(std::string key, std::vector<double>* p, std::string meaning, Range range) {
  add({.key = std::move(key),
       .type = "list of numbers",
       .range = range_text(range),
       .meaning = std::move(meaning),
       .get = [p] { return json(*p); },
       .put =
           [p, range](const json& v, bool apply) {
             std::vector<double> values;
             std::string wrong =
                 check_list(v, [&](const json& e) { return check_number(e, range, &values.emplace_back()); });
             if (wrong.empty() && apply) *p = values;
             return wrong;
           },
       .list = true});
}

void Schema::field(std::string key, std::vector<std::string>* p, std::string meaning) {
  add({.key = std::move(key),
       .type = "list of texts",
       .meaning = std::move(meaning),
       .get = [p] { return json(*p); },
       .put =
           [p](const json& v, bool apply) {
             std::string wrong = check_list(v, [](const json& e) {
               return e.is_string() ? std::string() : expected("a text in quotes", e);
             });
             if (wrong.empty() && apply) *p = v.get<std::vector<std::string>>();
             return wrong;
           },
       .text = true,
       .list = true});
}

void Schema::field(std::string key, json* p, std::string meaning,
                   std::function<std::string(const json&)> check) {
  add({.key = std::move(key),
       .type = "JSON",
       .meaning = std::move(meaning),
       .get = [p] { return *p; },
       .put =
           [p, check](const json& v, bool apply) {
             std::string wrong = check ? check(v) : "";
             if (wrong.empty() && apply) *p = v;
             return wrong;
           },
       .object = true});
}

const Schema::Field& Schema::known(const std::string& key, std::string_view where) const {
  if (const auto it = index_.find(key); it != index_.end()) return fields_[it->second];
  for (const Field& f : fields_)
    if (f.key.starts_with(key + "."))
      throw_input("{}: {}: it is a section; set a key of it, such as {}", where, key, f.key);
  throw_input("{}: {}: unknown key{}", where, key, did_you_mean(key, keys()));
}

const Schema::Field* Schema::container_of(const std::string& key) const {
  for (const Field& f : fields_)
    if (f.object && key.starts_with(f.key + ".")) return &f;
  return nullptr;
}

namespace {
// What path ("0.weight") names inside value, made where an object lacks it.
json& descend(json& value, const std::string& key, size_t begin, std::string_view where) {
  json* at = &value;
  for (size_t end = begin - 1; end < key.size(); begin = end + 1) {
    end = std::min(key.find('.', begin), key.size());
    const std::string outer = key.substr(0, begin - 1), part = key.substr(begin, end - begin);
    if (part.empty()) throw_input("{}: {}: a key stands on each side of a dot", where, key);
    if (at->is_null()) *at = json::object();
    if (at->is_array()) {
      const bool digits = part.size() <= 9 && part.find_first_not_of("0123456789") == std::string::npos;
      if (!digits || std::stoul(part) >= at->size())
        throw_input("{}: {}: {} is no index into {}, a list of {}", where, key, quote(part), outer,
                    at->size());
      at = &(*at)[std::stoul(part)];
    } else if (at->is_object()) {
      at = &(*at)[part];
    } else {
      throw_input("{}: {}: {} is {}, which has no {} inside", where, key, outer, json_brief(*at),
                  quote(part));
    }
  }
  return *at;
}
}  // namespace

// Flattens nested objects to dotted keys, down to a registered key.
void Schema::collect(const json& value, const std::string& prefix, std::string_view where,
                     Assignments& out) const {
  for (const auto& [name, v] : value.items()) {
    const std::string key = prefix.empty() ? name : prefix + "." + name;
    if (const auto it = index_.find(key); it != index_.end()) {
      out.emplace_back(&fields_[it->second], v);
      continue;
    }
    const bool inside = std::any_of(fields_.begin(), fields_.end(),
                                    [&](const Field& f) { return f.key.starts_with(key + "."); });
    if (!inside) {
      // "trian": {...}: the section is what was mistyped.
      std::vector<std::string> names = keys();
      for (const Field& f : fields_)
        for (size_t dot = f.key.find('.'); dot != std::string::npos; dot = f.key.find('.', dot + 1)) {
          std::string part = f.key.substr(0, dot);
          if (std::find(names.begin(), names.end(), part) == names.end()) names.push_back(part);
        }
      JsonReader(value, where, prefix).fail(name, fmt::format("unknown key{}", did_you_mean(key, names)));
    }
    if (!v.is_object()) throw_input("{}: {}: {}", where, key, expected("a section {...}", v));
    collect(v, key, where, out);
  }
}

// All are checked before any is written.
void Schema::apply(const Assignments& assignments, std::string_view where) {
  std::set<const Field*> seen;
  for (const auto& [field, v] : assignments) {
    if (!seen.insert(field).second) throw_input("{}: {}: given twice", where, field->key);
    if (const std::string wrong = field->put(v, false); !wrong.empty())
      throw_input("{}: {}: {}", where, field->key, wrong);
  }
  for (const auto& [field, v] : assignments) {
    field->put(v, true);
    given_.insert(field->key);
  }
}

void Schema::load(const json& value, std::string_view where) {
  if (!value.is_object()) throw_input("{}: {}", where, expected("an object {...}", value));
  Assignments assignments;
  collect(value, "", where, assignments);
  apply(assignments, where);
}

void Schema::load_file(const std::string& path) {
  load(parse_json(read_file(path, uint64_t{64} << 20), path, {.comments = true}), path);
}

void Schema::set(std::string_view assignment, std::string_view where) {
  const size_t equals = assignment.find('=');
  if (equals == std::string_view::npos || equals == 0)
    throw_input("{}: {} is not key=value", where, quote(assignment));
  const std::string key(assignment.substr(0, equals)), value(assignment.substr(equals + 1));
  if (!is_utf8(value)) throw_input("{}: {}: the value is not UTF-8", where, key);
  json v = json::parse(value, nullptr, false);
  if (const Field* container = index_.contains(key) ? nullptr : container_of(key)) {
    if (!is_utf8(key)) throw_input("{}: {}: the key is not UTF-8", where, quote(key));
    json whole = container->get();
    descend(whole, key, container->key.size() + 1, where) = v.is_discarded() ? json(value) : std::move(v);
    apply({{container, std::move(whole)}}, where);
    return;
  }
  const Field& field = known(key, where);
  if (field.list && !v.is_array()) {
    v = json::array();
    for (size_t at = 0; at <= value.size() && !value.empty();) {
      const size_t comma = std::min(value.find(',', at), value.size());
      const std::string part = value.substr(at, comma - at);
      json e = field.text ? json(part) : json::parse(part, nullptr, false);
      v.push_back(e.is_discarded() ? json(part) : std::move(e));
      at = comma + 1;
    }
  } else if (field.text && !field.list) {
    // run.dir=17 is the text "17"; run.dir="17" may be written with its quotes.
    if (!v.is_string()) v = value;
  } else if (v.is_discarded()) {
    v = value;
    if (field.object)
      throw_input("{}: {}: {} is not JSON; a text stands in quotes: '{}=\"...\"'", where, key, quote(value),
                  key);
  }
  apply({{&field, std::move(v)}}, where);
}

std::vector<std::string> Schema::keys() const {
  std::vector<std::string> out;
  for (const Field& f : fields_) out.push_back(f.key);
  return out;
}

nlohmann::ordered_json Schema::dump() const {
  nlohmann::ordered_json out = nlohmann::ordered_json::object();
  for (const Field& f : fields_) {
    nlohmann::ordered_json* at = &out;
    size_t begin = 0;
    for (size_t dot = f.key.find('.'); dot != std::string::npos;
         begin = dot + 1, dot = f.key.find('.', begin))
      at = &(*at)[f.key.substr(begin, dot - begin)];
    (*at)[f.key.substr(begin)] = nlohmann::ordered_json(f.get());
  }
  return out;
}

namespace {
// Text for a cell of a Markdown table.
std::string cell(std::string_view text) {
  std::string out;
  for (char c : text) {
    if (c == '|') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}
}  // namespace

std::string Schema::markdown() const {
  std::string out =
      "# Configuration\n\n"
      "Written by the program from its own schema; do not edit. A configuration is a JSON file (comments "
      "allowed), and\n`--set key=value` overrides any key. Unknown keys are refused.\n";
  // In order of registration; a section's keys stand together even when registered apart.
  std::vector<std::string> order;
  const auto section_of = [](const std::string& key) {
    const size_t dot = key.find('.');
    return dot == std::string::npos ? std::string() : key.substr(0, dot);
  };
  for (const Field& f : fields_)
    if (std::string s = section_of(f.key); std::find(order.begin(), order.end(), s) == order.end())
      order.push_back(s);
  for (const std::string& name : order) {
    out += fmt::format("\n## {}\n", name.empty() ? "Top level" : name);
    for (const auto& [section, meaning] : sections_)
      if (section == name) out += fmt::format("\n{}\n", meaning);
    out += "\n| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n";
    for (const Field& f : fields_)
      if (section_of(f.key) == name)
        out += fmt::format("| `{}` | {} | `{}` | {} | {} |\n", f.key, f.type, cell(f.initial.dump()),
                           cell(f.range), cell(f.meaning));
  }
  out += "\n## Environment variables\n\n| name | meaning |\n|---|---|\n";
  for (const EnvironmentVariable& v : environment_variables())
    out += fmt::format("| `{}` | {} |\n", v.name, cell(v.meaning));
  return out;
}

std::span<const EnvironmentVariable> environment_variables() {
  static const std::vector<EnvironmentVariable> table = {
      {"PERIGEE_GOLDEN", "a directory of further golden cases for the tests, each as those in tests/golden"}};
  return table;
}

void check_environment(const char* const* environ) {
  std::vector<std::string> names;
  for (const EnvironmentVariable& v : environment_variables()) names.push_back(v.name);
  for (; *environ != nullptr; ++environ) {
    const std::string_view entry = *environ;
    if (!entry.starts_with("PERIGEE_")) continue;
    const std::string name(entry.substr(0, entry.find('=')));
    if (std::find(names.begin(), names.end(), name) == names.end())
      throw_input("environment: {}: unknown variable{}", quote(name), did_you_mean(name, names));
  }
}

std::string environment(std::string_view name) {
  const auto table = environment_variables();
  PERIGEE_CHECK(std::any_of(table.begin(), table.end(), [&](const auto& v) { return v.name == name; }), "{}",
                name);
  const char* value = std::getenv(std::string(name).c_str());
  return value == nullptr ? "" : value;
}

}  // namespace perigee
