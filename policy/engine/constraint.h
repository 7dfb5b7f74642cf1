// What may come next: a grammar or a schema that restricts the draw of a request. The engine draws among the tokens it
// allows; the recorded log-probability stays that of the plain policy, which is what a learner recomputes.
#pragma once
#include <cstdint>
#include <memory>
#include <span>

namespace perigee::policy {

// One sequence's place in its grammar. Used by one thread at a time.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  // Bit t % 32 of word t / 32: token t may come next. At least one bit is set; ceil(vocab / 32) words, those bits past
  // the vocabulary 0. Valid until accept() or the end of this object. Called once per token: may be as slow as a step.
  virtual std::span<const uint32_t> allowed() = 0;
  // The token was drawn. REQUIRES it to be allowed, and that the constraint has not ended by it: after the token that
  // ends its grammar (a stop token of the request) neither function is called again.
  virtual void accept(int32_t token) = 0;
  // A copy in the same place, that goes on independently: one for each choice of a request.
  virtual std::unique_ptr<TokenConstraint> clone() const = 0;
};

inline bool allows(std::span<const uint32_t> allowed, int32_t token) {
  return (allowed[static_cast<size_t>(token) / 32] >> (token % 32) & 1) != 0;
}

}  // namespace perigee::policy
