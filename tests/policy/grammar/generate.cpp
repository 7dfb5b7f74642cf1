#include "tests/policy/grammar/generate.h"

#include <algorithm>
#include <set>

#include "base/error.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

std::map<std::string, int32_t, std::less<>> specials_from(int32_t first) {
  using namespace special;
  std::map<std::string, int32_t, std::less<>> out;
  for (std::string_view name :
       {kBos, kEos, kPad, kUnk, kEot, kImEnd, kImUser, kImAssistant, kImSystem, kImMiddle, kStartHeader,
        kEndHeader, kToolSectionBegin, kToolSectionEnd, kToolCallBegin, kToolArgumentBegin, kToolCallEnd})
    out.emplace(name, first++);
  return out;
}

bool chance(Random& r, int percent) {
  return r.next_int(0, 99) < percent;
}

template <class T>
const T& pick(Random& r, const std::vector<T>& list) {
  return list[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(list.size()) - 1))];
}

const std::vector<std::string> kNames = {"a",    "b", "name", "value", "id", "x y", "\"q\"",
                                         "t\\n", "é", "日本", "",      "ab", "\n"};
const std::vector<std::string> kTexts = {"",    "a",       "yes",      "no", "\"",   "\\",
                                         "a/b", "línea\n", "\x01\x1f", "😀",  "true", "12"};
const std::vector<std::string> kPatterns = {
    "^[a-c]+$", "^\\d{3}-\\d{4}$", "x", "^(foo|bar)*$", "^[^\"\\\\]{2,4}$", "a.c$", "^\\w+@\\w+$"};

class Maker {
 public:
  explicit Maker(Random& r) : r_(r) {}

  ordered_json make(int depth) {
    const int64_t kind = r_.next_int(0, depth <= 0 ? 6 : 11);
    ordered_json s = ordered_json::object();
    switch (kind) {
      case 0:
        s["type"] = "boolean";
        break;
      case 1:
        s["type"] = "null";
        break;
      case 2:
        integer(s);
        break;
      case 3:
        number(s);
        break;
      case 4:
      case 5:
        string(s);
        break;
      case 6:
        list(s);
        break;
      case 7:
        return ordered_json::object();
      case 8:
        array(s, depth);
        break;
      case 9:
        any_of(s, depth);
        break;
      default:
        object(s, depth);
        break;
    }
    if (chance(r_, 10)) s["description"] = "of no meaning";
    return s;
  }

