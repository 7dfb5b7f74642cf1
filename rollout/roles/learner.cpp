// The learner: master weights and optimiser state. Does what the hub commands, one command after the other: load, warm
// (supervised steps), train (one reinforcement-learning step), publish, save.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <optional>
#include <set>

#include "rollout/roles/roles.h"
#include "rollout/setup/batch.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/weights/checkpoints.h"
#include "rollout/weights/compute.h"
#include "rollout/weights/weights_channel.h"

namespace perigee::rollout {
namespace {

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

class Learner {
 public:
  explicit Learner(const RoleContext& role)
      : role_(role),
        model_(make_run_model(role.config)),
        tokenizer_(make_tokenizer(role.config, model_.layout->config())),
        tasks_(role.config, model_.layout->config(), *tokenizer_),
        compute_(role.config, model_, role.run_dir, role.stop),
        weights_(role.run_dir, arena_bytes(), compute_.base_fingerprint()),
        client_(role.zmq, role.endpoint, "learner", role.name, role.run_id, [this] { return hello(); },
                client_options(role.config)) {}

  RoleResult run() {
    while (!role_.stop.stop_requested() && !stopped_) {
      receive(commands_.empty() ? 100 : 0);
      if (commands_.empty() || stopped_) continue;
      const BusMessage command = std::move(commands_.front());
      commands_.pop_front();
      try {
        execute(command);
      } catch (const Error& e) {
        // The last good weights stay as they are: checkpoints and the store allow to go on from there.
        fail(e.what());
      }
      target_ = version_;
    }
    return {};
  }

 private:
  Json hello() const {
    Json fields = Json::object();
    if (loaded_) {
      fields["version"] = version_;
      fields["target"] = target_;
      if (published_) fields["published"] = encode("published", *published_).header;
    }
    return fields;
  }

  void receive(int timeout_ms) {
    while (auto message = client_.receive(timeout_ms)) {
      timeout_ms = 0;
      const std::string type = message->type();
      if (type == "stop")
        stopped_ = true;
      else if (type == "retire")
        weights_.retire(field<uint32_t>(message->header, "below").value_or(0));
      else if (type == "welcome")
        commands_.clear();  // commands of a hub that is no more
      else
        commands_.push_back(std::move(*message));
    }
  }

  void fail(const std::string& line) { client_.send_durable(BusMessage("failed", {{"line", line}})); }

  void execute(const BusMessage& command) {
    const std::string type = command.type();
    const Json& h = command.header;
    if (type == "load") {
      // A damaged checkpoint is not the end: the hub knows older ones.
      const auto path = field<std::string>(h, "path");
      const uint32_t version = field<uint32_t>(h, "version").value_or(0);
      try {
        load(h);
      } catch (const Error& e) {
        if (!path || path->empty()) throw;
        loaded_ = false;
        weights_.abandon(version);
        reference_.reset();
        client_.send_durable(BusMessage("load_failed", {{"version", version}, {"line", e.what()}}));
      }
    } else if (type == "warm") {
      const int64_t from = field<int64_t>(h, "from").value_or(0), to = field<int64_t>(h, "to").value_or(-1);
      target_ = static_cast<uint32_t>(to);
      for (int64_t step = from; step <= to && !stopped_ && !role_.stop.stop_requested(); ++step) {
        if (step != static_cast<int64_t>(version_) + 1) return;
        warm(step);
        receive(0);
      }
    } else if (type == "train") {
      auto request = decode_train(command);
      if (!request) throw_environment("the hub sent a training batch that cannot be read");
      if (request->version_before != version_) return;  // said twice
      target_ = request->version_after;
      train(*request);
    } else if (type == "publish") {
      publish();
    } else if (type == "save") {
      const auto path = field<std::string>(h, "path");
      if (path && field<uint32_t>(h, "version") == version_) save(*path);
    }
  }

  // The trainer of this phase; each phase begins with a fresh optimiser.
  policy::Trainer& trainer(const std::string& phase) {
    if (!trainer_ || phase_ != phase) {
      const auto& config = phase == "warmup" ? role_.config.warmup.trainer : role_.config.learn.trainer;
      if (phase == "rl" && phase_ == "warmup") keep_reference();
      trainer_.reset();
      trainer_ = model_.trainer(compute_.learn_backend(config), config);
      trainer_->set_schedule(config.schedule, 0);
      phase_ = phase;
    }
    return *trainer_;
  }

  // The reference of the KL term: the weights that reinforcement learning starts from.
  void keep_reference() {
    if (role_.config.learn.trainer.loss.kl_coef == 0) return;
    allocate_reference();
    std::memcpy(reference_.get(), weights_.data(version_), static_cast<size_t>(arena_bytes()));
  }

