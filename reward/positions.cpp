// A sequence that may be right in part: what share of its places holds the right byte.
#include <fmt/format.h>

#include <algorithm>

#include "reward/section.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

class Positions : public Verifier {
 public:
  explicit Positions(JsonReader& options) : section_(options) {}

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    Verdict verdict;
    const auto found = section_.find(input, verdict.detail);
    if (!found) return verdict;
    const std::string_view wanted = trim(input.answer);
    // Places that only one of the two has are wrong: neither a long answer nor a short one is worth more.
    const size_t both = std::min(found->size(), wanted.size()), places = std::max(found->size(), wanted.size());
    size_t right = 0;
    for (size_t i = 0; i < both; ++i) {
      budget.spend();
      right += (*found)[i] == wanted[i];
    }
    if (right == places) return {1, {}};
    return {static_cast<double>(right) / static_cast<double>(places), fmt::format("{} of {} positions", right, places)};
  }

 private:
  Section section_;
};

}  // namespace

std::unique_ptr<Verifier> make_positions(JsonReader& options) { return std::make_unique<Positions>(options); }

}  // namespace perigee::reward
