#include "policy/grammar/schema.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "policy/grammar/bounds.h"
#include "policy/grammar/formats.h"
#include "policy/grammar/keywords.h"
#include "policy/grammar/merge.h"
#include "policy/grammar/numbers.h"
#include "policy/grammar/texts.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

constexpr size_t kMaxProperties = 1000, kMaxBranches = 1000;
constexpr int kMaxSchemaDepth = 100;
constexpr int kMaxMerges = 1000;
constexpr int32_t kUnbounded = std::numeric_limits<int32_t>::max();

class SchemaCompiler {
 public:
  SchemaCompiler(Automaton& a, const ordered_json& root, std::string where)
      : a_(a), root_(root), where_(std::move(where)) {}

  int32_t document(bool object_only) {
    if (object_only) {
      const ordered_json s = resolved(root_, "#");
      if (schema_types(s, true) != std::vector<std::string>{"object"} && !s.contains("anyOf") &&
          !s.contains("oneOf"))
        fail("#", "a schema of an object is expected: {\"type\": \"object\", ...}");
    }
    const int32_t entry = reference("#");
    // What is referred to is compiled here, not where it is met: chains of references take no stack.
    while (!pending_.empty()) {
      const auto [ref, to] = pending_.back();
      pending_.pop_back();
      a_.branch(to, rule(target(ref, "#"), ref));
    }
    return entry;
  }

  int32_t any_value() {
    if (any_ < 0) {
      any_ = a_.split({});
      for (int32_t way : {free_text(), number(), any_object(), any_array(), a_.literal("true", a_.pop()),
                          a_.literal("false", a_.pop()), a_.literal("null", a_.pop())})
        a_.branch(any_, way);
    }
    return any_;
  }

  int32_t any_object() {
    if (any_object_ < 0) {
      any_object_ = a_.split({});
      const int32_t r = object_rule({}, any_value());
      a_.branch(any_object_, r);
    }
    return any_object_;
  }

 private:
  struct Property {
    std::string name;
    int32_t rule;
    bool required;
  };

  [[noreturn]] void fail(const std::string& path, std::string_view what) const {
    refuse_schema(where_, path, what);
  }

  // -- references --------------------------------------------------------------------------------------------------

  const ordered_json& target(const std::string& ref, const std::string& path) const {
    if (ref != "#" && !ref.starts_with("#/"))
      fail(path,
           fmt::format("$ref {} is not supported: only references into this schema, \"#/...\"", quote(ref)));
    try {
      return root_.at(ordered_json::json_pointer(ref.substr(1)));
    } catch (const ordered_json::exception&) {
      fail(path, fmt::format("$ref {} leads nowhere", quote(ref)));
    }
  }

  int32_t reference(const std::string& ref, const std::string& path = "#") {
    if (const auto it = references_.find(ref); it != references_.end()) return it->second;
    target(ref, path);
    const int32_t entry = a_.split({});
    references_[ref] = entry;
    pending_.emplace_back(ref, entry);
    return entry;
  }

  // The schema without a reference at its top.
  ordered_json resolved(ordered_json schema, const std::string& path) {
    for (int i = 0; schema.is_object() && schema.contains("$ref"); ++i) {
      if (i == 32) fail(path, "references lead to references without end");
      const ordered_json& to = target(ref_of(schema, path), path);
      schema.erase("$ref");
      schema = merged(to, schema, path);
    }
    return schema;
  }

  std::string ref_of(const ordered_json& schema, const std::string& path) const {
    if (!schema["$ref"].is_string()) fail(pointer(path, "$ref"), "a text is expected");
    return schema["$ref"].get<std::string>();
  }

  ordered_json merged(const ordered_json& a, const ordered_json& b, const std::string& path) {
    if (++merges_ > kMaxMerges) fail(path, "too much to merge");
    ordered_json out;
    if (const std::string keyword = merge_schemas(a, b, &out); !keyword.empty())
      fail(path,
           fmt::format("two schemas that both hold here differ in {}, which is not supported", keyword));
    return out;
  }

  // -- schemas -----------------------------------------------------------------------------------------------------