 private:
  void integer(ordered_json& s) {
    s["type"] = "integer";
    const int64_t low = r_.next_int(-1200, 1200);
    if (chance(r_, 50)) s[chance(r_, 50) ? "minimum" : "exclusiveMinimum"] = low;
    if (chance(r_, 50)) s[chance(r_, 50) ? "maximum" : "exclusiveMaximum"] = low + r_.next_int(2, 3000);
  }
  void number(ordered_json& s) {
    s["type"] = "number";
    const double low = static_cast<double>(r_.next_int(-2000, 2000)) / 16;
    if (chance(r_, 50)) s[chance(r_, 50) ? "minimum" : "exclusiveMinimum"] = low;
    if (chance(r_, 50))
      s[chance(r_, 50) ? "maximum" : "exclusiveMaximum"] =
          low + static_cast<double>(r_.next_int(1, 3000)) / 64;
  }
  void string(ordered_json& s) {
    s["type"] = "string";
    if (chance(r_, 25)) {
      s["pattern"] = pick(r_, kPatterns);
      return;
    }
    if (chance(r_, 40)) s["minLength"] = r_.next_int(0, 6);
    if (chance(r_, 40)) s["maxLength"] = r_.next_int(6, 12);
  }
  void list(ordered_json& s) {
    if (chance(r_, 30)) {
      s["const"] = value(2);
      return;
    }
    s["enum"] = ordered_json::array();
    for (int64_t i = r_.next_int(1, 6); i > 0; --i) s["enum"].push_back(value(1));
  }
  ordered_json value(int depth) {
    switch (r_.next_int(0, depth <= 0 ? 4 : 6)) {
      case 0:
        return nullptr;
      case 1:
        return chance(r_, 50);
      case 2:
        return r_.next_int(-99, 99);
      case 3:
        return static_cast<double>(r_.next_int(-99, 99)) / 8;
      case 4:
        return pick(r_, kTexts);
      case 5: {
        ordered_json a = ordered_json::array();
        for (int64_t i = r_.next_int(0, 3); i > 0; --i) a.push_back(value(depth - 1));
        return a;
      }
      default: {
        ordered_json o = ordered_json::object();
        for (int64_t i = r_.next_int(0, 3); i > 0; --i) o[pick(r_, kNames)] = value(depth - 1);
        return o;
      }
    }
  }
  void array(ordered_json& s, int depth) {
    s["type"] = "array";
    int64_t prefix = 0;
    if (chance(r_, 25)) {
      s["prefixItems"] = ordered_json::array();
      prefix = r_.next_int(1, 3);
      for (int64_t i = 0; i < prefix; ++i) s["prefixItems"].push_back(make(depth - 1));
    }
    if (prefix > 0 && chance(r_, 40))
      s["items"] = false;
    else if (chance(r_, 80))
      s["items"] = make(depth - 1);
    if (chance(r_, 30))
      s["minItems"] = r_.next_int(0, s.contains("items") && s["items"] == false ? prefix : 2);
    if (chance(r_, 30)) s["maxItems"] = r_.next_int(2, 4);
    if (s.contains("maxItems") && s.contains("minItems") && s["minItems"] > s["maxItems"])
      s.erase("maxItems");
  }
  void any_of(ordered_json& s, int depth) {
    if (chance(r_, 30)) {
      s["type"] = ordered_json::array({"string", "null", "integer"});
      return;
    }
    if (chance(r_, 30)) {
      s["oneOf"] = ordered_json::array();
      for (const char* t : {"p", "q"})
        s["oneOf"].push_back({{"type", "object"},
                              {"properties", {{"kind", {{"const", t}}}, {"v", make(depth - 1)}}},
                              {"required", {"kind"}},
                              {"additionalProperties", false}});
      return;
    }
    s["anyOf"] = ordered_json::array();
    for (int64_t i = r_.next_int(1, 3); i > 0; --i) s["anyOf"].push_back(make(depth - 1));
  }
  void object(ordered_json& s, int depth) {
    s["type"] = "object";
    if (chance(r_, 85)) {
      s["properties"] = ordered_json::object();
      s["required"] = ordered_json::array();
      for (int64_t i = r_.next_int(0, 4); i > 0; --i) {
        const std::string name = pick(r_, kNames);
        if (s["properties"].contains(name)) continue;
        s["properties"][name] = make(depth - 1);
        if (chance(r_, 50)) s["required"].push_back(name);
      }
    }
    if (chance(r_, 30))
      s["additionalProperties"] = false;
    else if (chance(r_, 30))
      s["additionalProperties"] = chance(r_, 30) ? ordered_json(true) : make(depth - 1);
  }

  Random& r_;
};

class Instance {
 public:
  Instance(const ordered_json& root, Random& r) : root_(root), r_(r) {}
  std::optional<std::string> of(const ordered_json& s, int depth) {
    if (depth > 12) return std::nullopt;
    if (s.is_boolean()) return any(depth);
    if (s.contains("$ref"))
      return of(root_.at(ordered_json::json_pointer(s["$ref"].get<std::string>().substr(1))), depth + 1);
    for (const char* k : {"anyOf", "oneOf"})
      if (s.contains(k))
        return of(s[k][static_cast<size_t>(r_.next_int(0, static_cast<int64_t>(s[k].size()) - 1))],
                  depth + 1);
    if (s.contains("const")) return spaced(s["const"]);
    if (s.contains("enum"))
      return spaced(
          s["enum"][static_cast<size_t>(r_.next_int(0, static_cast<int64_t>(s["enum"].size()) - 1))]);
    if (!s.contains("type")) return any(depth);
    const ordered_json t =
        s["type"].is_array()
            ? s["type"][static_cast<size_t>(r_.next_int(0, static_cast<int64_t>(s["type"].size()) - 1))]
            : s["type"];
    if (t == "null") return "null";
    if (t == "boolean") return chance(r_, 50) ? "true" : "false";
    if (t == "integer") return integer(s);
    if (t == "number") return number(s);
    if (t == "string") return string(s);
    return t == "array" ? array(s, depth) : object(s, depth);
  }

