// Many stacks at once: what was pushed must be told when it is popped.
#include <string_view>

#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr std::string_view kStacks = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz@_";
constexpr std::string_view kElements = "!#$%&*/:;=?^~.,<>()[]{}|'`\"\\";
constexpr char kPush = '+', kPop = '-', kBlank = ' ';
constexpr int64_t kOperation = 3;  // bytes: what, which stack, which element

// "+A!+B?-A!+B#-B" -> #: blanks up to a whole number of operations, operations, and a pop whose element is the answer.
class Stack : public Generator {
 public:
  explicit Stack(JsonReader& options) {
    length_ = options.integer("length", kOperation + 2, kMaxSyntheticLength, 64);
    stacks_ = options.integer("stacks", 1, static_cast<int64_t>(kStacks.size()), 64);
    elements_ = options.integer("elements", 2, static_cast<int64_t>(kElements.size()), 26);
    pushes_ = options.number("pushes", 0.1, 0.95, 0.6);
  }

  Problem draw(Random& random) const override {
    Problem problem;
    std::string& prompt = problem.task.prompt;
    std::vector<std::string> stacks(static_cast<size_t>(stacks_)), history(stacks.size());
    const int64_t operations = (length_ - 2) / kOperation;
    prompt.assign(static_cast<size_t>(length_ - 2 - operations * kOperation), kBlank);
    int64_t held = 0;
    for (int64_t i = 0; i < operations; ++i) {
      // Something must be left for the last pop.
      const bool push = random.next_float() < pushes_ || held == 0 || (held == 1 && i + 1 == operations);
      const size_t stack = push ? static_cast<size_t>(random.next_int(0, stacks_ - 1)) : draw_filled(random, stacks);
      if (push) {
        stacks[stack] += kElements[static_cast<size_t>(random.next_int(0, elements_ - 1))];
        ++held;
      }
      const char element = stacks[stack].back();
      if (!push) {
        stacks[stack].pop_back();
        --held;
      }
      const std::string text = {push ? kPush : kPop, kStacks[stack], element};
      prompt += text;
      history[stack] += text;
      if (!push) problem.task.answered.push_back({prompt.size() - 1, prompt.size()});
    }
    const size_t last = draw_filled(random, stacks);
    prompt += kPop;
    prompt += kStacks[last];
    problem.task.answer = stacks[last].back();
    problem.task.worked_example = problem.task.answer;
    problem.task.verifier = "exact";
    // What each stack goes through, however the stacks take turns.
    history[last] += kPop;
    problem.canonical = "stack";
    for (const std::string& h : history)
      if (!h.empty()) problem.canonical += " " + h;
    return problem;
  }

 private:
  // One of those that hold something. REQUIRES there is one.
  static size_t draw_filled(Random& random, const std::vector<std::string>& stacks) {
    int64_t filled = 0;
    for (const auto& s : stacks) filled += !s.empty();
    int64_t nth = random.next_int(0, filled - 1);
    size_t i = 0;
    while (stacks[i].empty() || nth-- > 0) ++i;
    return i;
  }

  int64_t length_, stacks_, elements_;
  double pushes_;
};

}  // namespace

std::unique_ptr<Generator> make_stack(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Stack>(options);
}

}  // namespace perigee::rollout
