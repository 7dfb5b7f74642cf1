#include "rollout/run/run.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <thread>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "reward/rubric.h"
#include "rollout/roles/roles.h"
#include "rollout/run/resume_check.h"
#include "rollout/run/run_memory.h"
#include "rollout/run/supervisor.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/weights/base_weights.h"
#include "rollout/weights/checkpoints.h"
#include "rollout/weights/compute.h"
#include "storage/store.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;

constexpr const char* kStore = "store.sqlite";
constexpr const char* kConfig = "config.json";

// To the role's log, which may be on a full disk: then the words are lost and nothing else.
void say(const std::string& line) {
  std::fputs((line + "\n").c_str(), stderr);
  std::fflush(stderr);
}

std::string join(const std::string& directory, const char* name) { return (fs::path(directory) / name).string(); }

// Holds a run directory for one supervisor; the kernel lets go when the process dies.
class RunLock {
 public:
  explicit RunLock(const std::string& run_dir) {
    const std::string path = join(run_dir, "run.lock");
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) throw_environment("cannot write {}: {}", path, std::strerror(errno));
    if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      ::close(fd_);
      throw_input("{} is being run by another process; wait for it, or choose another run.dir", run_dir);
    }
  }
  ~RunLock() { ::close(fd_); }
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int fd_;
};

std::string new_run_dir(const RunConfig& config) {
  if (!config.run.dir.empty()) return config.run.dir;
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  char stamp[32];
  std::strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", &utc);
  const std::string base = fmt::format("runs/{}-{}", config.run.name, stamp);
  std::string dir = base;
  for (int n = 2; fs::exists(dir); ++n) dir = fmt::format("{}-{}", base, n);
  return dir;
}

// Everything that can be wrong with a configuration is found here, before anything is written.
void check_everything(const RunConfig& config, const TrainOptions& options) {
  const RunModel model = make_run_model(config);
  const auto& layout = model.layout;
  check_device(config, *layout);
  config.rollout.sampling.validate(layout->config().vocab_size);
  const auto tokenizer = make_tokenizer(config, layout->config());
  const RunTasks tasks(config, layout->config(), *tokenizer);
  const auto rubric = reward::Rubric::parse(config.reward, "reward");
  const std::string warning = tasks.check(config, layout->config().max_length);
  if (!warning.empty() && !options.quiet) fmt::print(options.out, "warning: {}\n", warning);
}

// Nothing there, or only what a run left that was killed before its configuration was written.
bool is_unused(const std::string& directory) {
  std::error_code ec;
  if (!fs::is_directory(directory, ec)) return false;
  for (const auto& entry : fs::directory_iterator(directory, ec)) {
    const std::string name = entry.path().filename().string();
    if (name != "run.lock" && !(name.starts_with("config.json.") && name.ends_with(".tmp"))) return false;
  }
  return !ec;
}

