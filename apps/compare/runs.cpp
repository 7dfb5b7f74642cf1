#include "apps/compare/runs.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <thread>

#include "apps/output/output.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/process.h"
#include "base/text.h"
#include "rollout/run/run.h"
#include "rollout/tasks/tasks.h"
#include "storage/store.h"

namespace perigee::apps::compare {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

std::atomic<int> stop_signal{0}, pause_asked{0};

// SIGINT, SIGTERM and SIGHUP (a terminal that closes; not under nohup) stop the runs in order while this lives; Ctrl-Z
// (SIGTSTP) is seen, for the runs are in groups of their own, which the terminal does not stop.
class StopSignals {
 public:
  StopSignals() {
    stop_signal = pause_asked = 0;
    for (const int number : kStopping) set(number, [](int n) { stop_signal = n; });
    set(SIGTSTP, [](int) { pause_asked = 1; });
  }
  ~StopSignals() {
    for (const auto& [number, action] : former_) ::sigaction(number, &action, nullptr);
  }

 private:
  static constexpr int kStopping[] = {SIGINT, SIGTERM, SIGHUP};

  void set(int number, void (*handler)(int)) {
    struct sigaction action {};
    action.sa_handler = handler;
    struct sigaction& former = former_[number];
    ::sigaction(number, nullptr, &former);
    // A shell without job control, and nohup, ignore what their children are to ignore too.
    if ((number == SIGHUP || number == SIGTSTP) && former.sa_handler == SIG_IGN) return;
    ::sigaction(number, &action, nullptr);
  }
  std::map<int, struct sigaction> former_;
};

std::string state_of(const fs::path& directory) {
  if (!file_exists((directory / "store.sqlite").string())) return "";
  try {
    return rollout::read_outcome(directory.string()).state;
  } catch (const Error&) {
    return "";  // killed while it was being made: going on with it makes it, or says what is wrong
  }
}

// Steps done, of both phases: a version is made by each.
int64_t steps_done(const fs::path& directory) {
  try {
    StoreReader store(directory / "store.sqlite");
    const auto runs = store.runs();
    if (runs.empty()) return 0;
    const auto versions = store.versions(runs.front().id);
    return versions.empty() ? 0 : static_cast<int64_t>(versions.back().version);
  } catch (const Error&) {
    return 0;  // it is being made
  }
}

// The last line that a process said which says something.
std::string last_line(const fs::path& log) {
  if (!file_exists(log.string())) return "";
  const std::string text = read_file(log.string());
  size_t end = text.find_last_not_of("\r\n \t");
  if (end == std::string::npos) return "";
  const size_t begin = text.find_last_of('\n', end);
  return printable_line(text.substr(begin == std::string::npos ? 0 : begin + 1,
                                    end - (begin == std::string::npos ? 0 : begin + 1) + 1),
                        300);
}

fs::path evaluation_config(const fs::path& out, const PlannedRun& run, size_t point) {
  return out / "configs" / fmt::format("{}.evaluate.{}.json", run.id, point);
}

json evaluated_configuration(const Plan& plan, const PlannedRun& run, const EvaluationPoint& point) {
  json config = run.effective;
  apply(config, point.set, plan.comparison.directory, point.name);
  return config;
}

struct Job {
  const PlannedRun* run = nullptr;
  size_t point = 0;
  bool evaluation = false;
  int64_t work = 1, done = 0;  // steps; of an evaluation 1
  Child child;
  fs::path log, output;
  Clock::time_point started;
};

class Runner {
 public:
  Runner(const Plan& plan, const RunsOptions& options)
      : plan_(plan),
        options_(options),
        program_(options.program.empty() ? "/proc/self/exe" : options.program) {
    for (const char* name : {"configs", "runs", "logs", "evaluations"})
      make_directories((options.out / name).string());
  }

  RunsEnd run() {
    StopSignals signals;
    for (const PlannedRun& r : plan_.runs) {
      total_ += r.steps;
      if (state_of(run_directory(options_.out, r)) == "finished") {
        finished_ += r.steps;
        ++runs_done_;
        queue_evaluations(r);
      } else {
        waiting_.push_back(run_job(r));
      }
    }
    begun_with_ = finished_;
    start_ = Clock::now();
    if (!waiting_.empty())
      note(fmt::format("{} runs, {} finished; {} at a time", plan_.runs.size(), runs_done_, options_.jobs));
    while (!waiting_.empty() || !running_.empty()) {
      while (stop_signal == 0 && !waiting_.empty() && static_cast<int64_t>(running_.size()) < options_.jobs)
        start_next();
      if (stop_signal != 0) break;
      if (pause_asked.exchange(0) != 0) pause();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      reap();
      tell();
    }
    return stop_signal != 0 ? stop() : std::move(end_);
  }

 private:
  Job run_job(const PlannedRun& r) const {
    Job job;
    job.run = &r;
    job.work = r.steps;
    job.log = options_.out / "logs" / (r.id + ".log");
    return job;
  }

