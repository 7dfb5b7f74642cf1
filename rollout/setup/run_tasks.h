// The tasks of a run as token ids: prompts rendered for its model, worked examples, and what the hub is fed with.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "policy/learn/trainer.h"
#include "policy/tokenizer/tokenizer.h"
#include "rollout/setup/environment.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/task_feed.h"
#include "rollout/tasks/tasks.h"

namespace perigee::rollout {

// Thread safety: none (the curriculum has a state).
class RunTasks {
 public:
  // tokenizer outlives it.
  RunTasks(const RunConfig& config, const policy::ModelConfig& model, const policy::Tokenizer& tokenizer);
  RunTasks(const RunTasks&) = delete;  // generators count tokens with it

  // Every task of a file, and one of each level of a generator, fits the run. max_length: the model's.
  // ERRORS (input): with FILE:LINE, a prompt too long, a worked example missing where the run learns from them or longer than
  // the model holds; more tasks for an evaluation than are held out.
  // Returns a warning, or "": a worked example that is longer than what the policy may say.
  std::string check(const RunConfig& config, int64_t max_length) const;
  // Distinct held-out tasks; 0: no such number.
  int64_t held_out_count() const { return static_cast<int64_t>(source_->held_out_count()); }
  PreparedTask train(int64_t ordinal) const;
  PreparedTask held_out(int64_t index) const;
  // The index-th worked example: prompt, example and stop token, trained on the example and on what the
  // prompt answers (Task::answered); of an environment the tools' answers too, which are not
  // trained on. ERRORS (input): the source has none.
  policy::TrainSequence worked_example(int64_t index) const;
  void feedback(int64_t task_index, const std::vector<double>& totals);
  // The feed of a hub, borrowing this object.
  TaskFeed feed();
  // What the folder of an agent's tools begins with.
  std::vector<TaskFile> files(int64_t task_index, bool held_out) const;
  const Environment* environment() const { return environment_.get(); }  // null: none
  const std::vector<int32_t>& stop_tokens() const { return stop_tokens_; }

 private:
  // How a generator counts the tokens of its prompts.
  PromptTokens prompt_counter(const RunConfig& config, int64_t longest) const;
  PreparedTask prepare(const Task& task) const;
  // answered, of each token: it is an answer too; null: nobody asks.
  std::vector<int32_t> prompt_tokens(const Task& task, std::vector<uint8_t>* answered = nullptr) const;
  std::vector<int32_t> prompt_pieces(const Task& task, std::vector<uint8_t>* answered) const;
  std::string check_worked_example(const RunConfig& config, const Task& task, int64_t max_length) const;
  policy::TrainSequence worked_example(const Task& task) const;
  void append_worked_turns(const Task& task, policy::TrainSequence& s) const;

  const policy::Tokenizer& tokenizer_;
  std::unique_ptr<Environment> environment_;
  int32_t bos_ = 0, eos_ = 0;
  std::vector<int32_t> stop_tokens_;
  std::unique_ptr<TaskSource> source_;  // counts with what stands above
  std::vector<LevelRecord> records_;
};

// The tokens that end a generation: the end of text and, in a conversation, of a turn.
std::vector<int32_t> stop_tokens(const policy::ModelConfig& model, const policy::Tokenizer& tokenizer);

}  // namespace perigee::rollout
