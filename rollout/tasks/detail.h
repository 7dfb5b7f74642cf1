// Between tasks.cpp and the generators.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "base/json.h"
#include "base/random.h"
#include "rollout/tasks/tasks.h"

namespace perigee::rollout {

// A problem with the text that decides its side: equal for problems that are the same in another order.
struct Problem {
  std::string canonical;
  Task task;
  // Of a task that takes long to write: makes it, for the problem that is taken. Empty: it is there. The generator
  // outlives it.
  std::function<Task()> finish = {};
};

// Of the prompts of palindrome, mqar and stack.
constexpr int64_t kMaxSyntheticLength = int64_t{1} << 20;

// One level of a generator. Thread safety: const calls from several threads at once.
class Generator {
 public:
  virtual ~Generator() = default;
  virtual Problem draw(Random& random) const = 0;
};

// The operators and operands of a problem whatever their order; that of a generator of arithmetic.
std::string canonical_arithmetic(std::span<const int64_t> operands, std::string_view operators);

// Read their options; the caller finishes the reader.
std::unique_ptr<Generator> make_arithmetic(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_countdown_tasks(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_sort(JsonReader& options, const WorkedStyle& style);
// For environments (docs/environments.md).
std::unique_ptr<Generator> make_calculate(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_sql_tasks(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_document(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_code_tasks(JsonReader& options, const WorkedStyle& style);
// The report's synthetic tasks (docs/tasks.md).
std::unique_ptr<Generator> make_palindrome(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_mqar(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<Generator> make_stack(JsonReader& options, const WorkedStyle& style);
std::unique_ptr<TaskSource> make_jsonl(JsonReader& options, uint64_t seed);

}  // namespace perigee::rollout
