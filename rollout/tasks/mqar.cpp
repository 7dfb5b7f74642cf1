// Multi-query associative recall: pairs of a key and a value, then keys whose values are asked for. The layout follows
// Zoology (arXiv 2312.04927), where a query's distance is drawn and its value stands behind it.
#include <algorithm>
#include <array>
#include <bit>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
constexpr std::string_view kValues = "0123456789!#$%&*+-=?@^~/:;.,<>()[]{}_`'\"\\";  // what no key holds
constexpr char kSeparator = '|', kBlank = ' ';

// "a3k7B0|k7      a" -> 3: pairs; blanks up to a whole number of slots; slots, each a query with its value or blank;
// the last query, whose value is the answer.
class Mqar : public Generator {
 public:
  explicit Mqar(JsonReader& options) {
    length_ = options.integer("length", 5, kMaxSyntheticLength, 64);
    key_length_ = options.integer("key_length", 1, 2, 1);
    values_ = options.integer("values", 2, static_cast<int64_t>(kValues.size()), 10);
    const auto letters = static_cast<int64_t>(kLetters.size());
    keys_ = key_length_ == 1 ? letters : letters * letters;
    const int64_t pairs = std::clamp<int64_t>(length_ / 8, 2, keys_);
    pairs_ = options.integer("pairs", 1, letters * letters, pairs);
    if (pairs_ > keys_)
      options.fail("pairs", fmt::format("{} of them take as many different keys, and there are {}; set key_length to 2", pairs_, keys_));
    queries_ = options.integer("queries", 1, pairs_, pairs_);
    const std::string gaps = options.string("gaps", "near");
    const std::array<std::string, 2> names = {"near", "uniform"};
    if (gaps != names[0] && gaps != names[1])
      options.fail("gaps", "near or uniform are expected, not " + quote(gaps) + did_you_mean(gaps, names));
    const int64_t slot = key_length_ + 1, free = length_ - pairs_ * slot - 1 - key_length_;
    if (free < (queries_ - 1) * slot)
      options.fail("length", fmt::format("{} is below the {} that {} pairs and {} queries take", length_,
                                         (pairs_ + queries_ - 1) * slot + 1 + key_length_, pairs_, queries_));
    padding_ = free % slot;
    // Zoology's power law as its exponent goes to 0, in whole numbers, so that every machine draws the same.
    slots_ = static_cast<size_t>(free / slot);
    sums_.assign(slots_ + 1, 0);
    for (size_t i = 1; i <= slots_; ++i) {
      const int64_t weight = gaps == names[0] ? (int64_t{1} << 32) / static_cast<int64_t>(i) : 1;
      weight_sum_ += weight;
      sums_[i] += weight;
      if (const size_t above = i + (i & -i); above <= slots_) sums_[above] += sums_[i];
    }
  }

  Problem draw(Random& random) const override {
    std::vector<std::pair<std::string, char>> pairs;
    for (const int64_t key : draw_keys(random))
      pairs.emplace_back(key_text(key), kValues[static_cast<size_t>(random.next_int(0, values_ - 1))]);
    const std::vector<size_t> slots = draw_slots(random);

    Problem problem;
    std::string& prompt = problem.task.prompt;
    for (const auto& [key, value] : pairs) prompt += key + value;
    prompt += kSeparator;
    prompt.append(static_cast<size_t>(padding_), kBlank);
    const size_t first = prompt.size(), slot = static_cast<size_t>(key_length_) + 1;
    prompt.append(slots_ * slot, kBlank);
    // Which pairs are asked for, and in which order.
    std::vector<size_t> asked(pairs.size());
    for (size_t i = 0; i < asked.size(); ++i) asked[i] = i;
    for (size_t i = 0; i < static_cast<size_t>(queries_); ++i)
      std::swap(asked[i], asked[static_cast<size_t>(random.next_int(static_cast<int64_t>(i), pairs_ - 1))]);
    for (size_t i = 0; i < slots.size(); ++i) {
      const auto& [key, value] = pairs[asked[i]];
      const size_t at = first + slots[i] * slot;
      prompt.replace(at, slot, key + value);
      problem.task.answered.push_back({at + slot - 1, at + slot});
    }
    std::sort(problem.task.answered.begin(), problem.task.answered.end(),
              [](const TextRange& a, const TextRange& b) { return a.begin < b.begin; });
    const auto& [key, value] = pairs[asked[slots.size()]];
    prompt += key;
    problem.task.answer = value;
    problem.task.worked_example = problem.task.answer;
    problem.task.verifier = "exact";
    // What is to be remembered, in whatever order and whatever is asked of it.
    std::sort(pairs.begin(), pairs.end());
    problem.canonical = "mqar";
    for (const auto& [k, v] : pairs) problem.canonical += fmt::format(" {}{}", k, v);
    return problem;
  }

 private:
  // Different ones: the first pairs_ of a shuffle.
  std::vector<int64_t> draw_keys(Random& random) const {
    std::vector<int64_t> all(static_cast<size_t>(keys_));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    for (size_t i = 0; i < static_cast<size_t>(pairs_); ++i)
      std::swap(all[i], all[static_cast<size_t>(random.next_int(static_cast<int64_t>(i), keys_ - 1))]);
    all.resize(static_cast<size_t>(pairs_));
    return all;
  }

  std::string key_text(int64_t key) const {
    const auto letters = static_cast<int64_t>(kLetters.size());
    std::string text(1, kLetters[static_cast<size_t>(key % letters)]);
    if (key_length_ == 2) text += kLetters[static_cast<size_t>(key / letters)];
    return text;
  }

  // Those of all queries but the last, by weight without replacement: each is the first slot whose weight and those
  // before it sum to more than a point that is drawn.
  std::vector<size_t> draw_slots(Random& random) const {
    std::vector<int64_t> sums = sums_;
    int64_t sum = weight_sum_;
    std::vector<size_t> slots;
    while (slots.size() + 1 < static_cast<size_t>(queries_)) {
      int64_t point = random.next_int(0, sum - 1);
      size_t before = 0;  // how many slots end at or before the point
      for (size_t step = std::bit_floor(slots_); step > 0; step /= 2)
        if (before + step <= slots_ && sums[before + step] <= point) point -= sums[before += step];
      const int64_t weight = sums[before + 1] - sum_of_parts(sums, before + 1);
      for (size_t i = before + 1; i <= slots_; i += i & -i) sums[i] -= weight;
      sum -= weight;
      slots.push_back(before);
    }
    return slots;
  }
  // What sums[i] holds beside the weight of slot i itself.
  static int64_t sum_of_parts(const std::vector<int64_t>& sums, size_t i) {
    int64_t sum = 0;
    for (size_t part = i - 1, end = i - (i & -i); part > end; part -= part & -part) sum += sums[part];
    return sum;
  }

  int64_t length_, key_length_, values_, keys_, pairs_, queries_, padding_;
  size_t slots_ = 0;
  int64_t weight_sum_ = 0;
  std::vector<int64_t> sums_;  // of slots' weights, a binary indexed tree: of i - (i & -i) + 1 .. i, counted from 1
};

}  // namespace

std::unique_ptr<Generator> make_mqar(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Mqar>(options);
}

}  // namespace perigee::rollout
