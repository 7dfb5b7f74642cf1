// A random sequence, to be told backwards.
#include <string_view>

#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr std::string_view kSymbols = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";

// "ogrsune|" -> enusrgo
class Palindrome : public Generator {
 public:
  explicit Palindrome(JsonReader& options) {
    length_ = options.integer("length", 3, kMaxSyntheticLength, 64);
    symbols_ = options.integer("symbols", 2, static_cast<int64_t>(kSymbols.size()), 26);
  }

  Problem draw(Random& random) const override {
    Problem problem;
    std::string sequence(static_cast<size_t>(length_ - 1), ' ');
    for (char& c : sequence) c = kSymbols[static_cast<size_t>(random.next_int(0, symbols_ - 1))];
    problem.task.prompt = sequence + '|';
    problem.task.answer.assign(sequence.rbegin(), sequence.rend());
    problem.task.worked_example = problem.task.answer;
    problem.task.verifier = "positions";
    problem.canonical = "palindrome " + sequence;
    return problem;
  }

 private:
  int64_t length_, symbols_;
};

}  // namespace

std::unique_ptr<Generator> make_palindrome(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Palindrome>(options);
}

}  // namespace perigee::rollout
