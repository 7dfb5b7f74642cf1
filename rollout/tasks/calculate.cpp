// Arithmetic too large for the policy's head: an environment with the calculator answers it.
#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

int64_t power_of_10(int64_t n) {
  int64_t p = 1;
  while (n-- > 0) p *= 10;
  return p;
}

class Calculate : public Generator {
 public:
  explicit Calculate(JsonReader& options) {
    max_digits_ = options.integer("max_digits", 1, 9, 5);
    min_digits_ = options.integer("min_digits", 1, max_digits_, std::min<int64_t>(3, max_digits_));
    max_operands_ = options.integer("max_operands", 2, 8, 2);
    min_operands_ = options.integer("min_operands", 2, max_operands_, 2);
    operators_ = options.string("operators", "+-*");
    call_share_ = options.number("call_share", 0, 1, 1);
    if (operators_.empty() || operators_.find_first_not_of("+-*") != operators_.npos)
      options.fail("operators", fmt::format("some of + - * are expected, not {}", quote(operators_)));
    if (operators_.find('*') != operators_.npos && max_digits_ * max_operands_ > 17)
      options.fail("max_digits", "products of so many digits are beyond 64 bits");
  }

  Problem draw(Random& random) const override {
    std::vector<int64_t> operands;
    std::string operators;
    for (int64_t n = random.next_int(min_operands_, max_operands_); n > 0; --n) {
      const int64_t digits = random.next_int(min_digits_, max_digits_);
      operands.push_back(random.next_int(digits == 1 ? 0 : power_of_10(digits - 1), power_of_10(digits) - 1));
    }
    while (operators.size() + 1 < operands.size())
      operators +=
          operators_[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(operators_.size()) - 1))];
    std::string expression = std::to_string(operands[0]);
    for (size_t i = 0; i < operators.size(); ++i)
      expression += operators[i] + std::to_string(operands[i + 1]);

    Problem problem;
    Task& task = problem.task;
    task.prompt = expression;
    task.answer = std::to_string(arithmetic_value(operands, operators));
    task.verifier = "numeric";
    if (random.next_float() < call_share_) {
      const nlohmann::json arguments = {{"expression", expression}};
      task.worked_turns.push_back({policy::Role::kAssistant, "", {{"", "calculator", arguments.dump()}}});
    }
    task.worked_turns.push_back({policy::Role::kAssistant, task.answer});
    problem.canonical = canonical_arithmetic(operands, operators);
    return problem;
  }

 private:
  int64_t min_digits_, max_digits_, min_operands_, max_operands_;
  std::string operators_;
  double call_share_ = 1;
};

}  // namespace

std::unique_ptr<Generator> make_calculate(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Calculate>(options);
}

}  // namespace perigee::rollout
