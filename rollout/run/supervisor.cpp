#include "rollout/run/supervisor.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "base/file.h"
#include "base/process.h"
#include "rollout/roles/roles.h"
#include "rollout/run/progress.h"
#include "rollout/run/resume_check.h"
#include "rollout/weights/base_weights.h"
#include "rollout/weights/weights_channel.h"

namespace perigee::rollout {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

std::atomic<int> g_signals{0};
void on_signal(int) { ++g_signals; }

// Counts SIGINT, SIGTERM and SIGHUP (a terminal that closes) while it lives.
class SignalScope {
 public:
  explicit SignalScope(bool active) : active_(active) {
    if (!active_) return;
    g_signals = 0;
    struct sigaction action {};
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    ::sigaction(SIGINT, &action, &former_int_);
    ::sigaction(SIGTERM, &action, &former_term_);
    former_pipe_ = ::signal(SIGPIPE, SIG_IGN);  // whoever read the progress may go
    // Ignored where nohup started it: then it goes on without its terminal.
    ::sigaction(SIGHUP, nullptr, &former_hup_);
    if (former_hup_.sa_handler != SIG_IGN) ::sigaction(SIGHUP, &action, nullptr);
  }
  ~SignalScope() {
    if (!active_) return;
    ::sigaction(SIGINT, &former_int_, nullptr);
    ::sigaction(SIGTERM, &former_term_, nullptr);
    ::sigaction(SIGHUP, &former_hup_, nullptr);
    ::signal(SIGPIPE, former_pipe_);
  }
  int count() const { return active_ ? g_signals.load() : 0; }

 private:
  bool active_;
  struct sigaction former_int_ {}, former_term_ {}, former_hup_ {};
  void (*former_pipe_)(int) = SIG_DFL;
};

struct Role {
  std::string role, name;
  // As a process.
  Child child;
  // As a thread.
  std::jthread thread;
  std::shared_ptr<std::atomic<bool>> ended;
  std::shared_ptr<std::string> thread_failure;
  // Since the last step of the run.
  int deaths = 0;
  bool waiting = false;  // for start_at
  Clock::time_point start_at;
};

// The last line that a process wrote, to say why it died.
std::string last_line(const std::string& path) {
  std::ifstream file(path);
  std::string line, last;
  while (std::getline(file, line))
    if (!line.empty()) last = line;
  return last;
}

class Supervisor {
 public:
  Supervisor(const RunConfig& config, const std::string& run_dir, const std::string& run_id, const TrainOptions& options)
      : config_(config),
        run_dir_(run_dir),
        run_id_(run_id),
        options_(options),
        zmq_(1),
        progress_(config, options.out, options.quiet ? Progress::Style::kSilent : Progress::style_for(options.out)) {
    make_directories(log_dir());
    endpoint_ = options.in_process ? fmt::format("inproc://hub-{}", ::getpid()) : net::ipc_endpoint(run_dir + "/sockets", "hub");
    config_hash_ = config_file_hash(run_dir);
    // Roles are this very program: its file may be replaced while the run goes on, and a role of another version must not join.
    program_ = options.program.empty() ? "/proc/self/exe" : options.program;
    if (config.learn.lora) {
      keeper_.emplace(run_dir);
      add("base", "base");
    }
    add("hub", "hub");
    add("learner", "learner");
    for (int64_t i = 0; i < config.workers.reward; ++i) add("reward", fmt::format("reward-{}", i));
    for (int64_t i = 0; i < config.workers.policy; ++i) add("policy", fmt::format("policy-{}", i));
  }

  ~Supervisor() {
    for (auto& r : roles_)
      if (r.thread.joinable()) r.thread.request_stop();
    if (over_) return;
    // Left by an exception: what the learner had in shared memory must not outlast it.
    for (auto& r : roles_) r.child = Child();
    for (auto& r : roles_)
      if (r.thread.joinable()) r.thread.join();
    remove_leftovers(run_dir_);
  }