  // The entry of the rule of a schema's values.
  int32_t rule(const ordered_json& s, const std::string& path) {
    if (s.is_boolean()) return s.get<bool>() ? any_value() : a_.split({});
    if (!s.is_object()) fail(path, "a schema is expected: an object, true or false");
    if (++depth_ > kMaxSchemaDepth)
      fail(path, fmt::format("schemas are nested deeper than {}", kMaxSchemaDepth));
    check_keywords(s, path, where_);
    int32_t out = -1;
    try {
      out = dispatch(s, path);
    } catch (const Error& e) {
      // What automata and patterns throw does not say where.
      const std::string what = e.what();
      if (what.starts_with(where_ + ": ")) throw;
      fail(path, what);
    }
    --depth_;
    return out;
  }

  int32_t dispatch(const ordered_json& s, const std::string& path) {
    const auto meaningful = [](const ordered_json& x) {
      ordered_json out = ordered_json::object();
      for (const auto& [k, v] : x.items())
        if (!is_annotation(k)) out[k] = v;
      return out;
    };
    ordered_json rest = meaningful(s);
    if (rest.contains("$ref")) {
      if (rest.size() == 1) return reference(ref_of(s, path), path);
      return rule(resolved(rest, path), path);
    }
    if (rest.contains("allOf")) {
      const ordered_json parts = rest["allOf"];
      rest.erase("allOf");
      if (rest.empty() && parts.size() == 1) return rule(parts[0], item_pointer(path, "allOf", 0));
      for (size_t i = 0; i < parts.size(); ++i) {
        const std::string at = item_pointer(path, "allOf", i);
        rest = merged(rest, part(parts[i], at), at);
      }
      return rule(rest, path);
    }
    for (const char* key : {"anyOf", "oneOf"})
      if (rest.contains(key)) return branches(rest, key, path);
    if (rest.contains("enum") || rest.contains("const")) return listed(rest, path);
    std::vector<int32_t> ways;
    auto types = schema_types(rest, true);
    if (std::find(types.begin(), types.end(), "number") != types.end()) std::erase(types, "integer");
    if (types.size() >= 6 && rest.size() <= 1) return any_value();
    std::sort(types.begin(), types.end());
    types.erase(std::unique(types.begin(), types.end()), types.end());
    for (const std::string& t : types) ways.push_back(of_type(t, rest, path));
    return ways.size() == 1 ? ways[0] : a_.split(std::move(ways));
  }

  // A schema that is to be merged.
  ordered_json part(const ordered_json& s, const std::string& path) {
    if (s.is_object()) check_keywords(s, path, where_);
    return resolved(s, path);
  }

  int32_t branches(ordered_json rest, const char* key, const std::string& path) {
    const ordered_json list = rest[key];
    rest.erase(key);
    if (list.size() > kMaxBranches)
      fail(pointer(path, key), fmt::format("more than {} schemas", kMaxBranches));
    std::vector<int32_t> ways;
    std::vector<ordered_json> parts;
    const bool one = std::string_view(key) == "oneOf";
    for (size_t i = 0; i < list.size(); ++i) {
      const std::string at = item_pointer(path, key, i);
      if (!rest.empty() || one)
        parts.push_back(rest.empty() ? part(list[i], at) : merged(rest, part(list[i], at), at));
      ways.push_back(rule(rest.empty() ? list[i] : parts.back(), at));
    }
    for (size_t i = 0; one && i < parts.size(); ++i)
      for (size_t j = i + 1; j < parts.size(); ++j)
        if (!are_disjoint(parts[i], parts[j]))
          fail(pointer(path, key),
               fmt::format(
                   "schemas {} and {} may both hold: give them different types, or a required property with "
                   "different const, or use anyOf",
                   i, j));
    return a_.split(std::move(ways));
  }

  int32_t of_type(const std::string& type, const ordered_json& s, const std::string& path) {
    if (type == "object") return object(s, path);
    if (type == "array") return array(s, path);
    if (type == "string") return string(s, path);
    if (type == "integer") return integer(s, path);
    if (type == "number") return bounded_number(s, path);
    if (type == "null") return a_.literal("null", a_.pop());
    return a_.split({a_.literal("true", a_.pop()), a_.literal("false", a_.pop())});
  }