 private:
  std::string space() { return chance(r_, 50) ? " " : ""; }
  std::string spaced(const ordered_json& v) {
    if (!v.is_structured() || v.empty()) return v.dump();
    std::string out(1, v.is_array() ? '[' : '{');
    bool first = true;
    for (const auto& [k, x] : v.items()) {
      if (!first) out += "," + space();
      first = false;
      if (v.is_object()) out += ordered_json(k).dump() + ":" + space();
      out += spaced(x);
    }
    return out + (v.is_array() ? ']' : '}');
  }
  std::string any(int depth) {
    switch (r_.next_int(0, depth > 3 ? 3 : 5)) {
      case 0:
        return "null";
      case 1:
        return pick(r_,
                    std::vector<std::string>{"0", "-1", "12.5", "1e5", "-0.25E-7", "-0", "999999999999999"});
      case 2:
        return "true";
      case 3:
        return pick(r_, std::vector<std::string>{"\"\"", "\"a\\u00e9\\/\"", "\"\\ud83d\\ude00\"", "\"日本\"",
                                                 "\"\\\"\\\\\\b\""});
      case 4: {
        std::string out = "[";
        for (int64_t i = r_.next_int(0, 3), n = i; i > 0; --i)
          out += (i == n ? "" : "," + space()) + any(depth + 1);
        return out + "]";
      }
      default: {
        std::string out = "{";
        std::set<std::string> used;
        for (int64_t i = r_.next_int(0, 3); i > 0; --i) {
          const std::string k = ordered_json(pick(r_, kNames)).dump();
          if (!used.insert(k).second) continue;
          out += (used.size() == 1 ? "" : "," + space()) + k + ":" + space() + any(depth + 1);
        }
        return out + "}";
      }
    }
  }
  template <class T>
  std::pair<T, T> bounds(const ordered_json& s, T low, T high, T step) {
    if (s.contains("minimum")) low = s["minimum"].get<T>();
    if (s.contains("exclusiveMinimum")) low = s["exclusiveMinimum"].get<T>() + step;
    if (s.contains("maximum")) high = s["maximum"].get<T>();
    if (s.contains("exclusiveMaximum")) high = s["exclusiveMaximum"].get<T>() - step;
    return {low, high};
  }
  std::optional<std::string> integer(const ordered_json& s) {
    const auto [low, high] = bounds<int64_t>(s, -99999, 99999, 1);
    if (low > high) return std::nullopt;
    return std::to_string(chance(r_, 20) ? low : chance(r_, 20) ? high : r_.next_int(low, high));
  }
  std::optional<std::string> number(const ordered_json& s) {
    // Multiples of 1/64 are exact in both forms.
    const auto [low, high] = bounds<double>(s, -9999, 9999, 1.0 / 64);
    if (low > high) return std::nullopt;
    const auto n = r_.next_int(static_cast<int64_t>(low * 64), static_cast<int64_t>(high * 64));
    const double v = chance(r_, 20) ? low : chance(r_, 20) ? high : static_cast<double>(n) / 64;
    if (v < low || v > high) return std::nullopt;
    std::string text = fmt::format("{:.6f}", v);
    if (chance(r_, 50))
      while (text.back() == '0' || text.back() == '.') {
        const bool point = text.back() == '.';
        text.pop_back();
        if (point) break;
      }
    return text;
  }
  std::optional<std::string> string(const ordered_json& s) {
    if (s.contains("pattern")) {
      static const std::map<std::string, std::vector<std::string>> known = {
          {kPatterns[0], {"a", "abc"}},
          {kPatterns[1], {"123-4567"}},
          {kPatterns[2], {"x", "axé\\n\\u0001x"}},
          {kPatterns[3], {"", "foobarfoo"}},
          {kPatterns[4], {"éé", "ab日c", "\\n\\t"}},
          {kPatterns[5], {"abc", "\\\"a😀c"}},
          {kPatterns[6], {"a@b", "me_1@x2"}}};
      return "\"" + pick(r_, known.at(s["pattern"].get<std::string>())) + "\"";
    }
    const int64_t min = s.value("minLength", int64_t{0}), max = s.value("maxLength", min + 5);
    std::string out = "\"";
    for (int64_t n = r_.next_int(min, max); n > 0; --n)
      out += pick(r_, std::vector<std::string>{"a", "Z", " ", "é", "日", "😀", "\\n", "\\\"", "\\u00e9",
                                               "\\uD83D\\uDE00", "\\/", "{", "]", ","});
    return out + "\"";
  }
  std::optional<std::string> array(const ordered_json& s, int depth) {
    const int64_t prefix = s.contains("prefixItems") ? static_cast<int64_t>(s["prefixItems"].size()) : 0;
    const int64_t min = s.value("minItems", int64_t{0});
    int64_t max = s.value("maxItems", std::max(min, prefix) + 2);
    if (s.contains("items") && s["items"] == false) max = std::min(max, prefix);
    std::string out = "[";
    for (int64_t i = 0, n = r_.next_int(min, std::max(min, max)); i < n; ++i) {
      const auto item = i < prefix            ? of(s["prefixItems"][static_cast<size_t>(i)], depth + 1)
                        : s.contains("items") ? of(s["items"], depth + 1)
                                              : any(depth + 1);
      if (!item) return std::nullopt;
      out += (i == 0 ? "" : "," + space()) + *item;
    }
    return out + "]";
  }
  std::optional<std::string> object(const ordered_json& s, int depth) {
    std::string out = "{";
    bool first = true;
    const auto add = [&](const std::string& name, const std::string& v) {
      out += (first ? "" : "," + space()) + ordered_json(name).dump() + ":" + space() + v;
      first = false;
    };
    std::set<std::string> required, used;
    if (s.contains("required"))
      for (const auto& n : s["required"]) required.insert(n.get<std::string>());
    if (s.contains("properties"))
      for (const auto& [name, x] : s["properties"].items()) {
        used.insert(name);
        if (!required.contains(name) && chance(r_, 50)) continue;
        const auto v = of(x, depth + 1);
        if (!v) return std::nullopt;
        add(name, *v);
      }
    const bool open =
        s.contains("additionalProperties") ? s["additionalProperties"] != false : !s.contains("properties");
    for (int64_t i = open ? r_.next_int(0, 3) : 0; i > 0; --i) {
      const std::string name = pick(r_, kNames);
      if (!used.insert(name).second) continue;
      const auto v =
          s.contains("additionalProperties") ? of(s["additionalProperties"], depth + 1) : any(depth + 1);
      if (!v) return std::nullopt;
      add(name, *v);
    }
    return out + "}";
  }

