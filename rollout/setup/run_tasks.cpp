#include "rollout/setup/run_tasks.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "base/leftovers.h"
#include "base/random.h"
#include "policy/tokenizer/chat.h"
#include "rollout/setup/workspace.h"

namespace perigee::rollout {
namespace {

constexpr uint64_t kTaskSeeds = 0x7461736Bu;
// Worked examples are drawn far from the tasks of reinforcement learning, so that the two see different problems where
// there are enough of them.
constexpr int64_t kWorkedOffset = int64_t{1} << 32;

std::string text_of(const Task& task) {
  if (task.messages.empty()) return task.prompt;
  std::string text;
  for (const auto& m : task.messages) {
    text += fmt::format("{}: {}\n", policy::role_name(m.role), m.content);
    for (const auto& call : m.tool_calls) text += fmt::format("call: {}({})\n", call.name, call.arguments);
  }
  return text;
}

[[noreturn]] void refuse_worked_example(const Task& task) {
  throw_input("{}: worked_example: missing, and the run learns from them; set warmup.steps and learn.ptx_batch to 0",
              task.where.empty() ? "tasks" : task.where);
}

}  // namespace

std::vector<int32_t> stop_tokens(const policy::ModelConfig& model, const policy::Tokenizer& tokenizer) {
  std::vector<int32_t> ids{model.eos_id};
  for (const auto name : {policy::special::kImEnd, policy::special::kEot})
    if (const auto id = tokenizer.find_special(name); id && std::find(ids.begin(), ids.end(), *id) == ids.end())
      ids.push_back(*id);
  return ids;
}

RunTasks::RunTasks(const RunConfig& config, const policy::ModelConfig& model, const policy::Tokenizer& tokenizer)
    : tokenizer_(tokenizer),
      environment_(Environment::make(config)),
      bos_(model.bos_id),
      eos_(model.eos_id),
      stop_tokens_(rollout::stop_tokens(model, tokenizer)),
      source_(make_task_source(config.tasks, "tasks", derive_seed(config.seed(), kTaskSeeds),
                               prompt_counter(config, model.max_length))),
      records_(source_->levels()) {
  if (config.warmup.steps > 0 || config.learn.ptx_batch > 0) worked_example(0);
}

PromptTokens RunTasks::prompt_counter(const RunConfig& config, int64_t longest) const {
  PromptTokens t;
  t.text = [this](std::string_view text) {
    std::vector<int32_t> ids;
    tokenizer_.append_plain(text, ids);
    return static_cast<int64_t>(ids.size());
  };
  t.prompt = [this](const Task& task) { return static_cast<int64_t>(prompt_tokens(task).size()); };
  t.answer = config.rollout.max_new_tokens;
  t.longest = longest;
  return t;
}

std::vector<int32_t> RunTasks::prompt_tokens(const Task& task, std::vector<uint8_t>* answered) const {
  std::vector<int32_t> ids = prompt_pieces(task, answered);
  if (answered != nullptr) answered->resize(ids.size(), 0);
  return ids;
}

std::vector<int32_t> RunTasks::prompt_pieces(const Task& task, std::vector<uint8_t>* answered) const {
  if (environment_) {
    const EnvironmentConfig& e = environment_->config();
    std::vector<policy::Message> messages = task.messages;
    if (messages.empty()) messages.push_back({policy::Role::kUser, task.prompt});
    if (!e.system.empty()) messages.insert(messages.begin(), {policy::Role::kSystem, e.system});
    const std::string& tools = e.declare ? environment_->tools().declarations() : task.tools;
    return policy::render_chat(tokenizer_, messages, tools, true);
  }
  if (task.messages.empty()) {
    std::vector<int32_t> ids{bos_};
    const std::string_view text = task.prompt;
    size_t at = 0;
    for (const TextRange& r : task.answered) {
      PERIGEE_CHECK(at <= r.begin && r.begin < r.end && r.end <= text.size(), "answered [{}, {}) of {} bytes after {}", r.begin,
                    r.end, text.size(), at);
      tokenizer_.append_plain(text.substr(at, r.begin - at), ids);
      if (answered != nullptr) answered->resize(ids.size(), 0);
      tokenizer_.append_plain(text.substr(r.begin, r.end - r.begin), ids);
      if (answered != nullptr) answered->resize(ids.size(), 1);
      at = r.end;
    }
    tokenizer_.append_plain(text.substr(at), ids);
    return ids;
  }
  return policy::render_chat(tokenizer_, task.messages, task.tools, true);
}

std::string RunTasks::check(const RunConfig& config, int64_t max_length) const {
  if (const int64_t held_out = held_out_count(); held_out > 0 && config.eval.tasks > held_out)
    throw_input("eval.tasks: {} is more than the {} held-out tasks there are", config.eval.tasks, held_out);
  const bool worked = config.warmup.steps > 0 || config.learn.ptx_batch > 0;
  std::string warning;
  const auto check_one = [&](const Task& task, bool is_train) {
    const std::string where = task.where.empty() ? "" : task.where + ": ";
    if (is_train && worked && task.worked_example.empty() && task.worked_turns.empty()) refuse_worked_example(task);
    const auto prompt = static_cast<int64_t>(prompt_tokens(task).size());
    if (is_train && worked)
      if (std::string said = check_worked_example(config, task, max_length); warning.empty()) warning = std::move(said);
    if (prompt + config.rollout.max_new_tokens > max_length)
      throw_input("{}rollout.max_new_tokens: {} after a prompt of {} tokens exceed the model's {}", where,
                  config.rollout.max_new_tokens, prompt, max_length);
  };
  const uint64_t levels = source_->levels();  // of which the first tasks are one each
  for (uint64_t i = 0; i < std::max(levels, source_->train_count()); ++i)
    if (source_->level_weights()[source_->level_of(i)] > 0) check_one(source_->train(i), true);
  for (uint64_t i = 0; i < std::max(levels, source_->held_out_count()); ++i)
    check_one(source_->held_out(i), false);
  return warning;
}

PreparedTask RunTasks::prepare(const Task& task) const {
  PreparedTask prepared;
  prepared.index = static_cast<int64_t>(task.index);
  prepared.prompt = prompt_tokens(task);
  prepared.prompt_text = text_of(task);
  prepared.task = {{"prompt", prepared.prompt_text}, {"answer", task.answer}, {"verifier", task.verifier}};
  if (!task.difficulty.empty()) prepared.task["difficulty"] = task.difficulty;
  return prepared;
}

PreparedTask RunTasks::train(int64_t ordinal) const {
  const auto n = static_cast<uint64_t>(ordinal);
  if (!source_->has_curriculum()) return prepare(source_->train(source_->train_index(n)));
  const auto weights = curriculum_weights(source_->level_weights(), records_, source_->curriculum_floor());
  return prepare(source_->train(source_->train_index(n, weights)));
}

PreparedTask RunTasks::held_out(int64_t index) const { return prepare(source_->held_out(static_cast<uint64_t>(index))); }

std::string RunTasks::check_worked_example(const RunConfig& config, const Task& task, int64_t max_length) const {
  // Turns whose calls the environment's tools answer are as long as these answers: known when they are learnt from.
  if (std::any_of(task.worked_turns.begin(), task.worked_turns.end(),
                  [](const policy::Message& m) { return !m.tool_calls.empty(); }))
    return {};
  const auto prompt = static_cast<int64_t>(prompt_tokens(task).size());
  const int64_t said = static_cast<int64_t>(worked_example(task).tokens.size()) - prompt;
  const std::string where = task.where.empty() ? "tasks" : task.where;
  if (prompt + said > max_length)
    throw_input("{}: worked_example: {} tokens after a prompt of {} exceed the model's {}", where, said, prompt, max_length);
  if (said - 1 <= config.rollout.max_new_tokens) return {};  // without what ends it
  return fmt::format("{}: a worked example has {} tokens, and rollout.max_new_tokens is {}: what is learnt from it is cut off when "
                     "the policy says it",
                     where, said, config.rollout.max_new_tokens);
}

policy::TrainSequence RunTasks::worked_example(int64_t index) const {
  return worked_example(source_->train(source_->train_index(static_cast<uint64_t>(kWorkedOffset + index))));
}

policy::TrainSequence RunTasks::worked_example(const Task& task) const {
  if (task.worked_example.empty() && task.worked_turns.empty()) refuse_worked_example(task);
  policy::TrainSequence s;
  s.tokens = prompt_tokens(task, &s.mask);
  s.curated = true;
  if (!task.worked_turns.empty()) {
    append_worked_turns(task, s);
    return s;
  }
  tokenizer_.append_plain(task.worked_example, s.tokens);
  const bool chat = environment_ != nullptr || !task.messages.empty();
  s.tokens.push_back(chat ? tokenizer_.special(policy::special::kImEnd) : eos_);
  s.mask.resize(s.tokens.size(), 1);
  return s;
}

// Each turn as the policy would have sampled it after its opening, and what an environment feeds in between.
void RunTasks::append_worked_turns(const Task& task, policy::TrainSequence& s) const {
  const std::string where = task.where.empty() ? "tasks" : task.where;
  std::vector<int32_t> opening;
  policy::append_generation_prompt(tokenizer_, opening);
  const auto& turns = task.worked_turns;
  int64_t calls = 0;
  int32_t number = 0;
  std::optional<TemporaryFolder> folder;
  for (size_t i = 0; i < turns.size(); ++number) {
    if (turns[i].role != policy::Role::kAssistant) throw_input("{}: a worked turn is of the role {}", where, policy::role_name(turns[i].role));
    std::vector<int32_t> message;
    policy::append_message(tokenizer_, turns[i], calls, message);
    const std::vector<int32_t> turn(message.begin() + static_cast<int64_t>(opening.size()), message.end());
    s.tokens.insert(s.tokens.end(), turn.begin(), turn.end());
    s.mask.resize(s.tokens.size(), 1);
    const bool last = ++i == turns.size();
    if (last) break;
    if (turns[i - 1].tool_calls.empty()) throw_input("{}: a worked turn without tool calls is not the last one", where);
    std::vector<int32_t> fed;
    if (turns[i].role == policy::Role::kTool) {
      for (; i < turns.size() && turns[i].role == policy::Role::kTool; ++i)
        policy::append_message(tokenizer_, turns[i], calls, fed);
      fed.insert(fed.end(), opening.begin(), opening.end());
    } else {
      if (!environment_) throw_input("{}: a worked turn calls tools, and the run has no environment", where);
      if (!folder && environment_->has_folder()) {
        folder.emplace("worked");
        prepare_workspace(folder->path(), task.files);
      }
      agents::ToolContext context;
      if (folder) context.work = folder->path();
      const auto parsed = policy::parse_assistant(tokenizer_, turn);
      const auto events = agents::run_calls(environment_->tools(), parsed, number, context, environment_->config().limits);
      fed = agents::answer_tokens(tokenizer_, parsed, events);
    }
    s.tokens.insert(s.tokens.end(), fed.begin(), fed.end());
    s.mask.resize(s.tokens.size(), 0);
  }
}

std::vector<TaskFile> RunTasks::files(int64_t task_index, bool held_out) const {
  const auto index = static_cast<uint64_t>(task_index);
  return held_out ? source_->held_out(index).files : source_->train(index).files;
}

void RunTasks::feedback(int64_t task_index, const std::vector<double>& totals) {
  LevelRecord& record = records_[source_->level_of(static_cast<uint64_t>(task_index))];
  for (const double total : totals) {
    record.attempts += 1;
    record.successes += std::clamp(total, 0.0, 1.0);
  }
}

TaskFeed RunTasks::feed() {
  TaskFeed feed;
  feed.train = [this](int64_t ordinal) { return train(ordinal); };
  feed.held_out = [this](int64_t index) { return held_out(index); };
  if (source_->has_curriculum())
    feed.feedback = [this](int64_t task_index, const std::vector<double>& totals) { feedback(task_index, totals); };
  return feed;
}

}  // namespace perigee::rollout
