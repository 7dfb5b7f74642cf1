// Newline-delimited messages over the streams of a child.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "agents/mcp/keeper.h"
#include "agents/mcp/message.h"
#include "agents/mcp/transport.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr size_t kErrorBytes = 2048;  // of the child's standard error, the end
constexpr auto kSoon = std::chrono::milliseconds(100);

// What a server gets of the owner's environment: nothing that may be a secret.
std::vector<std::pair<std::string, std::string>> environment_of(const McpCommand& command) {
  std::vector<std::pair<std::string, std::string>> out = command.environment;
  for (const char* name :
       {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR", "TERM"}) {
    const char* value = std::getenv(name);
    const bool given = std::any_of(out.begin(), out.end(), [&](const auto& v) { return v.first == name; });
    if (value != nullptr && !given) out.emplace_back(name, value);
  }
  return out;
}

int left_ms(Clock::time_point until) {
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(ms, 0, 3'600'000));
}

class StdioTransport : public McpTransport {
 public:
  StdioTransport(const McpCommand& command, const McpLimits& limits, McpOnNotification on_notification)
      : child_(std::in_place, command.argv, environment_of(command), command.directory),
        limits_(limits),
        on_notification_(std::move(on_notification)),
        wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    std::signal(SIGPIPE, SIG_IGN);  // a child that has gone is an error of write()
    reader_ = std::thread([this] { read_all(); });
  }
  ~StdioTransport() override {
    {
      const std::lock_guard lock(write_mutex_);
      child_->close_input();
      input_open_ = false;
    }
    stopping_ = true;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_, &one, sizeof one);
    reader_.join();
    child_.reset();
    ::close(wake_);
  }

  McpReply request(const json& message, const McpHeaders&, const McpWait& wait) override {
    const int64_t id = message.at("id").get<int64_t>();
    {
      const std::lock_guard lock(mutex_);
      if (!lost_.empty()) return lost_reply();
      waiting_[id] = std::nullopt;
    }
    if (const std::string why = send(message, wait.until); !why.empty()) lose(why);
    std::unique_lock lock(mutex_);
    while (!waiting_[id].has_value() && lost_.empty() && !wait.stop.stop_requested() &&
           Clock::now() < wait.until)
      answered_.wait_until(lock, std::min(wait.until, Clock::now() + std::chrono::milliseconds(20)));
    McpReply reply;
    if (waiting_[id].has_value()) {
      reply = *std::move(waiting_[id]);
    } else if (!lost_.empty()) {
      reply = lost_reply();
    } else {
      const bool stopped = wait.stop.stop_requested();
      reply.outcome = stopped ? McpReply::kStopped : McpReply::kTimeout;
      reply.message = stopped ? "the call was stopped" : "the server did not answer in time";
    }
    waiting_.erase(id);
    lock.unlock();
    const bool gave_up = reply.outcome == McpReply::kTimeout || reply.outcome == McpReply::kStopped;
    if (gave_up && message.value("method", "") != "initialize")
      notify({{"jsonrpc", "2.0"},
              {"method", "notifications/cancelled"},
              {"params", {{"requestId", id}, {"reason", reply.message}}}},
             {Clock::now() + kSoon});
    return reply;
  }

  void notify(const json& message, const McpWait& wait) override {
    if (const std::string why = send(message, wait.until); !why.empty()) lose(why);
  }
  bool post(const json& message, const McpWait& wait) override {
    notify(message, wait);
    return true;
  }
  void set_version(McpEra, const std::string&) override {}
  bool alive(std::string* why) const override {
    const std::lock_guard lock(mutex_);
    if (why != nullptr) *why = lost_;
    return lost_.empty();
  }

 private:
  McpReply lost_reply() const {
    McpReply reply;
    reply.outcome = McpReply::kLost;
    reply.message = lost_;
    return reply;
  }

  void lose(const std::string& why) {
    const std::lock_guard lock(mutex_);
    if (lost_.empty()) lost_ = why;
    answered_.notify_all();
  }

  // "" or why nothing more can be sent: half a message makes what follows unreadable.
  std::string send(const json& message, Clock::time_point until) {
    const std::string line = message.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
    const std::lock_guard lock(write_mutex_);
    if (!input_open_) return "the server is being stopped";
    for (size_t sent = 0; sent < line.size();) {
      const ssize_t n = ::write(child_->input(), line.data() + sent, line.size() - sent);
      if (n > 0) {
        sent += static_cast<size_t>(n);
      } else if (n < 0 && errno == EAGAIN) {
        struct pollfd p = {child_->input(), POLLOUT, 0};
        const int ms = left_ms(until);
        if (ms == 0 || ::poll(&p, 1, ms) == 0) return "the server does not read its input";
      } else if (n < 0 && errno != EINTR) {
        return "the server has ended" + said();
      }
    }
    return "";
  }

  // The end of what the server wrote to its standard error, for messages.
  std::string said() const {
    const std::lock_guard lock(error_mutex_);
    std::string_view text = errors_;
    while (!text.empty() && static_cast<uint8_t>(text.back()) <= ' ') text.remove_suffix(1);
    if (const size_t line = text.rfind('\n'); line != std::string_view::npos) text.remove_prefix(line + 1);
    return text.empty() ? "" : "; it said " + quote(text, 200);
  }

  void read_all() {
    std::string buffer;
    for (bool output = true, error = true; !stopping_ && (output || error);) {
      struct pollfd p[3] = {{output ? child_->output() : -1, POLLIN, 0},
                            {error ? child_->error() : -1, POLLIN, 0},
                            {wake_, POLLIN, 0}};
      ::poll(p, 3, -1);
      if (p[1].revents != 0) error = read_errors();
      if (p[0].revents == 0 || read_output(buffer)) continue;
      output = false;
      // What it said may come a moment after its output ends.
      struct pollfd e = {child_->error(), POLLIN, 0};
      while (error && ::poll(&e, 1, 20) > 0) error = read_errors();
      lose("the server has ended" + said());
    }
  }

  bool read_errors() {
    char text[4096];
    const ssize_t n = ::read(child_->error(), text, sizeof text);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return false;
    if (n < 0) return true;
    const std::lock_guard lock(error_mutex_);
    errors_.append(text, static_cast<size_t>(n));
    if (errors_.size() > kErrorBytes) errors_.erase(0, errors_.size() - kErrorBytes);
    return true;
  }

  // False when no more comes.
  bool read_output(std::string& buffer) {
    std::vector<char> text(size_t{1} << 16);
    const ssize_t n = ::read(child_->output(), text.data(), text.size());
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return false;
    if (n < 0) return true;
    const size_t from = buffer.size();
    buffer.append(text.data(), static_cast<size_t>(n));
    size_t begin = 0;
    for (size_t end; (end = buffer.find('\n', std::max(from, begin))) != std::string::npos; begin = end + 1)
      take(std::string_view(buffer).substr(begin, end - begin));
    buffer.erase(0, begin);
    if (static_cast<int64_t>(buffer.size()) <= limits_.message_bytes) return true;
    lose(fmt::format("the server sent a message over {}",
                     human_bytes(static_cast<uint64_t>(limits_.message_bytes))));
    return false;
  }

  void take(std::string_view line) {
    // Anything that is no message is passed over: servers print what they like.
    const json message = parse_message(line);
    if (!message.is_object()) return;
    if (message.contains("method")) {
      if (message.contains("id"))
        notify(answer_request(message), {Clock::now() + kSoon});
      else
        on_notification_(message);
      return;
    }
    const std::lock_guard lock(mutex_);
    for (auto& [id, reply] : waiting_)
      if (!reply.has_value() && is_response_to(message, id)) {
        reply = read_response(message);
        answered_.notify_all();
      }
  }

  std::optional<KeptChild> child_;
  McpLimits limits_;
  McpOnNotification on_notification_;
  int wake_;
  std::atomic<bool> stopping_{false};
  std::thread reader_;
  std::mutex write_mutex_;
  bool input_open_ = true;
  mutable std::mutex error_mutex_;
  std::string errors_;
  mutable std::mutex mutex_;
  std::condition_variable answered_;
  std::map<int64_t, std::optional<McpReply>> waiting_;  // by id
  std::string lost_;                                    // why nothing more comes; "" while something may
};

}  // namespace

std::unique_ptr<McpTransport> start_stdio_transport(const McpCommand& command, const McpLimits& limits,
                                                    McpOnNotification on_notification) {
  return std::make_unique<StdioTransport>(command, limits, std::move(on_notification));
}

}  // namespace perigee::agents