  // -- enum and const ----------------------------------------------------------------------------------------------

  int32_t listed(const ordered_json& s, const std::string& path) {
    ordered_json values = s.contains("const") ? ordered_json::array({s["const"]}) : s["enum"];
    for (const auto& [k, v] : s.items()) {
      if (k == "const" || k == "type") continue;
      if (k == "enum" && !s.contains("const")) continue;
      if (k != "enum") fail(pointer(path, k), "this keyword is not supported beside enum and const");
      std::erase_if(values.get_ref<ordered_json::array_t&>(),
                    [&](const ordered_json& x) { return !holds(v, x); });
    }
    if (s.contains("type")) {
      const auto types = schema_types(ordered_json{{"type", s["type"]}}, false);
      const auto has = [&](const char* t) { return std::find(types.begin(), types.end(), t) != types.end(); };
      std::erase_if(values.get_ref<ordered_json::array_t&>(), [&](const ordered_json& x) {
        if (x.is_number_float())
          return !(has("number") || (has("integer") && x.get<double>() == std::floor(x.get<double>())));
        if (x.is_number()) return !(has("number") || has("integer"));
        return !has(x.is_null()      ? "null"
                    : x.is_boolean() ? "boolean"
                    : x.is_string()  ? "string"
                    : x.is_array()   ? "array"
                                     : "object");
      });
    }
    if (values.empty()) fail(path, "none of its values is of its type");
    std::vector<std::string> texts;
    std::vector<int32_t> ways;
    for (const auto& v : values) {
      if (v.is_structured() && !v.empty())
        ways.push_back(constant(v, 0, path));
      else
        texts.push_back(v.dump());
    }
    std::sort(texts.begin(), texts.end());
    texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
    if (!texts.empty()) ways.push_back(tree(texts, 0, texts.size(), 0));
    return ways.size() == 1 ? ways[0] : a_.split(std::move(ways));
  }

  // Texts [from, to) of a sorted list, which agree in their first `depth` bytes.
  int32_t tree(const std::vector<std::string>& texts, size_t from, size_t to, size_t depth) {
    // A stretch in which they all agree needs no recursion.
    size_t common = depth;
    while (common < texts[from].size() && common < texts[to - 1].size() &&
           texts[from][common] == texts[to - 1][common])
      ++common;
    std::vector<int32_t> ways;
    Node n;
    const bool ends = texts[from].size() == common;
    for (size_t i = from + ends; i < to;) {
      size_t j = i;
      while (j < to && texts[j][common] == texts[i][common]) ++j;
      const auto b = static_cast<uint8_t>(texts[i][common]);
      n.edges.push_back({b, b, Op::kPlain, tree(texts, i, j, common + 1)});
      i = j;
    }
    if (ends) ways.push_back(a_.pop());
    if (!n.edges.empty()) ways.push_back(a_.add(std::move(n)));
    return a_.literal(std::string_view(texts[from]).substr(depth, common - depth),
                      ways.size() == 1 ? ways[0] : a_.split(std::move(ways)));
  }

  int32_t constant(const ordered_json& v, int depth, const std::string& path) {
    if (depth > kMaxDepth) fail(path, "a value nested too deep");
    if (!v.is_structured() || v.empty()) return a_.literal(v.dump(), a_.pop());
    int32_t at = a_.literal(v.is_array() ? "]" : "}", a_.pop());
    for (auto it = v.end(); it != v.begin();) {
      --it;
      at = a_.call(constant(*it, depth + 1, path), at);
      if (v.is_object()) at = a_.literal(fmt::format("\"{}\":", spell(it.key())), a_.maybe_space(at));
      if (it != v.begin()) at = a_.step(',', ',', a_.maybe_space(at));
    }
    const int32_t inside = a_.literal(v.is_array() ? "[" : "{", at);
    return a_.call(inside, a_.pop(), true);
  }

  // -- objects -----------------------------------------------------------------------------------------------------