  void queue_evaluations(const PlannedRun& r) {
    const auto& points = plan_.comparison.tasks[r.task].evaluate;
    for (size_t p = 0; p < points.size(); ++p) {
      if (evaluation_said(plan_, options_.out, r, p)) continue;
      Job job;
      job.run = &r;
      job.point = p;
      job.evaluation = true;
      job.log = options_.out / "logs" / fmt::format("{}.evaluate.{}.log", r.id, p);
      job.output = evaluation_file(options_.out, r, p);
      waiting_.push_back(std::move(job));
    }
  }

  void start_next() {
    Job job = std::move(waiting_.front());
    waiting_.pop_front();
    job.started = Clock::now();
    fs::remove(job.log);
    const fs::path directory = run_directory(options_.out, *job.run);
    if (!job.evaluation) wait_for_former(directory);
    if (job.evaluation) {
      fs::remove(job.output);  // before the configuration, which says what an answer is of
      const EvaluationPoint& p = plan_.comparison.tasks[job.run->task].evaluate[job.point];
      const fs::path file = evaluation_config(options_.out, *job.run, job.point);
      write_file_atomic(file.string(), evaluated_configuration(plan_, *job.run, p).dump(2) + "\n");
      StoreReader store(directory / "store.sqlite");
      const auto checkpoints = store.checkpoints(job.run->id);
      if (checkpoints.empty()) {
        fail(job, "it kept no checkpoint");
        return;
      }
      make_directories(job.output.parent_path().string());
      job.child = Child::start(
          program_,
          {"eval", "--config", file.string(), "--model", (directory / checkpoints.back().path).string(),
           "--tasks", std::to_string(p.tasks), "--threads", "1", "--device", "cpu", "--json"},
          job.log.string(), true);
    } else if (file_exists((directory / "config.json").string())) {
      job.child = Child::start(program_, {"resume", directory.string(), "--in-process", "--quiet", "--json"},
                               job.log.string(), true);
      say(fmt::format("{}: goes on", job.run->id));
    } else {
      const fs::path file = options_.out / "configs" / (job.run->id + ".json");
      json config = job.run->effective;
      config["run"]["dir"] = fs::absolute(directory).lexically_normal().string();
      write_file_atomic(file.string(), config.dump(2) + "\n");
      fs::remove_all(options_.out / "evaluations" / job.run->id);  // of a run that was here before
      job.child = Child::start(program_, {"train", file.string(), "--in-process", "--quiet", "--json"},
                               job.log.string(), true);
    }
    running_.push_back(std::move(job));
  }

