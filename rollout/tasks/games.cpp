// Countdown and sorting.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr int kMaxTries = 20000;

template <class T>
void shuffle(std::vector<T>& items, Random& random) {
  for (size_t i = items.size(); i > 1; --i)
    std::swap(items[i - 1], items[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(i) - 1))]);
}

// "3 8 5 to 64:" -> <think>3+5=8 8*8=64</think>(3+5)*8
class CountdownTasks : public Generator {
 public:
  CountdownTasks(JsonReader& options, WorkedStyle style) : style_(std::move(style)) {
    max_numbers_ = options.integer("max_numbers", 2, 8, 4);
    min_numbers_ = options.integer("min_numbers", 2, max_numbers_, std::min<int64_t>(3, max_numbers_));
    max_number_ = options.integer("max_number", 2, 1000, 10);
    max_target_ = options.integer("max_target", 2, 1'000'000, 100);
  }

  Problem draw(Random& random) const override {
    for (int tries = 0;; ++tries) {
      if (tries == kMaxTries)
        throw_input("tasks: hardly any countdown problem fits these options; raise max_target");
      std::vector<int64_t> numbers;
      for (int64_t n = random.next_int(min_numbers_, max_numbers_); n > 0; --n)
        numbers.push_back(random.next_int(1, max_number_));
      // Left to right through a random order, keeping every value a whole number from 1 to max_target, so
      // that an answer exists.
      int64_t value = numbers[0];
      std::string expression = std::to_string(value), steps;
      bool lawful = true, sum = false;
      for (size_t i = 1; i < numbers.size() && lawful; ++i) {
        const int64_t n = numbers[i], before = value;
        const char op = "+-*/"[random.next_int(0, 3)];
        if (op == '+') value += n;
        if (op == '-') value -= n;
        if (op == '*') value *= n;
        if (op == '/') lawful = value % n == 0, value /= n;
        lawful = lawful && value >= 1 && value <= max_target_;
        const bool product = op == '*' || op == '/';
        if (product && sum) expression = "(" + expression + ")";
        expression += op + std::to_string(n);
        sum = !product;
        steps += fmt::format("{}{}{}{}={}", i > 1 ? " " : "", before, op, n, value);
      }
      if (!lawful) continue;

      shuffle(numbers, random);
      Problem problem;
      problem.task.prompt = fmt::format("{} to {}:", fmt::join(numbers, " "), value);
      problem.task.answer = fmt::format("{} from {}", value, fmt::join(numbers, " "));
      problem.task.verifier = "countdown";
      problem.task.worked_example = style_.think_open + steps + style_.think_close + expression;
      std::sort(numbers.begin(), numbers.end());
      problem.canonical = fmt::format("countdown {} {}", value, fmt::join(numbers, " "));
      return problem;
    }
  }

 private:
  WorkedStyle style_;
  int64_t min_numbers_, max_numbers_, max_number_, max_target_;
};

// "sort 5 3 9:" -> <think>5;3 5;3 5 9</think>3 5 9: each item put in its place in turn.
class Sort : public Generator {
 public:
  Sort(JsonReader& options, WorkedStyle style) : style_(std::move(style)) {
    const std::string items = options.string("items", "numbers");
    const std::array<std::string, 2> names = {"numbers", "letters"};
    if (items != names[0] && items != names[1])
      options.fail("items",
                   "numbers or letters are expected, not " + quote(items) + did_you_mean(items, names));
    letters_ = items == names[1];
    max_length_ = options.integer("max_length", 2, 64, 6);
    min_length_ = options.integer("min_length", 2, max_length_, std::min<int64_t>(3, max_length_));
    max_number_ = options.integer("max_number", 1, 1'000'000, 99);
  }

  Problem draw(Random& random) const override {
    std::vector<int64_t> items;
    for (int64_t n = random.next_int(min_length_, max_length_); n > 0; --n)
      items.push_back(random.next_int(0, letters_ ? 25 : max_number_));
    Problem problem;
    problem.task.prompt = "sort " + shown(items) + ":";
    std::string steps;
    std::vector<int64_t> placed;
    for (const int64_t item : items) {
      placed.insert(std::upper_bound(placed.begin(), placed.end(), item), item);
      if (!steps.empty()) steps += ';';
      steps += shown(placed);
    }
    problem.task.answer = shown(placed);
    problem.task.verifier = "exact";
    problem.task.worked_example = style_.think_open + steps + style_.think_close + problem.task.answer;
    problem.canonical = "sort " + problem.task.answer;
    return problem;
  }

 private:
  std::string shown(const std::vector<int64_t>& items) const {
    std::string text;
    for (const int64_t item : items) {
      if (!text.empty()) text += ' ';
      if (letters_)
        text += static_cast<char>('a' + item);
      else
        text += std::to_string(item);
    }
    return text;
  }

  WorkedStyle style_;
  bool letters_ = false;
  int64_t min_length_, max_length_, max_number_;
};

}  // namespace

std::unique_ptr<Generator> make_countdown_tasks(JsonReader& options, const WorkedStyle& style) {
  return std::make_unique<CountdownTasks>(options, style);
}
std::unique_ptr<Generator> make_sort(JsonReader& options, const WorkedStyle& style) {
  return std::make_unique<Sort>(options, style);
}

}  // namespace perigee::rollout