  int32_t object(const ordered_json& s, const std::string& path) {
    const bool declares = s.contains("properties");
    const ordered_json none = ordered_json::object();
    const ordered_json& properties = declares ? s["properties"] : none;
    if (properties.size() > kMaxProperties)
      fail(pointer(path, "properties"), fmt::format("more than {} properties", kMaxProperties));
    std::set<std::string> required;
    if (s.contains("required"))
      for (const auto& r : s["required"]) required.insert(r.get<std::string>());
    const bool open = s.contains("additionalProperties");
    const ordered_json rest = open ? s["additionalProperties"] : ordered_json(!declares);
    std::vector<Property> list;
    for (const auto& [name, schema] : properties.items())
      list.push_back(
          {name, rule(schema, pointer(pointer(path, "properties"), name)), required.erase(name) != 0});
    const int32_t more = rest == false ? -1 : rule(rest, pointer(path, "additionalProperties"));
    for (const std::string& name : required) {
      if (open && more < 0)
        fail(pointer(path, "required"),
             fmt::format("{} is not among the properties, and no others are allowed", quote(name)));
      list.push_back({name, more >= 0 ? more : any_value(), true});
    }
    return object_rule(list, more);
  }

  // more: the rule of additional properties' values, or -1.
  int32_t object_rule(const std::vector<Property>& list, int32_t more) {
    const int32_t close = a_.step('}', '}', a_.pop());
    const auto value = [&](int32_t value_rule, int32_t then) {
      return a_.step(':', ':', a_.maybe_space(a_.call(value_rule, then)));
    };
    // first: where the next property may come without a comma before; after: where one has just ended; next: after a
    // comma. Each for the properties from i on.
    int32_t first = close, after = close, next = -1;
    bool may_end = true;
    if (more >= 0) {
      if (key_ < 0) key_ = key_text_rule(a_).entry;
      const int32_t end = a_.split({close});
      next = a_.call(key_, value(more, end));
      a_.branch(end, a_.step(',', ',', a_.maybe_space(next)));
      after = end;
      first = a_.split({close, next});
    }
    for (size_t i = list.size(); i-- > 0;) {
      const Property& p = list[i];
      const int32_t key = a_.literal(fmt::format("\"{}\"", spell(p.name)), value(p.rule, after));
      if (p.required) {
        first = next = key;
        after = a_.step(',', ',', a_.maybe_space(key));
        may_end = false;
      } else {
        first = a_.split({key, first});
        next = next < 0 ? key : a_.split({key, next});
        const int32_t comma = a_.step(',', ',', a_.maybe_space(next));
        after = may_end ? a_.split({close, comma}) : comma;
      }
    }
    std::vector<std::string> names;
    for (const Property& p : list) names.push_back(spell(p.name));
    int32_t keys = -1;
    if (more >= 0) {
      keys = static_cast<int32_t>(a_.key_sets.size());
      a_.key_sets.push_back(std::move(names));
    }
    return a_.call(a_.step('{', '{', first), a_.pop(), true, keys);
  }

  // -- arrays ------------------------------------------------------------------------------------------------------

  int32_t any_array() { return array_rule({}, any_value(), 0, -1); }

  int32_t array(const ordered_json& s, const std::string& path) {
    std::vector<int32_t> prefix;
    if (s.contains("prefixItems"))
      for (size_t i = 0; i < s["prefixItems"].size(); ++i)
        prefix.push_back(rule(s["prefixItems"][i], item_pointer(path, "prefixItems", i)));
    const bool none = s.contains("items") && s["items"] == false;
    const int32_t rest = none                  ? -1
                         : s.contains("items") ? rule(s["items"], pointer(path, "items"))
                                               : any_value();
    const int64_t min = count(s, "minItems", 0, path);
    int64_t max = count(s, "maxItems", -1, path);
    if (none)
      max =
          max < 0 ? static_cast<int64_t>(prefix.size()) : std::min(max, static_cast<int64_t>(prefix.size()));
    if (max >= 0 && min > max) fail(path, fmt::format("at least {} items, and at most {}", min, max));
    return array_rule(prefix, rest, min, max);
  }