  const ordered_json& root_;
  Random& r_;
};

}  // namespace

ListTokenizer::ListTokenizer(std::vector<std::string> tokens)
    : Tokenizer(static_cast<int64_t>(tokens.size()) + 20, static_cast<int32_t>(tokens.size()),
                specials_from(static_cast<int32_t>(tokens.size()))),
      tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) ids_.emplace(tokens_[i], static_cast<int32_t>(i));
}

void ListTokenizer::append_plain(std::string_view text, std::vector<int32_t>& out) const {
  while (!text.empty()) {
    size_t n = std::min<size_t>(text.size(), 24);
    while (n > 1 && !ids_.contains(text.substr(0, n))) --n;
    out.push_back(ids_.find(text.substr(0, n))->second);
    text.remove_prefix(n);
  }
}

std::string ListTokenizer::token(int32_t id) const {
  PERIGEE_CHECK(in_range(id), "token {}", id);
  return is_special(id) ? special_name(id) : tokens_[static_cast<size_t>(id)];
}

std::unique_ptr<ListTokenizer> crossing_vocabulary(size_t count, uint64_t seed) {
  Random r(seed);
  const std::vector<std::string> pieces = {
      "\"",  "\"",   "\"",  ",",   ":",    "{",    "}",        "[",    "]",    " ",   "\\",
      "\\u", "\\\"", "a",   "b",   "e",    "name", "value",    "true", "null", "1",   "0",
      ".",   "-",    "12",  "é",   "日",   "😀",    "\xF0\x9F", "\xC3", "foo",  "bar", "yes",
      "-",   "@",    "x y", "\\n", "d83d", "00e9", "kind",     "id",   "/",    "fal", "q"};
  std::set<std::string> tokens;
  std::vector<std::string> list;
  const auto add = [&](const std::string& t) {
    if (tokens.insert(t).second) list.push_back(t);
  };
  for (int b = 0; b < 256; ++b) add(std::string(1, static_cast<char>(b)));
  while (list.size() < count) {
    std::string t;
    for (int64_t n = r.next_int(1, 5); n > 0; --n) t += pick(r, pieces);
    add(t);
    if (chance(r, 60)) {
      std::string word;
      for (int64_t n = r.next_int(2, 9); n > 0; --n) word += static_cast<char>('a' + r.next_int(0, 25));
      add(chance(r, 50) ? " " + word : word);
    }
  }
  list.resize(count);
  return std::make_unique<ListTokenizer>(std::move(list));
}

ordered_json random_schema(Random& r) {
  ordered_json s = Maker(r).make(static_cast<int>(r.next_int(0, 3)));
  if (chance(r, 15)) {
    // A list of itself: recursion with an end.
    s = {{"$defs",
          {{"leaf", s},
           {"node",
            {{"type", "object"},
             {"properties",
              {{"v", {{"$ref", "#/$defs/leaf"}}},
               {"next", {{"anyOf", {{{"type", "null"}}, {{"$ref", "#/$defs/node"}}}}}}}},
             {"required", {"v"}},
             {"additionalProperties", false}}}}},
         {"$ref", "#/$defs/node"}};
  }
  return s;
}

std::optional<std::string> random_instance(const ordered_json& schema, Random& r) {
  return Instance(schema, r).of(schema, 0);
}

std::vector<int32_t> random_tokens(const Tokenizer& t, std::string_view text, Random& r) {
  std::vector<int32_t> out;
  while (!text.empty()) {
    const size_t n = std::min<size_t>(text.size(), static_cast<size_t>(r.next_int(1, 12)));
    t.append_plain(text.substr(0, n), out);
    text.remove_prefix(n);
  }
  return out;
}

}  // namespace perigee::policy