  SupervisedEnd run() {
    SignalScope signals(options_.handle_signals);
    remove_leftovers(run_dir_);
    for (auto& r : roles_) start(r, false);
    HubClient client(zmq_, endpoint_, "supervisor", "supervisor", run_id_, {}, client_options(config_));
    Clock::time_point stop_by{};
    while (end_.state.empty() && end_.failure.empty()) {
      while (auto message = client.receive(end_.state.empty() ? 50 : 0)) {
        if (message->type() == "event") event(message->header.value("body", Json::object()));
        if (!end_.state.empty()) break;
        if (signals.count() > 0 || options_.stop.stop_requested()) break;
      }
      if (!end_.state.empty()) break;
      if (!asked_to_stop_ && (signals.count() > 0 || options_.stop.stop_requested())) {
        asked_to_stop_ = true;
        stop_by = Clock::now() + std::chrono::seconds(20);
        client.send_durable(BusMessage("stop"));
        progress_.note("stopping");
      }
      if (asked_to_stop_ && (signals.count() > 1 || Clock::now() > stop_by)) {
        end_.state = "stopped";
        break;
      }
      look_after(client);
    }
    stop_roles();
    progress_.close();
    keeper_.reset();
    if (!options_.in_process || config_.learn.lora) {
      std::error_code ec;
      fs::remove_all(fs::path(net::ipc_endpoint(run_dir_ + "/sockets", "hub").substr(6)).parent_path(), ec);
    }
    remove_leftovers(run_dir_);
    over_ = true;
    if (end_.state.empty()) end_.state = "failed";
    return end_;
  }

 private:
  std::string log_dir() const { return (fs::path(run_dir_) / "logs").string(); }
  std::string log_file(const Role& r) const { return (fs::path(log_dir()) / (r.name + ".log")).string(); }

  void add(const std::string& role, const std::string& name) {
    Role r;
    r.role = role;
    r.name = name;
    roles_.push_back(std::move(r));
  }

  void log(const std::string& line) {
    std::ofstream(fs::path(log_dir()) / "supervisor.log", std::ios::app) << line << "\n";
    // Who ends while all are told to end is no news.
    if (!asked_to_stop_) progress_.note(line);
  }

  void start(Role& r, bool again) {
    r.waiting = false;
    if (options_.in_process) {
      start_thread(r);
      return;
    }
    if (r.role == "learner") remove_leftovers(run_dir_);  // those of the one that died
    std::vector<std::string> args{"role", r.role, "--run", run_dir_, "--name", r.name, "--endpoint", endpoint_, "--config-hash", config_hash_};
    if (again && r.role == "hub") args.push_back("--keep-leases");
    r.child = Child::start(program_, args, log_file(r));
    if (options_.on_start) options_.on_start(r.name, r.child.pid());
  }

  void start_thread(Role& r) {
    r.ended = std::make_shared<std::atomic<bool>>(false);
    r.thread_failure = std::make_shared<std::string>();
    r.thread = std::jthread([this, role = r.role, name = r.name, ended = r.ended, failure = r.thread_failure](std::stop_token stop) {
      const RoleContext context{config_, run_dir_, run_id_, endpoint_, name, zmq_, stop};
      try {
        if (role == "hub")
          run_hub(context, false);
        else if (role == "learner")
          run_learner(context);
        else if (role == "policy")
          run_policy_worker(context);
        else if (role == "base")
          run_base(context);
        else
          run_reward_worker(context);
      } catch (const std::exception& e) {
        *failure = e.what();
      }
      ended->store(true);
    });
  }

  void event(const Json& body) {
    const std::string kind = body.value("event", "");
    if (kind == "step" || kind == "evaluation") {
      trouble_.clear();
      for (auto& r : roles_) r.deaths = 0;
    }
    if (kind == "finished" || kind == "stopped" || kind == "failed") end_.state = kind;
    if (kind == "failed") end_.failure = body.value("line", "");
    if (kind == "trouble") trouble_ = body.value("line", "");
    progress_.event(body);
    if (options_.on_event) options_.on_event(body);
  }