  // max: -1 for any.
  int32_t array_rule(const std::vector<int32_t>& prefix, int32_t rest, int64_t min, int64_t max) {
    const int32_t close = a_.step(']', ']', a_.pop());
    const auto item = [&](int64_t i) { return i < static_cast<int64_t>(prefix.size()) ? prefix[i] : rest; };
    // after: where an item has just ended, of i + 1 items.
    int64_t i = max;
    int32_t after = close;
    if (max < 0) {
      i = std::max({min, static_cast<int64_t>(prefix.size()), int64_t{1}});
      after = a_.split({close});
      a_.branch(after, a_.step(',', ',', a_.maybe_space(a_.call(rest, after))));
    }
    for (; i > 1; --i) {
      const int32_t comma = a_.step(',', ',', a_.maybe_space(a_.call(item(i - 1), after)));
      after = i - 1 >= min ? a_.split({close, comma}) : comma;
    }
    std::vector<int32_t> ways;
    if (min == 0) ways.push_back(close);
    if (i == 1) ways.push_back(a_.call(item(0), after));
    return a_.call(a_.step('[', '[', a_.split(std::move(ways))), a_.pop(), true);
  }

  int64_t count(const ordered_json& s, const char* key, int64_t absent, const std::string& path) const {
    if (!s.contains(key)) return absent;
    const double v = s[key].get<double>();
    if (v > kUnbounded - 1) fail(pointer(path, key), "too large");
    return static_cast<int64_t>(v);
  }

  // -- strings and numbers -----------------------------------------------------------------------------------------

  int32_t free_text() {
    if (text_ < 0) text_ = free_text_rule(a_).entry;
    return text_;
  }

  int32_t string(const ordered_json& s, const std::string& path) {
    const auto min = static_cast<int32_t>(count(s, "minLength", 0, path));
    const auto max = static_cast<int32_t>(count(s, "maxLength", kUnbounded, path));
    if (min > max) fail(path, fmt::format("at least {} characters, and at most {}", min, max));
    if (s.contains("pattern") && s.contains("format"))
      fail(pointer(path, "format"), "a format beside a pattern is not supported");
    if (s.contains("pattern"))
      return pattern_text_rule(a_, compile_pattern(s["pattern"].get<std::string>()), min, max);
    if (s.contains("format")) {
      const std::string pattern = format_pattern(s["format"].get<std::string>());
      if (pattern.empty())
        fail(pointer(path, "format"), fmt::format("the format {} is not supported; formats are {}",
                                                  brief(s["format"]), join(format_names())));
      return pattern_text_rule(a_, compile_pattern(pattern), min, max);
    }
    if (min == 0 && max == kUnbounded) return free_text();
    int32_t& known = counted_[{min, max}];
    if (known == 0) known = counted_text_rule(a_, min, max).entry;
    return known;
  }

  int32_t number() {
    if (number_ < 0) number_ = number_rule(a_);
    return number_;
  }

  int32_t integer(const ordered_json& s, const std::string& path) {
    const auto [low, high] = integer_bounds(s, path, where_);
    return integer_rule(a_, low, high);
  }

  int32_t bounded_number(const ordered_json& s, const std::string& path) {
    const NumberBounds b = number_bounds(s, path, where_);
    return b.low || b.high ? bounded_number_rule(a_, b) : number();
  }

  Automaton& a_;
  const ordered_json& root_;
  std::string where_;
  std::map<std::string, int32_t> references_;
  std::vector<std::pair<std::string, int32_t>> pending_;  // references to be compiled
  std::map<std::pair<int32_t, int32_t>, int32_t> counted_;
  int32_t any_ = -1, any_object_ = -1, text_ = -1, number_ = -1, key_ = -1;
  int depth_ = 0, merges_ = 0;
};

}  // namespace

int32_t schema_rule(Automaton& a, const ordered_json& schema, const std::string& where, bool object_only) {
  size_t bytes = 0;
  try {
    bytes = schema.dump().size();
  } catch (const ordered_json::exception&) {
    throw_input("{}: #: a text that is not UTF-8", where);
  }
  if (bytes > static_cast<size_t>(kMaxSchemaBytes))
    throw_input("{}: #: a schema of {}, more than {}", where, human_bytes(bytes),
                human_bytes(kMaxSchemaBytes));
  return SchemaCompiler(a, schema, where).document(object_only);
}

int32_t any_object_rule(Automaton& a) {
  const ordered_json any = true;
  return SchemaCompiler(a, any, "schema").any_object();
}

}  // namespace perigee::policy
