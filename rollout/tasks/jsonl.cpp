// Tasks from files with one JSON object per line:
//   {"prompt": "..." | "messages": [{"role": "user", "content": "..."}], "answer": "...",
//    "verifier": "numeric", "worked_example": "..." | "worked_turns": [...], "tools": [...],
//    "files": {"NAME": "TEXT"}, "databases": {"NAME": "SQL"}}
// with messages, worked_turns and tools as in rollout/tasks/conversation.h. All but the first two may be absent; id, source
// and metadata may stand there and mean nothing. Empty lines are skipped.
// "hash" and "held_out_hash" of the options: what base/hash.h says of the two files; others are refused.
#include <algorithm>
#include <bit>
#include <functional>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/text.h"
#include "reward/verifiers.h"
#include "rollout/tasks/conversation.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

// Of so many lines one in eight is none at all once in 5,000 files.
constexpr int kEnoughToHoldOut = 64;

// A permutation of [0, n) that needs no memory: a Feistel network over the next even power of two, walked
// until it lands inside.
uint64_t permuted(uint64_t i, uint64_t n, uint64_t key) {
  const int half = std::max(1, (static_cast<int>(std::bit_width(n - 1)) + 1) / 2);
  const uint64_t mask = (uint64_t{1} << half) - 1;
  do {
    uint64_t left = i >> half, right = i & mask;
    for (uint64_t round = 0; round < 4; ++round) {
      const uint64_t next = left ^ (philox(key, right, round)[0] & mask);
      left = right;
      right = next;
    }
    i = left << half | right;
  } while (i >= n);
  return i;
}

void read_files(JsonReader& line, const char* key, bool database, Task& task) {
  const nlohmann::json* files = line.find(key);
  if (files == nullptr) return;
  if (!files->is_object()) line.fail(key, "an object from names to texts is expected");
  for (const auto& [name, text] : files->items()) {
    if (!text.is_string() || name.empty() || name[0] == '.' || name.find('/') != name.npos)
      line.fail(key, fmt::format("{}: a plain name and a text are expected", quote(name)));
    task.files.push_back({name, text.get<std::string>(), database});
  }
}

Task read_task(std::string_view text, const std::string& where) {
  const nlohmann::json value = parse_json(text, where);
  JsonReader line(value, where);
  Task task;
  task.where = where;
  if (line.has("prompt") == line.has("messages"))
    throw_input("{}: either \"prompt\" or \"messages\" is expected", where);
  if (line.has("prompt"))
    task.prompt = line.string("prompt");
  else
    task.messages = read_messages(*line.find("messages"), where);
  if (line.has("tools")) {
    if (task.messages.empty()) line.fail("tools", "they go with messages");
    // Again, for the order in which the keys of the tools were written.
    task.tools = tools_text(nlohmann::ordered_json::parse(text).at("tools"), where);
  }
  line.ignore("tools");
  const nlohmann::json* answer = line.find("answer");
  if (answer != nullptr && answer->is_number())
    task.answer = answer->dump();
  else
    task.answer = line.string("answer");
  task.verifier = line.string("verifier", "");
  task.worked_example = line.string("worked_example", "");
  if (line.has("worked_turns")) {
    if (!task.worked_example.empty()) line.fail("worked_turns", "worked_example stands there too");
    task.worked_turns = read_messages(*line.find("worked_turns"), where);
    if (task.worked_turns.back().role != policy::Role::kAssistant || !task.worked_turns.back().tool_calls.empty())
      line.fail("worked_turns", "the last one is expected to be the assistant's answer");
  }
  line.ignore("worked_turns");
  read_files(line, "files", false, task);
  read_files(line, "databases", true, task);
  for (const char* key : {"id", "source", "metadata"}) line.ignore(key);
  line.finish();
  const auto& known = reward::task_verifier_names();
  if (!task.verifier.empty() && std::find(known.begin(), known.end(), task.verifier) == known.end())
    line.fail("verifier", fmt::format("one of {} is expected, not {}{}", join(known), quote(task.verifier),
                                      did_you_mean(task.verifier, known)));
  return task;
}

std::string canonical(const Task& task) {
  std::string text = "jsonl " + task.prompt;
  for (const auto& m : task.messages) {
    text += fmt::format("\x1e{}\x1f{}", policy::role_name(m.role), m.content);
    for (const auto& call : m.tool_calls) text += fmt::format("\x1d{}\x1f{}\x1f{}", call.id, call.name, call.arguments);
    if (!m.tool_call_id.empty()) text += '\x1d' + m.tool_call_id;
  }
  if (!task.tools.empty()) text += '\x1c' + task.tools;
  for (const auto& file : task.files) text += fmt::format("\x1b{}\x1f{}", file.name, file.text);
  return text;
}

