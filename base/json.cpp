#include "base/json.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/text.h"

namespace perigee {

using nlohmann::json;

namespace {

using nlohmann::ordered_json;

// Builds a value from the events of the parser. (The library's own callback looks at all members of a list after each
// object in it: a long list would take hours.) J: json, which finds a key that stands twice; ordered_json, which keeps the
// order of keys and holds at most max_keys of them in an object.
template <class J>
class Builder {
 public:
  Builder(std::string_view where, const JsonOptions& options, const std::set<std::string>* only,
          size_t max_keys)
      : where_(where), options_(options), only_(only), max_keys_(max_keys) {}
  J take() { return std::move(root_); }

  bool null() { return add(J(nullptr)); }
  bool boolean(bool v) { return add(J(v)); }
  bool number_integer(int64_t v) { return add(J(v)); }
  bool number_unsigned(uint64_t v) { return add(J(v)); }
  bool number_float(double v, const std::string&) { return add(J(v)); }
  bool string(std::string& v) { return add(J(std::move(v))); }
  bool binary(typename J::binary_t&) { return false; }
  bool start_object(size_t) { return open(J::object()); }
  bool start_array(size_t) { return open(J::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& key) {
    if (skipped_ > 0) return true;
    if (open_.size() == 1 && only_ != nullptr && !only_->contains(key)) {
      skip_next_ = true;
      return true;
    }
    auto& object = open_.back()->template get_ref<typename J::object_t&>();
    if constexpr (std::is_same_v<J, json>) {
      const auto [at, fresh] = object.try_emplace(std::move(key));
      if (!fresh) throw_input("{}: the key {} stands twice in one object", where_, quote(at->first));
      value_ = &at->second;
    } else {
      if (object.size() >= max_keys_)
        throw_input("{}: an object with more than {} keys is not taken here", where_, max_keys_);
      object.emplace_back(std::move(key), J());
      value_ = &object.back().second;
    }
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& e) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ...": the tag helps
    // nobody, and the last token may hold bytes that a terminal should not see.
    std::string line = e.what();
    if (const size_t end = line.find("] "); end != std::string::npos) line.erase(0, end + 2);
    const std::string shown = quote(line, 200);
    throw_input("{}: not JSON: {}", where_, shown.substr(1, shown.rfind('"') - 1));
  }

 private:
  bool add(J v) { return place(std::move(v)) != nullptr; }
  // Where it stands now; anything but null when it is left out.
  J* place(J v) {
    if (++values_ > options_.max_values)
      throw_input("{}: it holds more than {} values", where_, options_.max_values);
    if (skipped_ > 0) return &root_;
    if (skip_next_) {
      skip_next_ = false;
      return &root_;
    }
    if (open_.empty()) {
      root_ = std::move(v);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& list = open_.back()->template get_ref<typename J::array_t&>();
      list.push_back(std::move(v));
      return &list.back();
    }
    *value_ = std::move(v);
    return value_;
  }
  bool open(J v) {
    if (static_cast<int>(open_.size()) + skipped_ >= options_.max_depth)
      throw_input("{}: nested deeper than {} levels", where_, options_.max_depth);
    const bool skip = skipped_ > 0 || skip_next_;
    J* at = place(std::move(v));
    if (skip)
      ++skipped_;
    else
      open_.push_back(at);
    return true;
  }
  bool close() {
    if (skipped_ > 0)
      --skipped_;
    else
      open_.pop_back();
    return true;
  }