  void look_after(HubClient& client) {
    for (auto& r : roles_) {
      if (options_.in_process) {
        if (r.ended->load() && !r.thread_failure->empty()) {
          end_.failure = fmt::format("{}: {}", r.name, *r.thread_failure);
          return;
        }
        continue;
      }
      if (r.waiting) {
        if (Clock::now() >= r.start_at && (!asked_to_stop_ || r.role == "hub")) start(r, true);
        continue;
      }
      const auto ended = r.child.poll();
      if (!ended) continue;
      if (asked_to_stop_ && r.role != "hub") continue;  // the hub alone has something left to write
      if (ended->signal == 0 && ended->exit_code == 0) {
        if (r.role == "base") continue;  // it has handed over what it made
        // The hub told it to stop; its word on why is on the way. Only if the hub died before saying so is it needed again.
        r.waiting = true;
        r.start_at = Clock::now() + std::chrono::seconds(2);
        continue;
      }
      std::string why = ended->signal == 0 ? last_line(log_file(r)) : std::string();
      if (why.empty() && r.role == "hub") why = trouble_;
      const std::string what = fmt::format("{} ended ({}){}", r.name, ended->text(), why.empty() ? "" : ": " + why);
      ++r.deaths;
      // Exit code 2 is the user's input: it will not get better by trying again. A role that says what it misses (a
      // full disk) is tried a few times, one that was killed many.
      const int most = ended->signal == 0 ? std::min(options_.max_restarts, 3) : options_.max_restarts;
      if ((ended->signal == 0 && ended->exit_code == 2) || r.deaths > most) {
        end_.failure = what;
        return;
      }
      ++end_.restarts;
      const auto wait_ms = static_cast<int64_t>(std::min(5000.0, 50.0 * std::pow(2.0, r.deaths - 1)));
      log(fmt::format("{}; starting it again", what));
      if (r.role != "hub" && r.role != "base") client.send_durable(BusMessage("gone", {{"name", r.name}}));
      r.waiting = true;
      r.start_at = Clock::now() + std::chrono::milliseconds(wait_ms);
    }
  }

  void stop_roles() {
    if (options_.in_process) {
      for (auto& r : roles_) r.thread.request_stop();
      for (auto& r : roles_)
        if (r.thread.joinable()) r.thread.join();
      return;
    }
    // The hub told them to stop; where there is no hub any more they are ended: nothing of theirs is lost that is committed.
    const bool orderly = end_.state == "finished" || end_.state == "stopped" || (end_.state == "failed" && !end_.failure.empty());
    const auto until = Clock::now() + std::chrono::milliseconds(orderly ? 5000 : 500);
    for (auto& r : roles_) {
      if (!r.child.started()) continue;
      if (!orderly) r.child.signal(SIGKILL);
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
      if (!r.child.wait(static_cast<int>(std::max<int64_t>(left, 10)))) {
        r.child.signal(SIGKILL);
        r.child.wait(5000);
      }
    }
  }

  const RunConfig& config_;
  std::string run_dir_, run_id_;
  const TrainOptions& options_;
  std::optional<BaseKeeper> keeper_;  // before the roles, which ask it
  zmq::context_t zmq_;
  std::string endpoint_, program_, config_hash_;
  std::vector<Role> roles_;
  Progress progress_;
  std::string trouble_;  // what the hub said when it had to give up, since the last step
  SupervisedEnd end_;
  bool asked_to_stop_ = false;
  bool over_ = false;
};

}  // namespace

SupervisedEnd supervise(const RunConfig& config, const std::string& run_dir, const std::string& run_id,
                        const TrainOptions& options) {
  return Supervisor(config, run_dir, run_id, options).run();
}

}  // namespace perigee::rollout