  // Aligned as kernels want weights to be.
  void allocate_reference() {
    const size_t bytes = (static_cast<size_t>(arena_bytes()) + 63) / 64 * 64;
    reference_.reset(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
    if (!reference_) throw_environment("out of memory: {} MiB for the reference weights of learn.kl_coef", bytes >> 20);
  }

  void load(const Json& h) {
    const auto version = field<uint32_t>(h, "version");
    const auto path = field<std::string>(h, "path"), phase = field<std::string>(h, "phase");
    if (!version || !path || !phase) throw_environment("the hub sent a load command that cannot be read");
    std::byte* memory = weights_.begin(*version);
    trainer_.reset();
    phase_.clear();
    if (path->empty()) {
      first_arena(role_.config, model_, memory);
      phase_ = "warmup";
    } else {
      const std::string directory = (std::filesystem::path(role_.run_dir) / *path).string();
      load_checkpoint_weights(directory, model_, compute_.base_fingerprint(), memory);
      load_checkpoint_state(directory, field<std::string>(h, "optimizer_hash").value_or(""), trainer(*phase));
      const auto reference = field<std::string>(h, "reference");
      if (reference && !reference->empty() && role_.config.learn.trainer.loss.kl_coef != 0) {
        allocate_reference();
        load_checkpoint_weights((std::filesystem::path(role_.run_dir) / *reference).string(), model_, compute_.base_fingerprint(),
                                reference_.get());
      }
    }
    version_ = target_ = *version;
    loaded_ = true;
    client_.send_durable(BusMessage("loaded", {{"version", version_}, {"hash", hash(version_)}}));
  }

  int64_t arena_bytes() const { return model_.trained().weight_bytes(); }

  std::string hash(uint32_t version) const {
    return arena_hash(weights_.data(version), arena_bytes(), compute_.base_fingerprint());
  }

  policy::StepMetrics step(policy::Trainer& trainer, const std::vector<policy::TrainSequence>& batch,
                           const std::byte* reference) {
    std::byte* next = weights_.begin(version_ + 1);
    policy::StepMetrics metrics;
    try {
      metrics = trainer.step(weights_.data(version_), next, batch, reference);
    } catch (...) {
      weights_.abandon(version_ + 1);
      throw;
    }
    if (!handed_over_.contains(version_)) weights_.abandon(version_);
    ++version_;
    return metrics;
  }

  void report(const std::string& phase, int64_t step, const policy::StepMetrics& m, double seconds) {
    Stepped s;
    s.phase = phase;
    s.step = step;
    s.version = version_;
    s.hash = hash(version_);
    s.metrics = {{"loss", m.loss},
                 {"policy_loss", m.policy_loss},
                 {"kl", m.kl},
                 {"entropy", m.entropy},
                 {"ptx_loss", m.ptx_loss},
                 {"grad_norm", m.grad_norm},
                 {"lr", m.lr},
                 {"clip_fraction", m.clip_fraction},
                 {"ratio_mean", m.ratio_mean},
                 {"mismatch_kl", m.mismatch_kl},
                 {"mismatch_max", m.mismatch_max},
                 {"mismatch_share", m.mismatch_share},
                 {"router_max_load", m.router_max_load},
                 {"tokens", static_cast<double>(m.tokens)},
                 {"trained_tokens", static_cast<double>(m.trained_tokens)},
                 {"sequences", static_cast<double>(m.sequences)},
                 {"dropped_sequences", static_cast<double>(m.dropped_sequences)},
                 {"learn_seconds", seconds}};
    client_.send_durable(encode(s));
  }

  static double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void warm(int64_t number) {
    const auto start = std::chrono::steady_clock::now();
    const auto metrics = step(trainer("warmup"), warmup_examples(role_.config, tasks_, number), nullptr);
    report("warmup", number, metrics, seconds_since(start));
  }

  void train(TrainRequest& request) {
    const auto start = std::chrono::steady_clock::now();
    for (auto& example : ptx_examples(role_.config, tasks_, request.step)) request.batch.push_back(std::move(example));
    auto& rl = trainer("rl");
    const auto metrics = step(rl, request.batch, reference_.get());
    report("rl", request.step, metrics, seconds_since(start));
    if (request.publish) publish();
  }

  void publish() {
    published_ = weights_.notice(version_);
    handed_over_.insert(version_);
    client_.send_durable(encode("published", *published_));
  }

  void save(const std::string& path) {
    // Before the first step of a phase its optimiser state is all zeros, which is a state like any other.
    auto& t = trainer(phase_.empty() ? "warmup" : phase_);
    const std::string directory = (std::filesystem::path(role_.run_dir) / path).string();
    const auto saved = save_checkpoint(directory, role_.config, model_, compute_.base_fingerprint(), weights_.data(version_), t);
    client_.send_durable(BusMessage("saved", {{"version", version_},
                                              {"path", path},
                                              {"weights_hash", saved.weights_hash},
                                              {"optimizer_hash", saved.optimizer_hash},
                                              {"bytes", saved.bytes}}));
  }

  const RoleContext& role_;
  RunModel model_;
  std::unique_ptr<policy::Tokenizer> tokenizer_;
  RunTasks tasks_;
  Compute compute_;
  WeightsPublisher weights_;
  std::unique_ptr<policy::Trainer> trainer_;
  std::string phase_;
  std::unique_ptr<std::byte, Free> reference_;
  bool loaded_ = false, stopped_ = false;
  uint32_t version_ = 0, target_ = 0;
  std::optional<WeightsNotice> published_;
  std::set<uint32_t> handed_over_;
  std::deque<BusMessage> commands_;
  HubClient client_;
};

}  // namespace

RoleResult run_learner(const RoleContext& role) { return Learner(role).run(); }

}  // namespace perigee::rollout
