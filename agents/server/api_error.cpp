#include "agents/server/api_error.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

ApiError::ApiError(int s, std::string m, std::string p, std::string c)
    : status(s), message(std::move(m)), type(error_type(s)), param(std::move(p)), code(std::move(c)) {}

std::string_view error_type(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 409:
      return "conflict_error";
    case 429:
      return "rate_limit_error";
    default:
      return status >= 500 ? "server_error" : "invalid_request_error";
  }
}

std::string ApiError::body() const {
  const auto text = [](const std::string& s) { return s.empty() ? ordered_json(nullptr) : ordered_json(s); };
  ordered_json error;
  error["message"] = message;
  error["type"] = type;
  error["param"] = text(param);
  error["code"] = text(code);
  return ordered_json{{"error", std::move(error)}}.dump(-1, ' ', false,
                                                        ordered_json::error_handler_t::replace);
}

net::http::Answer ApiError::answer() const {
  net::http::Answer out{status, body()};
  if (!retry) out.headers.emplace_back("x-should-retry", "false");
  if (status == 401) out.headers.emplace_back("WWW-Authenticate", "Bearer");
  return out;
}

Fields::Fields(const json& value, std::string path) : value_(value), path_(std::move(path)) {
  if (!value.is_object())
    refuse(path_, "{}: an object is expected, not {}", path_.empty() ? "the body" : path_,
           json_type_name(value));
}

std::string Fields::path(std::string_view key) const {
  return path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
}

const json* Fields::find(std::string_view key) {
  known_.emplace(key);
  const auto at = value_.find(key);
  return at == value_.end() || at->is_null() ? nullptr : &*at;
}

const json& Fields::need(std::string_view key) {
  const json* v = find(key);
  if (v == nullptr) {
    ApiError e(400, fmt::format("Missing required parameter: '{}'.", path(key)), path(key),
               "missing_required_parameter");
    throw e;
  }
  return *v;
}

namespace {
[[noreturn]] void wrong_type(const std::string& path, std::string_view wanted, const json& got) {
  throw ApiError(
      400, fmt::format("Invalid type for '{}': {} is expected, not {}.", path, wanted, json_type_name(got)),
      path, "invalid_type");
}
template <class T>
[[noreturn]] void wrong_range(const std::string& path, const json& got, T lo, T hi) {
  throw ApiError(
      400, fmt::format("Invalid value for '{}': {} is not within [{}, {}].", path, json_brief(got), lo, hi),
      path, "invalid_value");
}
}  // namespace

std::optional<int64_t> Fields::integer(std::string_view key, int64_t lo, int64_t hi) {
  const json* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_number_integer()) wrong_type(path(key), "a whole number", *v);
  if (v->is_number_unsigned() && v->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
    wrong_range(path(key), *v, lo, hi);
  const int64_t x = v->get<int64_t>();
  if (x < lo || x > hi) wrong_range(path(key), *v, lo, hi);
  return x;
}

std::optional<double> Fields::number(std::string_view key, double lo, double hi) {
  const json* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_number()) wrong_type(path(key), "a number", *v);
  const double x = v->get<double>();
  if (!std::isfinite(x) || x < lo || x > hi) wrong_range(path(key), *v, lo, hi);
  return x;
}

std::optional<bool> Fields::boolean(std::string_view key) {
  const json* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_boolean()) wrong_type(path(key), "true or false", *v);
  return v->get<bool>();
}

std::optional<std::string> Fields::string(std::string_view key, size_t max_bytes) {
  const json* v = find(key);
  if (v == nullptr) return std::nullopt;
  if (!v->is_string()) wrong_type(path(key), "a text", *v);
  if (v->get_ref<const std::string&>().size() > max_bytes)
    refuse(path(key), "'{}' is longer than {} bytes", path(key), max_bytes);
  return v->get<std::string>();
}

void Fields::ignore(std::initializer_list<std::string_view> keys) {
  for (const std::string_view key : keys) known_.emplace(key);
}

void Fields::unsupported(std::string_view key, std::initializer_list<json> harmless) {
  const json* v = find(key);
  if (v == nullptr || std::find(harmless.begin(), harmless.end(), *v) != harmless.end()) return;
  throw ApiError(400,
                 fmt::format("Unsupported parameter: '{}' cannot be {} here.", path(key), json_brief(*v)),
                 path(key), "unsupported_parameter");
}

void Fields::finish() const {
  for (const auto& [key, unused] : value_.items()) {
    if (known_.contains(key)) continue;
    const std::vector<std::string> names(known_.begin(), known_.end());
    throw ApiError(
        400,
        fmt::format("Unrecognized request argument supplied: {}{}", quote(key), did_you_mean(key, names)),
        path(key), "unknown_parameter");
  }
}

namespace {

constexpr size_t kMaxDepth = 100;
constexpr int64_t kMaxValues = 2'000'000;  // a value takes 16 bytes and more, however few it is written with

[[noreturn]] void not_json(const std::string& why) {
  throw ApiError(400, "We could not parse the JSON body of your request: " + why, "", "invalid_json");
}

// Builds a value from the events of the parser. (The library's own callback looks at all members of a list after each
// object in it: a long list would take hours.) J: json, which finds a key that stands twice; ordered_json, which keeps the
// order of keys and holds at most max_keys of them in an object.
template <class J>
class Builder {
 public:
  Builder(const std::set<std::string>* only, size_t max_keys) : only_(only), max_keys_(max_keys) {}
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
      if (!fresh) not_json(fmt::format("the key {} stands twice in one object", quote(at->first)));
      value_ = &at->second;
    } else {
      if (object.size() >= max_keys_)
        throw ApiError(400, fmt::format("an object with more than {} keys is not taken here", max_keys_));
      object.emplace_back(std::move(key), J());
      value_ = &object.back().second;
    }
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& e) {
    std::string line = e.what();
    if (const size_t end = line.find("] "); end != std::string::npos) line.erase(0, end + 2);
    const std::string shown = quote(line, 200);
    not_json(shown.substr(1, shown.size() - 2));
  }

 private:
  bool add(J v) { return place(std::move(v)) != nullptr; }
  // Where it stands now; anything but null when it is left out.
  J* place(J v) {
    if (++values_ > kMaxValues) not_json(fmt::format("it holds more than {} values", kMaxValues));
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
    if (open_.size() + static_cast<size_t>(skipped_) >= kMaxDepth)
      not_json(fmt::format("nested deeper than {} levels", kMaxDepth));
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

  const std::set<std::string>* only_;
  const size_t max_keys_;
  J root_;
  std::vector<J*> open_;  // a list's members do not move while one of them is open
  J* value_ = nullptr;    // of the key that was read last
  int64_t values_ = 0;
  int skipped_ = 0;  // open ones of what is left out
  bool skip_next_ = false;
};

template <class J>
J build(std::string_view body, const std::set<std::string>* only, size_t max_keys) {
  Builder<J> builder(only, max_keys);
  J::sax_parse(body.begin(), body.end(), &builder);
  return builder.take();
}

}  // namespace

json parse_body(std::string_view body) {
  return build<json>(body, nullptr, 0);
}

ordered_json parse_ordered(std::string_view body, const std::set<std::string>& keys, size_t max_keys) {
  return build<ordered_json>(body, &keys, max_keys);
}

}  // namespace perigee::agents
