// Errors, in three kinds (docs/architecture.md, "Errors"):
//   a bug                 PERIGEE_CHECK fails: always on; std::logic_error with the values and the place
//   an expected outcome   is a returned value (std::optional, an enum), never an exception
//   a broken environment  perigee::Error: shown to the user as one line that says what, where, and what to do
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace perigee {

// Thrown for bad input or a broken environment; caught in apps/ and at thread roots.
class Error : public std::runtime_error {
 public:
  // kInput: the user's words or files are wrong; trying again will not help.
  // kEnvironment: the machine or a file failed us: a full disk, a port in use, no memory.
  // A command ends with exit code 2 for both. A role's process ends with exit_code(), by which its supervisor decides
  // whether to start it again.
  enum class Kind { kInput, kEnvironment };
  Error(Kind kind, const std::string& line) : std::runtime_error(line), kind_(kind) {}
  Kind kind() const { return kind_; }
  int exit_code() const { return kind_ == Kind::kInput ? 2 : 1; }

 private:
  Kind kind_;
};

template <class... A>
[[noreturn]] void throw_input(fmt::format_string<A...> format, A&&... a) {
  throw Error(Error::Kind::kInput, fmt::format(format, std::forward<A>(a)...));
}
template <class... A>
[[noreturn]] void throw_environment(fmt::format_string<A...> format, A&&... a) {
  throw Error(Error::Kind::kEnvironment, fmt::format(format, std::forward<A>(a)...));
}

[[noreturn]] inline void check_failed(const char* file, int line, const char* condition,
                                      const std::string& values) {
  throw std::logic_error(
      fmt::format("{}:{}: check failed: {}{}{}", file, line, condition, values.empty() ? "" : ": ", values));
}

}  // namespace perigee

// A precondition. PERIGEE_CHECK(rows <= capacity, "rows {} capacity {}", rows, capacity);
#define PERIGEE_CHECK(condition, ...)                                                                  \
  do {                                                                                                 \
    if (!(condition)) [[unlikely]]                                                                     \
      ::perigee::check_failed(__FILE__, __LINE__, #condition, ::perigee::detail::values(__VA_ARGS__)); \
  } while (0)

namespace perigee::detail {
inline std::string values() {
  return {};
}
template <class... A>
std::string values(fmt::format_string<A...> format, A&&... a) {
  return fmt::format(format, std::forward<A>(a)...);
}
}  // namespace perigee::detail
