// Find and compute: facts far apart in a long document that no prompt holds. An environment with search (or read) and the
// calculator answers.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr std::string_view kDocument = "document.txt";
constexpr std::array<std::string_view, 16> kFirst = {"Alm",  "Birk", "Carl",  "Dorn", "Eich", "Falk",
                                                     "Gold", "Hag",  "Iber",  "Jung", "Kalt", "Lind",
                                                     "Mar",  "Nord", "Oster", "Pfau"};
constexpr std::array<std::string_view, 8> kSecond = {"bach", "feld",  "hof", "mann",
                                                     "rode", "stein", "tal", "wald"};
constexpr std::array<std::string_view, 10> kFiller = {
    "The committee met in the afternoon and came to no decision.",
    "Rain was reported from the north, and the harvest was brought in early.",
    "A letter of the previous month was read aloud and put to the files.",
    "Nobody remembered who had ordered the second cart of bricks.",
    "The bridge was closed for repairs until further notice.",
    "Two clerks were asked to count the chairs of the great hall again.",
    "The treasurer noted that the roof would have to wait another year.",
    "A visitor from the coast praised the bread and the quiet.",
    "The minutes of the last meeting were accepted without a change.",
    "It was agreed to buy ink, paper and a new lock for the archive."};

class Document : public Generator {
 public:
  explicit Document(JsonReader& options) {
    bytes_ = options.integer("bytes", 1000, int64_t{1} << 26, 60000);
    facts_ = options.integer("facts", 2, static_cast<int64_t>(kFirst.size() * kSecond.size()), 24);
    max_asked_ = options.integer("max_asked", 2, facts_, 3);
    min_asked_ = options.integer("min_asked", 2, max_asked_, 2);
  }

  Problem draw(Random& random) const override {
    std::vector<std::string> names;
    for (const auto first : kFirst)
      for (const auto second : kSecond) names.push_back(std::string(first) + std::string(second));
    shuffle(names, random);
    std::vector<int64_t> amounts(static_cast<size_t>(facts_));
    for (auto& a : amounts) a = random.next_int(1000, 99999);

    // Facts at even distances in the filler, in an order of their own.
    std::string text;
    int64_t number = 0, fact = 0;
    while (static_cast<int64_t>(text.size()) < bytes_ || fact < facts_) {
      ++number;
      if (fact < facts_ && static_cast<int64_t>(text.size()) * (facts_ + 1) >= bytes_ * (fact + 1)) {
        text += fmt::format("{}. The account of {} was settled with {} crowns.\n", number,
                            names[static_cast<size_t>(fact)], amounts[static_cast<size_t>(fact)]);
        ++fact;
      } else {
        text += fmt::format("{}. {}\n", number,
                            kFiller[static_cast<size_t>(random.next_int(0, kFiller.size() - 1))]);
      }
    }

    std::vector<size_t> order(static_cast<size_t>(facts_));
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    shuffle(order, random);
    order.resize(static_cast<size_t>(random.next_int(min_asked_, max_asked_)));
    std::string asked, expression, canonical = "document";
    policy::Message search{policy::Role::kAssistant, ""};
    int64_t answer = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      const std::string& name = names[order[i]];
      asked += fmt::format("{}{}", i == 0 ? "" : i + 1 == order.size() ? " and " : ", ", name);
      expression += fmt::format("{}{}", i == 0 ? "" : "+", amounts[order[i]]);
      answer += amounts[order[i]];
      const nlohmann::json arguments = {{"pattern", "account of " + name}};
      search.tool_calls.push_back({"", "search", arguments.dump()});
    }
    std::sort(order.begin(), order.end());
    for (const size_t i : order) canonical += fmt::format(" {} {}", names[i], amounts[i]);

    Problem problem;
    problem.canonical = std::move(canonical);
    Task& task = problem.task;
    task.prompt = fmt::format(
        "How many crowns settled the accounts of {} together? The document tells. Answer with the "
        "number alone.",
        asked);
    task.answer = std::to_string(answer);
    task.verifier = "numeric";
    task.files.push_back({std::string(kDocument), std::move(text), false});
    const nlohmann::json sum = {{"expression", expression}};
    task.worked_turns = {std::move(search),
                         {policy::Role::kAssistant, "", {{"", "calculator", sum.dump()}}},
                         {policy::Role::kAssistant, task.answer}};
    return problem;
  }

 private:
  template <class T>
  static void shuffle(std::vector<T>& list, Random& random) {
    for (size_t i = list.size(); i > 1; --i)
      std::swap(list[i - 1], list[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(i) - 1))]);
  }

  int64_t bytes_, facts_, min_asked_, max_asked_;
};

}  // namespace

std::unique_ptr<Generator> make_document(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Document>(options);
}

}  // namespace perigee::rollout