  // A run whose process was killed a moment ago with its parent still holds its lock until the kernel has ended it.
  static void wait_for_former(const fs::path& directory) {
    const int fd = ::open((directory / "run.lock").c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    for (int i = 0; i < 500 && ::flock(fd, LOCK_EX | LOCK_NB) != 0; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    ::close(fd);
  }

  void reap() {
    for (size_t i = 0; i < running_.size();) {
      const auto ended = running_[i].child.poll();
      if (!ended) {
        ++i;
        continue;
      }
      Job job = std::move(running_[i]);
      running_.erase(running_.begin() + static_cast<int64_t>(i));
      if (job.evaluation)
        end_evaluation(job, *ended);
      else
        end_run(job, *ended);
    }
  }

  void end_run(Job& job, const ProcessEnd& ended) {
    const fs::path directory = run_directory(options_.out, *job.run);
    if (state_of(directory) != "finished") {
      const std::string line = last_line(job.log);
      fail(job, line.empty() ? ended.text() : line);
      return;
    }
    finished_ += job.work;
    ++runs_done_;
    const rollout::RunOutcome outcome = rollout::read_outcome(directory.string());
    const double accuracy = outcome.accuracy_after >= 0 ? outcome.accuracy_after : outcome.accuracy_before;
    say(fmt::format("{} of {}: {} {:.1f} %, {}", runs_done_, plan_.runs.size(), job.run->id, 100 * accuracy,
                    duration(std::chrono::duration<double>(Clock::now() - job.started).count())));
    queue_evaluations(*job.run);
  }

  void end_evaluation(Job& job, const ProcessEnd& ended) {
    const std::string text = file_exists(job.log.string()) ? read_file(job.log.string()) : "";
    const size_t begin = text.find('{');
    json said = begin == std::string::npos ? json() : json::parse(text.substr(begin), nullptr, false);
    if (ended.signal != 0 || ended.exit_code != 0 || !said.is_object() || !said.contains("accuracy")) {
      const std::string line = last_line(job.log);
      fail(job, line.empty() ? ended.text() : line);
      return;
    }
    said.erase("answers");
    write_file_atomic(job.output.string(), said.dump(2) + "\n");
    fs::remove(job.log);
  }

  void fail(const Job& job, const std::string& why) {
    const std::string what =
        job.evaluation
            ? fmt::format("{}, evaluate {}", job.run->id,
                          printable_line(plan_.comparison.tasks[job.run->task].evaluate[job.point].name, 60))
            : job.run->id;
    end_.failures.push_back(fmt::format("{}: {}", what, why));
    note(fmt::format("perigee: warning: {}", end_.failures.back()));
    if (!job.evaluation) total_ -= job.work;
  }

  // With its runs, until it is told to go on.
  void pause() {
    for (Job& job : running_) job.child.signal(SIGSTOP);
    ::raise(SIGSTOP);
    for (Job& job : running_) job.child.signal(SIGCONT);
  }

  RunsEnd stop() {
    note("stopping; the same command goes on from here");
    for (Job& job : running_) job.child.signal(stop_signal);
    for (Job& job : running_)
      if (!job.child.wait(60000)) job.child.signal(SIGKILL);
    running_.clear();
    end_.stopped = true;
    return std::move(end_);
  }

  // How far it is, and the time left as what is done so far suggests.
  void tell() {
    const auto now = Clock::now();
    if (now - told_ < std::chrono::milliseconds(live_ ? 1000 : 30000)) return;
    told_ = now;
    int64_t done = finished_;
    std::string parts;
    for (Job& job : running_) {
      if (!job.evaluation) {
        job.done = std::min(job.work, steps_done(run_directory(options_.out, *job.run)));
        done += job.done;
      }
      parts +=
          fmt::format("  {}{}", job.run->id,
                      job.evaluation ? " answers"
                                     : fmt::format(" {} %", 100 * job.done / std::max<int64_t>(1, job.work)));
    }
    const double seconds = std::chrono::duration<double>(now - start_).count();
    std::string left = "";
    if (const double rate = static_cast<double>(done - begun_with_) / seconds;
        done > begun_with_ && seconds > 5)
      left = ", about " + duration(static_cast<double>(total_ - done) / rate) + " left";
    const std::string text = fmt::format("{} of {} runs{}{}", runs_done_, plan_.runs.size(), left, parts);
    if (!live_)
      note(text);
    else if (!options_.quiet)
      write("\r\033[K" + printable_line(text, 150));
  }

  void say(const std::string& text) { note(text); }
  void note(const std::string& text) {
    if (options_.quiet) return;
    write(fmt::format("{}{}\n", live_ ? "\r\033[K" : "", text));
  }
  // Of a terminal that has closed nobody reads: no error.
  static void write(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stderr); }

  const Plan& plan_;
  const RunsOptions& options_;
  std::string program_;
  std::deque<Job> waiting_;
  std::vector<Job> running_;
  RunsEnd end_;
  const bool live_ = ::isatty(STDERR_FILENO) != 0;  // a line that the next one replaces
  int64_t total_ = 0, finished_ = 0, begun_with_ = 0;
  size_t runs_done_ = 0;
  Clock::time_point start_, told_{};
};

}  // namespace

fs::path run_directory(const fs::path& out, const PlannedRun& run) {
  return out / "runs" / run.id;
}

fs::path evaluation_file(const fs::path& out, const PlannedRun& run, size_t point) {
  return out / "evaluations" / run.id / fmt::format("{}.json", point);
}

OutLock::OutLock(const fs::path& out) {
  make_directories(out.string());
  const std::string path = (out / "compare.lock").string();
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd_ < 0) throw_environment("cannot write {}: {}", path, std::strerror(errno));
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    ::close(fd_);
    throw_input("{} is being worked on by another process; wait for it, or choose another --out",
                out.string());
  }
}
OutLock::~OutLock() {
  ::close(fd_);
}

void check_out(const Plan& plan, const fs::path& out) {
  std::error_code error;
  if (fs::exists(out, error) && !fs::is_directory(out, error))
    throw_input("{} is no directory; choose another --out", out.string());
  if (fs::is_directory(out, error) && !fs::is_empty(out, error) && !fs::exists(out / "compare.lock", error))
    throw_input("{} holds something that is no comparison; choose another --out", out.string());
  for (const PlannedRun& run : plan.runs) {
    const fs::path directory = run_directory(out, run);
    if (!file_exists((directory / "config.json").string())) continue;
    const json there = rollout::run_config_of(directory.string()).effective;
    json here = run.effective;
    if (there["tasks"].contains("hash")) rollout::pin_task_files(here["tasks"]);
    const std::string difference = first_difference(there, here);
    if (!difference.empty())
      throw_input("{} holds a run of another comparison: in {}, {}; choose another --out", out.string(),
                  run.id, difference);
  }
}

std::optional<json> evaluation_said(const Plan& plan, const fs::path& out, const PlannedRun& run,
                                    size_t point) {
  const fs::path answer = evaluation_file(out, run, point), file = evaluation_config(out, run, point);
  if (!file_exists(answer.string()) || !file_exists(file.string())) return std::nullopt;
  json said = json::parse(read_file(answer.string()), nullptr, false);
  const json asked = json::parse(read_file(file.string()), nullptr, false);
  const EvaluationPoint& p = plan.comparison.tasks[run.task].evaluate[point];
  if (!said.is_object() || said.value("tasks", int64_t{0}) != p.tasks ||
      asked != evaluated_configuration(plan, run, p))
    return std::nullopt;
  return said;
}

RunsEnd do_runs(const Plan& plan, const RunsOptions& options) {
  return Runner(plan, options).run();
}

}  // namespace perigee::apps::compare
