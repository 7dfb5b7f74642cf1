// The table of verifiers, and the one that looks into it for each task.
#include <array>
#include <map>
#include <stdexcept>

#include "base/error.h"
#include "base/text.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Verifier> (*make)(JsonReader& options);
};
constexpr std::array<Entry, 14> kVerifiers{{{"exact", make_exact},
                                           {"numeric", make_numeric},
                                           {"regex", make_regex},
                                           {"countdown", make_countdown},
                                           {"positions", make_positions},
                                           {"code", make_code},
                                           {"format", make_format},
                                           {"length", make_length},
                                           {"length_k15", make_length_k15},
                                           {"repetition", make_repetition},
                                           {"token_share", make_token_share},
                                           {"recall", make_recall},
                                           {"match", make_match},
                                           {"task", make_task}}};

class OfTheTask : public Verifier {
 public:
  explicit OfTheTask(JsonReader& options) : default_(options.string("default", "exact")) {
    for (const auto& name : task_verifier_names()) {
      const nlohmann::json none = nlohmann::json::object();
      JsonReader defaults(none, "task");
      verifiers_.emplace(name, make_verifier(name, defaults));
    }
    if (!verifiers_.contains(default_))
      options.fail("default", fmt::format("one of {} is expected, not {}", names(), quote(default_)));
  }
  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext* group, Budget& budget) const override {
    const std::string& name = input.verifier.empty() ? default_ : input.verifier;
    const auto it = verifiers_.find(name);
    if (it == verifiers_.end())
      throw std::runtime_error(
          fmt::format("the task names the verifier {}; one of {} is expected", quote(name), names()));
    return it->second->verify(input, group, budget);
  }

 private:
  static std::string names() { return join(task_verifier_names()); }
  std::string default_;
  std::map<std::string, std::unique_ptr<Verifier>, std::less<>> verifiers_;
};

}  // namespace

const std::vector<std::string>& verifier_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const auto& entry : kVerifiers) list.emplace_back(entry.name);
    return list;
  }();
  return names;
}

const std::vector<std::string>& task_verifier_names() {
  static const std::vector<std::string> names = {"exact", "numeric", "countdown", "positions", "code", "recall", "match"};
  return names;
}

std::unique_ptr<Verifier> make_verifier(const std::string& name, JsonReader& options) {
  for (const auto& entry : kVerifiers)
    if (entry.name == name) return entry.make(options);
  options.fail("verifier", fmt::format("unknown verifier {}{}; known: {}", quote(name),
                                       did_you_mean(name, verifier_names()), join(verifier_names())));
}

std::unique_ptr<Verifier> make_task(JsonReader& options) {
  return std::make_unique<OfTheTask>(options);
}

}  // namespace perigee::reward