// The hub of a supervisor that was killed dies a moment after it: waits until it has let go of the store's lock.
void wait_for_former_hub(const std::string& run_dir) {
  const int fd = ::open(join(run_dir, "store.sqlite.lock").c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  for (int i = 0; i < 500 && ::flock(fd, LOCK_EX | LOCK_NB) != 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  ::close(fd);
}

// SQLite takes paths of 512 bytes, its own resolved form; files beside the store have longer names.
void check_path_length(const std::string& run_dir) {
  constexpr size_t kMost = 480, kMostOfAName = 255;
  for (const fs::path& name : fs::path(run_dir))
    if (name.native().size() > kMostOfAName)
      throw_input("run.dir: the name {} has {} bytes, and a folder's has {} at most: choose a shorter one", quote(name.native()),
                  name.native().size(), kMostOfAName);
  std::error_code ec;
  std::string path = fs::weakly_canonical(run_dir, ec).string();
  if (ec || !path.starts_with('/')) path = fs::absolute(run_dir, ec).lexically_normal().string();
  if (path.size() > kMost)
    throw_input("run.dir: its path has {} bytes, and the store's file takes {} at most: choose a shorter one", path.size(), kMost);
}

std::string with_thousands(int64_t n) {
  std::string digits = std::to_string(n);
  for (size_t at = digits.size(); at > 3; at -= 3) digits.insert(at - 3, ",");
  return digits;
}

// One line at the start: what runs, where, how large it is and for how long.
void introduce(const RunConfig& config, const std::string& run_dir, bool again, const TrainOptions& options) {
  if (options.quiet) return;
  const RunModel model = make_run_model(config);
  const std::string adapters =
      model.adapters ? fmt::format(", of which adapters of {} are trained", with_thousands(model.trained().parameter_count())) : "";
  std::string steps;
  if (config.warmup.steps > 0) steps = fmt::format("{} steps of warm-up", config.warmup.steps);
  if (config.learn.steps > 0)
    steps += fmt::format("{}{} steps of reinforcement learning", steps.empty() ? "" : " and ", config.learn.steps);
  fmt::print(options.out, "run {} {} {}: {} parameters{}, {} on the {}, at most {}\n", config.run.name,
             again ? "goes on in" : "in", run_dir, with_thousands(model.layout->parameter_count()), adapters, config.model.dtype,
             config.run.device == "cuda" ? "GPU" : "CPU", steps);
  std::fflush(options.out);
}

// Makes the store or opens it; the run in it is "running" from here on unless it is finished. Returns its state.
std::string open_run(const RunConfig& config, const std::string& run_dir, const std::string& code_version) {
  Store store(join(run_dir, kStore));
  auto transaction = store.begin();
  std::string state = "running";
  if (!store.has_run(config.run.name)) {
    RunRecord record;
    record.id = config.run.name;
    record.config = config.effective.dump();
    record.code_version = code_version;
    store.create_run(record);
  } else {
    state = store.run(config.run.name).state;
    if (state != "finished") store.set_run_state(config.run.name, "running");
  }
  transaction.commit();
  return state;
}

// Says what the run takes of the GPU, and refuses what does not fit.
void look_at_memory(const RunConfig& config, const TrainOptions& options) {
  if (config.run.device != "cuda") return;
  const RunMemory memory = plan_run_memory(config, make_run_model(config));
  const auto device = policy::device_at_rest(0);
  check_run_memory(memory, device.name, device.free_bytes);
  if (options.quiet) return;
  fmt::print(options.out, "{}, {:.1f} GiB free\n", device.name, static_cast<double>(device.free_bytes) / (int64_t{1} << 30));
  for (const std::string& line : memory.lines()) fmt::print(options.out, "  {}\n", line);
  std::fflush(options.out);
}

RunOutcome supervised(const RunConfig& config, const std::string& run_dir, const std::string& run_id,
                      const TrainOptions& options) {
  {
    StoreReader reader(join(run_dir, kStore));
    sweep_checkpoints(run_dir, reader.forgotten_checkpoints(run_id));
  }
  const SupervisedEnd end = supervise(config, run_dir, run_id, options);
  RunOutcome outcome = read_outcome(run_dir);
  outcome.state = end.state;
  outcome.failure = end.failure;
  outcome.restarts = end.restarts;
  return outcome;
}

}  // namespace

RunConfig run_config_of(const std::string& run_dir) {
  const std::string path = join(run_dir, kConfig);
  if (!file_exists(path) && file_exists(join(run_dir, kStore)))
    throw_input("{} holds no run that can be computed again: there is no {}. Of a run that was copied put it beside the store; of sessions of "
                "`perigee serve`, which never had one, `perigee rollouts`, `show` and `store` read what there is",
                run_dir, kConfig);
  if (!file_exists(path)) throw_input("{} holds no run: there is no {}", run_dir, kConfig);
  return load_run_config(path);
}

RunOutcome train(RunConfig config, const TrainOptions& options) {
  const std::string run_dir = new_run_dir(config);
  check_path_length(run_dir);
  std::error_code ec;
  if (fs::exists(run_dir, ec) && !is_unused(run_dir)) {
    const bool run = file_exists(join(run_dir, kStore)) || file_exists(join(run_dir, kConfig));
    if (run) throw_input("{} holds another run; choose another run.dir, or go on with it: perigee resume {}", run_dir, run_dir);
    throw_input("{} is there already and is no empty directory; choose another run.dir", run_dir);
  }
  // Likewise of its tasks: before they are looked at, so that these are the ones.
  pin_task_files(config.tasks);
  config.effective["tasks"] = config.tasks;
  check_everything(config, options);
  look_at_memory(config, options);
  if (config.model.config.is_string()) {
    // The run keeps what it was made from: the file may change.
    config.model.config = policy::to_json(policy::load_model_config(config.model.config.get<std::string>()));
    config.effective["model"]["config"] = config.model.config;
  }
  config.effective["model"]["path"] = config.model.path;
  config.effective["tokenizer"]["path"] = config.tokenizer.path;
  config.run.dir = fs::absolute(run_dir).lexically_normal().string();
  config.effective["run"]["dir"] = config.run.dir;

  make_directories(config.run.dir);
  RunLock lock(config.run.dir);
  // Another program may have had it between the look and the lock.
  if (!is_unused(config.run.dir)) throw_input("{} holds another run; choose another run.dir", run_dir);
  // The configuration first: a run that was killed between the two can be gone on with.
  write_file_atomic(join(config.run.dir, kConfig), config.effective.dump(2) + "\n");
  open_run(config, config.run.dir, options.code_version);
  introduce(config, run_dir, false, options);
  return supervised(config, config.run.dir, config.run.name, options);
}

namespace {

// Such a run needs nothing any more. A store that cannot be read, or was just made, is open_run's to judge.
bool is_finished(const std::string& dir) {
  try {
    const auto runs = StoreReader(join(dir, kStore)).runs();
    return !runs.empty() && runs.front().state == "finished";
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

RunOutcome resume(const std::string& run_dir, const TrainOptions& options) {
  const RunConfig config = run_config_of(run_dir);
  RunLock lock(run_dir);
  const std::string dir = fs::absolute(run_dir).lexically_normal().string();
  wait_for_former_hub(dir);
  check_resumable(config, dir);
  if (!is_finished(dir)) check_task_files(config.tasks);
  if (open_run(config, dir, options.code_version) == "finished") return read_outcome(dir);
  look_at_memory(config, options);
  introduce(config, run_dir, true, options);
  return supervised(config, dir, config.run.name, options);
}

RunOutcome read_outcome(const std::string& run_dir) {
  StoreReader reader(join(run_dir, kStore));
  const auto runs = reader.runs();
  if (runs.empty()) throw_input("{} holds no run: its store is empty", run_dir);
  RunOutcome outcome;
  outcome.run_dir = run_dir;
  outcome.run_id = runs.front().id;
  outcome.state = runs.front().state;
  for (const auto& e : reader.evaluations(outcome.run_id)) {
    if (e.phase == "warmup") outcome.accuracy_before = e.accuracy;
    if (e.phase == "rl") outcome.accuracy_after = e.accuracy;
  }
  const auto versions = reader.versions(outcome.run_id);
  if (!versions.empty()) {
    outcome.version = versions.back().version;
    outcome.weights_hash = versions.back().weights_hash;
  }
  // The last batch may have been recorded without its step being done.
  const auto steps = reader.train_steps(outcome.run_id);
  for (auto step = steps.rbegin(); step != steps.rend() && outcome.steps == 0; ++step)
    if (!versions.empty() && reader.train_batch(outcome.run_id, *step)->version_after <= outcome.version) outcome.steps = *step;
  return outcome;
}

int role_main(const std::string& role, const std::vector<std::string>& args) {
  // Ctrl-C in a terminal, its end, and the word of a service manager reach every process of the run: the supervisor decides
  // what they mean.
  ::signal(SIGINT, SIG_IGN);
  ::signal(SIGTERM, SIG_IGN);
  ::signal(SIGHUP, SIG_IGN);
  ::signal(SIGPIPE, SIG_IGN);
  // It was started as /proc/self/exe; top and pgrep look at this name, of 15 bytes at most.
  ::prctl(PR_SET_NAME, ("perigee-" + role).c_str());
  try {
    std::string run_dir, name, endpoint, config_hash;
    bool keep_leases = false;
    for (size_t i = 0; i < args.size(); ++i) {
      const auto value = [&]() -> std::string {
        if (i + 1 >= args.size()) throw_input("role {}: {} lacks its value", role, args[i]);
        return args[++i];
      };
      if (args[i] == "--run")
        run_dir = value();
      else if (args[i] == "--name")
        name = value();
      else if (args[i] == "--endpoint")
        endpoint = value();
      else if (args[i] == "--config-hash")
        config_hash = value();
      else if (args[i] == "--keep-leases")
        keep_leases = true;
      else
        throw_input("role {}: unknown argument {}", role, args[i]);
    }
    if (run_dir.empty() || name.empty() || endpoint.empty())
      throw_input("role {}: --run, --name and --endpoint are needed; the supervisor of a run starts its roles", role);
    if (!config_hash.empty() && config_file_hash(run_dir) != config_hash)
      throw_input("{}: it was changed while the run goes on: put it back, then resume the run", join(run_dir, kConfig));
    const RunConfig config = run_config_of(run_dir);
    zmq::context_t zmq(1);
    const RoleContext context{config, run_dir, config.run.name, endpoint, name, zmq, {}};
    if (role == "hub") {
      run_hub(context, keep_leases);
    } else if (role == "learner") {
      run_learner(context);
    } else if (role == "policy") {
      run_policy_worker(context);
    } else if (role == "reward") {
      run_reward_worker(context);
    } else if (role == "base") {
      run_base(context);
    } else {
      throw_input("there is no role {}; the roles are hub, learner, policy, reward and base", role);
    }
    return 0;
  } catch (const Error& e) {
    say(e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    say(fmt::format("internal error: {}", e.what()));
    return 1;
  }
}

}  // namespace perigee::rollout
