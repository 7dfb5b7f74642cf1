// What a verifier is: a pure function from one finished sample to a number, with a limit on its time.
#pragma once
#include <time.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "base/episode.h"

namespace perigee::reward {

// All that a verifier may know about a sample. Texts are bytes: not necessarily UTF-8, up to megabytes,
// written by a policy that is paid to fool the verifier.
struct RewardInput {
  std::string prompt;
  std::string response;  // what the policy generated, special tokens as their text
  std::string answer;    // the reference; what it means is the verifier's business
  std::string verifier;  // the task's own choice for the verifier "task"; may be empty
  std::vector<int32_t> tokens;  // the response by token, with the one that ended it
  FinishReason finish = FinishReason::kStop;
  int64_t response_tokens = 0;
  int64_t max_tokens = 0;  // the limit the sample was generated under; 0 when there was none
};

// The other samples of the same prompt, the scored one included.
struct GroupContext {
  int64_t min_tokens = 0, max_tokens = 0;  // shortest and longest response
  bool correct = false;                    // what the judging component said of this sample
};

struct TimedOut {};

// A verifier's time: of the processor, on the thread that made the budget, so that a busy or paused machine turns no
// verdict into a timeout. Loops over input call spend(); the clock is read once in a while.
class Budget {
 public:
  explicit Budget(std::chrono::milliseconds limit) : deadline_(now() + limit) {}
  // Throws TimedOut when the time is over. work: bytes looked at, or the like.
  void spend(uint64_t work = 1) {
    since_look_ += work;
    if (since_look_ < kLook) return;
    since_look_ = 0;
    if (now() >= deadline_) throw TimedOut();
  }

 private:
  static constexpr uint64_t kLook = 1 << 16;

  static std::chrono::nanoseconds now() {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
  }

  std::chrono::nanoseconds deadline_;
  uint64_t since_look_ = 0;
};

struct Verdict {
  double value = 0;
  std::string detail;  // one line for people: what was found; may be empty
};

// Thread safety: const calls from several threads at once.
class Verifier {
 public:
  virtual ~Verifier() = default;
  // The verdict on the sample. group is null unless needs_group(). An exception is a recorded failure,
  // TimedOut a recorded timeout: neither is ever a zero.
  virtual Verdict verify(const RewardInput& input, const GroupContext* group, Budget& budget) const = 0;
  // A value outside is a failure.
  virtual double lowest() const { return 0; }
  virtual double highest() const { return 1; }
  // It says whether the answer is right: 1 or less.
  virtual bool judges() const { return false; }
  virtual bool needs_group() const { return false; }
};

}  // namespace perigee::reward
