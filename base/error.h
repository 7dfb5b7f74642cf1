// Errors, in three kinds (docs/architecture.md, "Errors"):
//   a bug                 PERIGEE_CHECK fails: always on; std::logic_error with the values and the place
//   an expected outcome   is a returned value (std::optional, an enum), never an exception
//   a broken environment  perigee::Error: shown to the user as one line that says what, where, and what to do
#pragma once
#if !defined(__CUDACC__)
#include <fmt/format.h>
#endif

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

// Device sources see checks, without their values, and no formatting: nvcc cannot evaluate fmt's check of format
// strings, so the lines a user reads are written in host sources.
#if !defined(__CUDACC__)
template <class... A>
[[noreturn]] void throw_input(fmt::format_string<A...> format, A&&... a) {
  throw Error(Error::Kind::kInput, fmt::format(format, std::forward<A>(a)...));
}
template <class... A>
[[noreturn]] void throw_environment(fmt::format_string<A...> format, A&&... a) {
  throw Error(Error::Kind::kEnvironment, fmt::format(format, std::forward<A>(a)...));
}
#endif

[[noreturn]] inline void check_failed(const char* file, int line, const char* condition,
                                      const std::string& values) {
  throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": check failed: " + condition +
                         (values.empty() ? "" : ": ") + values);
}

}  // namespace perigee

#if defined(__CUDACC__)
#define PERIGEE_CHECK(condition, ...)                                                                     \
  do {                                                                                                    \
    if (!(condition)) [[unlikely]]                                                                        \
      ::perigee::check_failed(__FILE__, __LINE__, #condition, {});                                        \
  } while (0)
#else
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
#endif
