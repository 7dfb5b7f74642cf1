// A preference over tokens, not over what they say: something that random weights of any size can learn.
#include <fmt/format.h>

#include <algorithm>

#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

class TokenShare : public Verifier {
 public:
  explicit TokenShare(JsonReader& options) {
    const bool listed = options.has("ids");
    if (listed == options.has("modulus"))
      options.fail("modulus", "either ids or modulus (with residue) is expected");
    if (listed) {
      ids_ = options.integers("ids", 0, INT32_MAX);
      if (ids_.empty()) options.fail("ids", "at least one is expected");
      std::sort(ids_.begin(), ids_.end());
    } else {
      modulus_ = options.integer("modulus", 2, INT32_MAX);
      residue_ = options.integer("residue", 0, modulus_ - 1, 0);
    }
  }

  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    if (input.tokens.empty()) return {0, "no tokens"};
    int64_t hits = 0;
    for (const int32_t id : input.tokens) {
      hits += modulus_ > 0 ? id % modulus_ == residue_ : std::binary_search(ids_.begin(), ids_.end(), id);
      budget.spend(8);
    }
    return {static_cast<double>(hits) / static_cast<double>(input.tokens.size()),
            fmt::format("{} of {} tokens", hits, input.tokens.size())};
  }

 private:
  std::vector<int64_t> ids_;  // ascending
  int64_t modulus_ = 0, residue_ = 0;
};

}  // namespace

std::unique_ptr<Verifier> make_token_share(JsonReader& options) { return std::make_unique<TokenShare>(options); }

}  // namespace perigee::reward