// hash: of the whole file, as the configuration holds it; "": any.
std::string read_pinned(const std::string& path, const std::string& hash) {
  std::string text = read_file(path);
  if (const std::string found = hash.empty() ? hash : hash_hex(text); found != hash)
    throw_input("{}: it is not the file that the run began with: its hash is {}, and the configuration says {}; put that file back",
                path, found, hash);
  return text;
}

std::vector<Task> read_tasks(const std::string& path, const std::string& hash) {
  const std::string text = read_pinned(path, hash);
  std::vector<Task> tasks;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find('\n', begin);
    if (end == text.npos) end = text.size();
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    tasks.push_back(read_task(line, fmt::format("{}:{}", path, number)));
    tasks.back().difficulty = "jsonl";
  }
  if (tasks.empty()) throw_input("{}: it holds no tasks", path);
  return tasks;
}

class Jsonl : public TaskSource {
 public:
  Jsonl(JsonReader& options, uint64_t seed) {
    seed_ = seed;
    names_ = {"jsonl"};
    const std::string path = options.string("path"), held_out_path = options.string("held_out_path", "");
    const std::string hash = options.string("hash", ""), held_out_hash = options.string("held_out_hash", "");
    if (held_out_path.empty()) {
      if (!held_out_hash.empty()) options.fail("held_out_hash", "there is no held_out_path");
      for (auto& task : read_tasks(path, hash))
        (is_held_out(canonical(task)) ? held_out_ : train_).push_back(std::move(task));
      if (train_.empty() || held_out_.empty())
        throw_input("{}: a hash of each problem holds about one in eight out, and of these {} it {}: write {} or more lines, "
                    "or name a held_out_path",
                    path, train_.size() + held_out_.size(), held_out_.empty() ? "held out none" : "left none to train on",
                    kEnoughToHoldOut);
      return;
    }
    train_ = read_tasks(path, hash);
    held_out_ = read_tasks(held_out_path, held_out_hash);
    std::set<std::string> seen;
    for (const auto& task : train_) seen.insert(canonical(task));
    for (const auto& task : held_out_)
      if (seen.contains(canonical(task)))
        throw_input("{}: the prompt {} is in {} too; training must not see it", held_out_path,
                    quote(task.messages.empty() ? task.prompt : task.messages.back().content), path);
  }

  // Every task once, in an order of its own, then all again in another.
  Task train(uint64_t index) const override {
    const uint64_t n = train_.size(), pass = index / n;
    Task task = train_[permuted(index % n, n, derive_seed(seed_, pass, 0x6a736f6eull))];
    task.index = index;
    return task;
  }
  // In the order of the file.
  Task held_out(uint64_t index) const override {
    Task task = held_out_[index % held_out_.size()];
    task.index = index;
    return task;
  }
  uint64_t train_count() const override { return train_.size(); }
  uint64_t held_out_count() const override { return held_out_.size(); }

 private:
  std::vector<Task> train_, held_out_;
};

}  // namespace

namespace {
void for_each_file(const nlohmann::json& tasks, const std::function<void(const std::string& path, const char* hash)>& visit) {
  if (!tasks.is_object() || tasks.value("kind", nlohmann::json()) != "jsonl") return;
  for (const auto& [path, hash] : {std::pair("path", "hash"), std::pair("held_out_path", "held_out_hash")})
    if (const auto it = tasks.find(path); it != tasks.end() && it->is_string() && !it->get<std::string>().empty())
      visit(it->get<std::string>(), hash);
}
}  // namespace

void pin_task_files(nlohmann::json& tasks) {
  for_each_file(nlohmann::json(tasks), [&](const std::string& path, const char* hash) {
    if (tasks.value(hash, nlohmann::json("")) == "") tasks[hash] = hash_hex(read_file(path));
  });
}

void check_task_files(const nlohmann::json& tasks) {
  for_each_file(tasks, [&](const std::string& path, const char* hash) {
    if (const auto it = tasks.find(hash); it != tasks.end() && it->is_string()) read_pinned(path, it->get<std::string>());
  });
}

std::unique_ptr<TaskSource> make_jsonl(JsonReader& options, uint64_t seed) {
  return std::make_unique<Jsonl>(options, seed);
}

}  // namespace perigee::rollout