  const std::string_view where_;
  const JsonOptions& options_;
  const std::set<std::string>* const only_;
  const size_t max_keys_;
  J root_;
  std::vector<J*> open_;  // a list's members do not move while one of them is open
  J* value_ = nullptr;    // of the key that was read last
  int64_t values_ = 0;
  int skipped_ = 0;  // open ones of what is left out
  bool skip_next_ = false;
};

template <class J>
J build(std::string_view text, std::string_view where, const JsonOptions& options,
        const std::set<std::string>* only, size_t max_keys) {
  Builder<J> builder(where, options, only, max_keys);
  J::sax_parse(text.begin(), text.end(), &builder, nlohmann::detail::input_format_t::json, true,
               options.comments);
  return builder.take();
}

}  // namespace

json parse_json(std::string_view text, std::string_view where, const JsonOptions& options) {
  return build<json>(text, where, options, nullptr, 0);
}

ordered_json parse_json_ordered(std::string_view text, std::string_view where,
                                const std::set<std::string>& only, size_t max_keys,
                                const JsonOptions& options) {
  return build<ordered_json>(text, where, options, &only, max_keys);
}

std::string json_type_name(const json& value) {
  switch (value.type()) {
    case json::value_t::null:
      return "null";
    case json::value_t::object:
      return "an object";
    case json::value_t::array:
      return "a list";
    case json::value_t::string:
      return "a text";
    case json::value_t::boolean:
      return "true or false";
    case json::value_t::number_integer:
    case json::value_t::number_unsigned:
      return "a whole number";
    case json::value_t::number_float:
      return "a number";
    default:
      return "binary";
  }
}

std::string json_brief(const json& value, size_t limit) {
  std::string s = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (s.size() <= limit) return s;
  while (limit > 0 && (static_cast<unsigned char>(s[limit]) & 0xC0) == 0x80) --limit;
  return s.substr(0, limit) + "...";
}

JsonReader::JsonReader(const json& value, std::string_view where, std::string_view prefix)
    : value_(value), where_(where), prefix_(prefix) {
  if (value.is_object()) return;
  if (prefix.empty()) throw_input("{}: an object is expected, not {}", where, json_type_name(value));
  throw_input("{}: {}: an object is expected, not {}", where, prefix, json_type_name(value));
}

// A key that nobody knows may be any bytes; messages are one line.
std::string JsonReader::path(std::string_view key) const {
  const bool plain = std::none_of(key.begin(), key.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
  const std::string shown = plain ? std::string(key) : quote(key, 120);
  return prefix_.empty() ? shown : fmt::format("{}.{}", prefix_, shown);
}

void JsonReader::fail(std::string_view key, std::string_view message) const {
  throw_input("{}: {}: {}", where_, path(key), message);
}

bool JsonReader::has(std::string_view key) const {
  const auto it = value_.find(key);
  return it != value_.end() && !it->is_null();
}

const json* JsonReader::find(std::string_view key) {
  known(key);
  const auto it = value_.find(key);
  return it == value_.end() ? nullptr : &*it;
}

const json& JsonReader::need(std::string_view key) {
  const json* v = find(key);
  if (v == nullptr) fail(key, "missing");
  return *v;
}

bool JsonReader::is_true(std::string_view key) {
  return boolean(key, false);
}

namespace {
// The integer in v, if v is one that fits; unsigned values above INT64_MAX do not.
bool as_integer(const json& v, int64_t* out) {
  if (v.is_number_unsigned() && v.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) return false;
  if (!v.is_number_integer()) return false;
  *out = v.get<int64_t>();
  return true;
}
}  // namespace

int64_t JsonReader::integer(std::string_view key, int64_t lo, int64_t hi) {
  const json& v = need(key);
  int64_t x = 0;
  if (!v.is_number_integer()) fail(key, fmt::format("a whole number is expected, not {}", json_brief(v)));
  if (!as_integer(v, &x) || x < lo || x > hi)
    fail(key, fmt::format("{} is out of range [{}, {}]", json_brief(v), lo, hi));
  return x;
}
int64_t JsonReader::integer(std::string_view key, int64_t lo, int64_t hi, int64_t absent) {
  return find(key) == nullptr ? absent : integer(key, lo, hi);
}

double JsonReader::number(std::string_view key, double lo, double hi) {
  const json& v = need(key);
  if (!v.is_number()) fail(key, fmt::format("a number is expected, not {}", json_brief(v)));
  const double x = v.get<double>();
  if (!std::isfinite(x) || x < lo || x > hi)
    fail(key, fmt::format("{} is out of range [{}, {}]", json_brief(v), lo, hi));
  return x;
}
double JsonReader::number(std::string_view key, double lo, double hi, double absent) {
  return find(key) == nullptr ? absent : number(key, lo, hi);
}

bool JsonReader::boolean(std::string_view key) {
  const json& v = need(key);
  if (!v.is_boolean()) fail(key, fmt::format("true or false is expected, not {}", json_brief(v)));
  return v.get<bool>();
}
bool JsonReader::boolean(std::string_view key, bool absent) {
  return find(key) == nullptr ? absent : boolean(key);
}

std::string JsonReader::string(std::string_view key) {
  const json& v = need(key);
  if (!v.is_string()) fail(key, fmt::format("a text in quotes is expected, not {}", json_brief(v)));
  return v.get<std::string>();
}
std::string JsonReader::string(std::string_view key, std::string_view absent) {
  return find(key) == nullptr ? std::string(absent) : string(key);
}

std::vector<int64_t> JsonReader::integers(std::string_view key, int64_t lo, int64_t hi) {
  const json& v = need(key);
  if (!v.is_array()) fail(key, fmt::format("a list of whole numbers is expected, not {}", json_brief(v)));
  std::vector<int64_t> out;
  out.reserve(v.size());
  for (const json& e : v) {
    int64_t x = 0;
    if (!e.is_number_integer())
      fail(key, fmt::format("a list of whole numbers is expected; it holds {}", json_brief(e)));
    if (!as_integer(e, &x) || x < lo || x > hi)
      fail(key, fmt::format("{} is out of range [{}, {}]", json_brief(e), lo, hi));
    out.push_back(x);
  }
  return out;
}

void JsonReader::finish() const {
  for (const auto& [key, unused] : value_.items()) {
    if (known_.contains(key)) continue;
    const std::vector<std::string> names(known_.begin(), known_.end());
    throw_input("{}: {}: unknown key{}", where_, path(key), did_you_mean(key, names));
  }
}

}  // namespace perigee
