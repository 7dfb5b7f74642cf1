// What a request is refused with, in the shape that clients of the OpenAI API expect, and a reader of typed fields that
// refuses with it.
#pragma once
#include <fmt/format.h>

#include <cstdint>
#include <exception>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/net/http/server.h"

namespace perigee::agents {

struct ApiError : std::exception {
  int status = 400;
  std::string message;
  std::string type;
  std::string param;  // "": null
  std::string code;   // "": null
  bool retry = true;  // false: says x-should-retry: false, for a 409 or 503 that trying again cannot mend

  ApiError(int status, std::string message, std::string param = "", std::string code = "");
  const char* what() const noexcept override { return message.c_str(); }
  // {"error":{"message":...,"type":...,"param":...,"code":...}}
  std::string body() const;
  net::http::Answer answer() const;
};
// "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "conflict_error",
// "rate_limit_error", "server_error": by status.
std::string_view error_type(int status);

// 400 with the parameter's name.
template <class... A>
[[noreturn]] void refuse(const std::string& param, fmt::format_string<A...> format, A&&... a) {
  throw ApiError(400, fmt::format(format, std::forward<A>(a)...), param);
}

// A JSON object of a request, read key by key. Null is as good as absent. finish() refuses what nobody asked for.
// The object outlives the reader.
class Fields {
 public:
  // path: "" for the body itself. Throws ApiError when value is no object.
  Fields(const nlohmann::json& value, std::string path);

  const nlohmann::json* find(std::string_view key);  // null when absent or JSON null
  const nlohmann::json& need(std::string_view key);
  std::optional<int64_t> integer(std::string_view key, int64_t lo, int64_t hi);
  std::optional<double> number(std::string_view key, double lo, double hi);
  std::optional<bool> boolean(std::string_view key);
  std::optional<std::string> string(std::string_view key, size_t max_bytes = size_t{1} << 30);
  bool is_true(std::string_view key) { return boolean(key).value_or(false); }

  // Keys of the API that mean nothing here and change nothing by that.
  void ignore(std::initializer_list<std::string_view> keys);
  // Keys of the API that would change the answer and are not there: refused unless null or one of the harmless values.
  void unsupported(std::string_view key, std::initializer_list<nlohmann::json> harmless = {});
  void finish() const;
  std::string path(std::string_view key) const;

 private:
  const nlohmann::json& value_;
  std::string path_;
  std::set<std::string, std::less<>> known_;
};

// The body of a request. ERRORS (ApiError): not JSON, not UTF-8, nested too deep, a key twice.
nlohmann::json parse_body(std::string_view body);
// The values of some keys of the same body with the keys inside in the order they were written; objects with more than
// max_keys keys are refused. REQUIRES parse_body took it.
nlohmann::ordered_json parse_ordered(std::string_view body, const std::set<std::string>& keys,
                                     size_t max_keys = 1000);

}  // namespace perigee::agents
