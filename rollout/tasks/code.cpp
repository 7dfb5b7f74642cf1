// Small functions to write in Python, judged by hidden tests (reward/code.cpp): a list is filtered, mapped and reduced. The
// expected results are computed here, in C++; no policy and no sandbox ever sees them.
#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

struct Step {
  std::string words, python;
  int kind;
  int64_t k;
};

bool keeps(const Step& s, int64_t x) {
  switch (s.kind) {
    case 0:
      return x % 2 == 0;
    case 1:
      return x % 2 != 0;
    case 2:
      return x > s.k;
    case 3:
      return x < s.k;
    case 4:
      return x % s.k == 0;
    default:
      return true;
  }
}

int64_t mapped(const Step& s, int64_t x) {
  switch (s.kind) {
    case 0:
      return x * x;
    case 1:
      return x * s.k;
    case 2:
      return x + s.k;
    case 3:
      return std::abs(x);
    default:
      return -x;
  }
}

int64_t reduced(const Step& s, const std::vector<int64_t>& list) {
  int64_t sum = 0, best = list.empty() ? 0 : list[0];
  for (const int64_t x : list) {
    sum += x;
    best = s.kind == 1 ? std::max(best, x) : std::min(best, x);
  }
  return s.kind == 0 ? sum : s.kind == 3 ? static_cast<int64_t>(list.size()) : best;
}

Step draw_filter(Random& random) {
  const int64_t k = random.next_int(2, 9);
  switch (random.next_int(0, 5)) {
    case 0:
      return {"are even", "x % 2 == 0", 0, 0};
    case 1:
      return {"are odd", "x % 2 != 0", 1, 0};
    case 2:
      return {fmt::format("are greater than {}", k), fmt::format("x > {}", k), 2, k};
    case 3:
      return {fmt::format("are less than {}", k), fmt::format("x < {}", k), 3, k};
    case 4:
      return {fmt::format("are multiples of {}", k), fmt::format("x % {} == 0", k), 4, k};
    default:
      return {"are numbers (all of them)", "True", 5, 0};
  }
}

Step draw_map(Random& random) {
  const int64_t k = random.next_int(2, 9);
  switch (random.next_int(0, 4)) {
    case 0:
      return {"squares each of them", "x * x", 0, 0};
    case 1:
      return {fmt::format("multiplies each by {}", k), fmt::format("x * {}", k), 1, k};
    case 2:
      return {fmt::format("adds {} to each", k), fmt::format("x + {}", k), 2, k};
    case 3:
      return {"takes the absolute value of each", "abs(x)", 3, 0};
    default:
      return {"negates each", "-x", 4, 0};
  }
}

Step draw_reduce(Random& random) {
  switch (random.next_int(0, 3)) {
    case 0:
      return {"their sum", "sum({})", 0, 0};
    case 1:
      return {"the largest, or 0 when there is none", "max({}, default=0)", 1, 0};
    case 2:
      return {"the smallest, or 0 when there is none", "min({}, default=0)", 2, 0};
    default:
      return {"how many there are", "len(list({}))", 3, 0};
  }
}

class Code : public Generator {
 public:
  explicit Code(JsonReader& options) {
    tests_ = options.integer("tests", 1, 1000, 12);
    max_length_ = options.integer("max_length", 1, 10000, 12);
  }

  Problem draw(Random& random) const override {
    const Step filter = draw_filter(random), map = draw_map(random), reduce = draw_reduce(random);
    nlohmann::json tests = nlohmann::json::array();
    for (int64_t t = 0; t < tests_; ++t) {
      // The empty list is always among them.
      std::vector<int64_t> list(static_cast<size_t>(t == 0 ? 0 : random.next_int(1, max_length_))), kept;
      for (auto& x : list) x = random.next_int(-30, 30);
      for (const int64_t x : list)
        if (keeps(filter, x)) kept.push_back(mapped(map, x));
      tests.push_back({{"arguments", nlohmann::json::array({list})}, {"result", reduced(reduce, kept)}});
    }
    Problem problem;
    Task& task = problem.task;
    problem.canonical = "code " + filter.python + " " + map.python + " " + reduce.python;
    task.prompt = fmt::format(
        "Write a Python function solve(numbers). Of a list of whole numbers it keeps those that {}, {}, and "
        "returns {}. "
        "Answer with the function in a block ```python.",
        filter.words, map.words, reduce.words);
    task.verifier = "code";
    task.answer = nlohmann::json{{"function", "solve"}, {"tests", std::move(tests)}}.dump();
    const std::string list = fmt::format("({} for x in numbers if {})", map.python, filter.python);
    const size_t hole = reduce.python.find("{}");
    const std::string body = reduce.python.substr(0, hole) + list + reduce.python.substr(hole + 2);
    const std::string code = "def solve(numbers):\n    return " + body + "\n";
    const nlohmann::json arguments = {{"code", code + "print(solve([1, 2, -3]))\n"}};
    task.worked_turns = {{policy::Role::kAssistant, "", {{"", "python", arguments.dump()}}},
                         {policy::Role::kAssistant, "```python\n" + code + "```"}};
    return problem;
  }

 private:
  int64_t tests_, max_length_;
};

}  // namespace

std::unique_ptr<Generator> make_code_tasks(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Code>(options);
}

}  // namespace perigee::rollout
