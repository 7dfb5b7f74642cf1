// One request on its way through the host, as the server's thread sees it. The engine's thread only puts tokens into a
// list; text, JSON and sockets are dealt with on the server's thread, when the socket has room. So a slow reader costs the
// list of its tokens, and the engine never waits.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agents/host/host.h"
#include "agents/server/output_parser.h"

namespace perigee::agents {

class Generation;

// Calls progress() of generations on the server's thread: one post for all that have news since the last.
class Wake {
 public:
  using Post = std::function<void(std::function<void()>)>;
  explicit Wake(Post post) : post_(std::move(post)) {}
  void add(std::shared_ptr<Generation> generation);
  // While it is held nothing is posted: the tokens of a whole step are one wake-up.
  void hold(bool held);

 private:
  void run();
  Post post_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Generation>> waiting_, now_;  // now_: of the server's thread
  bool held_ = false, posted_ = false;
};

// Who reads a generation.
class NewsReader {
 public:
  virtual ~NewsReader() = default;
  virtual void on_news() = 0;  // on the server's thread
};

// Times that the metrics show, in seconds.
class Histogram {
 public:
  static constexpr double kBounds[] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                                       0.5,   1,      2.5,   5,    10,    30,   60,  120};
  void add(double seconds);
  // Prometheus lines of the histogram.
  void write(const std::string& name, const std::string& labels, std::string& out) const;

 private:
  std::atomic<int64_t> buckets_[std::size(kBounds) + 1] = {};
  std::atomic<int64_t> sum_us_{0};
};

struct ServerMetrics {
  Histogram first_token, whole_request, between_tokens;
  std::atomic<int64_t> streams{0};       // open now
  std::atomic<int64_t> generating{0};    // generations that the host holds
  std::atomic<int64_t> disconnected{0};  // requests cancelled since their client went
  std::atomic<int64_t> stop_text{0};     // choices ended by a stop text
};

class Generation : public HostSink, public std::enable_shared_from_this<Generation> {
 public:
  // The reader is called when there is news: with each token when `each_token`, else at the ends only. stops: stop texts, looked for on the engine's thread; parser: as the reader of the tokens will parse them.
  // tokenizer, wake and metrics outlive all generations.
  Generation(Wake& wake, ServerMetrics& metrics, const policy::Tokenizer& tokenizer, int choices,
             bool each_token, const OutputParser::Options& parser);

  // Before start: who is told of news. Cleared by forget().
  void read_by(std::shared_ptr<NewsReader> reader);
  void progress();
  void forget();

  // Starts it. Throws what Host::start throws.
  void start(Host& host, HostRequest request);
  // In the place of start(): all choices end with kError, for this reason.
  void refuse(std::exception_ptr why);
  // All choices end soon. At any time, by any thread.
  void cancel();
  bool cancelled() const { return cancelled_; }

  struct Choice {
    std::vector<HostToken> tokens;  // new ones
    bool done = false;              // no more will come
    FinishReason finish = FinishReason::kNone;
    HostUsage usage;
    std::string error;
    std::exception_ptr refused;  // what start() of the host threw, where refuse() was told
  };
  // What is new of the choice, in the place of what was in `out`.
  void take(int choice, Choice& out);
  std::vector<HostToken> take_prompt();
  int choices() const { return static_cast<int>(choices_.size()); }

  // HostSink
  bool on_token(int choice, const HostToken& token) override;
  void on_prompt(std::vector<HostToken> tokens) override;
  void on_done(int choice, FinishReason finish, const HostUsage& usage, const std::string& error) override;

 private:
  using Clock = std::chrono::steady_clock;

  Wake& wake_;
  ServerMetrics& metrics_;
  const policy::Tokenizer& tokenizer_;
  const bool each_token_;
  const Clock::time_point created_ = Clock::now();

  // The engine's thread only.
  std::vector<OutputParser> stops_;  // one per choice; empty without stop texts
  std::vector<OutputEvent> scratch_;
  Clock::time_point last_token_;

  std::mutex mutex_;  // of all below
  std::vector<Choice> choices_;
  std::vector<HostToken> prompt_;
  std::shared_ptr<NewsReader> reader_;
  Host* host_ = nullptr;
  uint64_t ticket_ = 0;
  bool awake_ = false, started_ = false;
  std::atomic<bool> hosted_{false};
  std::atomic<bool> cancelled_{false};
  int open_;
};

}  // namespace perigee::agents
