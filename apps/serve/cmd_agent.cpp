// perigee agent: a model and its tools work on a task, in the terminal.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "agents/loop/loop.h"
#include "agents/mcp/mcp_tools.h"
#include "agents/tools/toolbox.h"
#include "apps/command_line/commands.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "kernels/context.h"
#include "policy/engine/engine.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::apps {
namespace {

struct Options {
  std::string model, task, system, tools, work;
  OpenModel::Options open;
  SamplingOptions sampling;
  int64_t max_turns = 8, max_tokens = 4096, threads = 0, memory_mib = 1024, tool_output_bytes = 16384;
  double wall_s = 0, tool_wall_s = 10;
  bool json = false, no_declare = false;
};

// Ctrl-C ends the turn or the tool in hand in order; a second one ends the program.
std::atomic<bool> interrupted{false};
void on_interrupt(int) {
  if (interrupted.exchange(true)) _exit(130);
}

// One sequence of an engine of its own.
class EngineTurns : public agents::TurnSource {
 public:
  EngineTurns(policy::Engine& engine, const SamplingOptions& sampling, const OpenModel& model)
      : engine_(engine), model_(model) {
    first_.seed = static_cast<uint64_t>(sampling.seed);
    first_.sampling = sampling.params(model.config().vocab_size);
    first_.stop_tokens = rollout::stop_tokens(model.config(), model.tokenizer());
  }

  Turn turn(std::span<const int32_t> feed, std::span<const ToolEvent>, int64_t max_tokens,
            const std::function<void(int32_t)>& on_token, std::stop_token stop) override {
    length_ += static_cast<int64_t>(feed.size());
    const int64_t room = model_.config().max_length - length_;
    if (room < 1)
      throw_input("the conversation has {} tokens, and the model's model_max_length is {}", length_,
                  model_.config().max_length);
    policy::Extension extension;
    if (begun_) {
      extension.max_new_tokens = 1;
    } else {
      extension = std::move(first_);
      if (!engine_.restore({.id = kId, .seed = extension.seed.value_or(0)}))
        throw_environment("no memory for a sequence; raise --memory-mib");
      begun_ = true;
    }
    extension.tokens.assign(feed.begin(), feed.end());
    extension.max_new_tokens = std::min(max_tokens, room);
    if (!engine_.extend(kId, std::move(extension)))
      throw_environment("no memory for {} tokens; raise --memory-mib", length_ + std::min(max_tokens, room));
    Turn out;
    std::vector<policy::GeneratedToken> tokens;
    while (out.finish == FinishReason::kNone) {
      if (stop.stop_requested() || interrupted) {
        out.finish = FinishReason::kCancelled;
        break;
      }
      tokens.clear();
      engine_.step(tokens);
      for (const auto& t : tokens) {
        if (t.fed) continue;
        out.tokens.push_back(t.token);
        out.logprobs.push_back(t.logprob);
        out.versions.push_back(t.version);
        out.finish = t.finish;
        on_token(t.token);
      }
    }
    length_ += static_cast<int64_t>(out.tokens.size());
    return out;
  }

 private:
  static constexpr uint64_t kId = 1;
  policy::Engine& engine_;
  const OpenModel& model_;
  policy::Extension first_;  // what the first turn sets for all
  bool begun_ = false;
  int64_t length_ = 0;
};

// What happens, on the terminal: text as it comes, then calls and answers, all of it made safe to print.
class Live : public agents::LoopSink {
 public:
  explicit Live(const policy::Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void on_token(int32_t, int32_t token) override {
    // Calls are printed whole when they are there; until then their tokens are not text.
    if (tokenizer_.is_special(token))
      in_call_ |= token == tokenizer_.special(policy::special::kToolSectionBegin);
    if (in_call_ || tokenizer_.is_special(token)) return;
    held_ += tokenizer_.token(token);
    size_t ready = 0;
    while (ready < held_.size()) {
      const std::string_view rest = std::string_view(held_).substr(ready);
      const size_t n = utf8_sequence_bytes(rest);
      if (n == 0 && rest.size() < 4 && static_cast<unsigned char>(rest[0]) >= 0xc2)
        break;  // may be completed yet
      ready += std::max<size_t>(n, 1);
    }
    put(std::string_view(held_).substr(0, ready));
    held_.erase(0, ready);
  }
  void on_turn_end(int32_t, const agents::TurnEnd& end) override {
    put(held_);
    held_.clear();
    in_call_ = false;
    if (wrote_) fmt::print("\n");
    wrote_ = false;
    for (const auto& c : end.message.calls)
      fmt::print("[call] {} {}{}\n", printable_line(c.call.name, 80), printable_line(c.call.arguments, 2000),
                 c.error.empty() ? "" : "  (" + printable_line(c.error, 200) + ")");
    std::fflush(stdout);
  }
  void on_tool(const policy::ParsedCall&, const ToolEvent& e) override {
    fmt::print("[{}] {} ms\n{}\n", printable_line(e.status, 20), e.duration_us / 1000, printable(e.output));
    std::fflush(stdout);
  }

 private:
  void put(std::string_view text) {
    if (text.empty()) return;
    wrote_ = true;
    const std::string shown = printable(text);
    std::fwrite(shown.data(), 1, shown.size(), stdout);
    std::fflush(stdout);
  }
  const policy::Tokenizer& tokenizer_;
  std::string held_;
  bool in_call_ = false, wrote_ = false;
};

// A folder of its own that is gone afterwards, unless one is named.
class WorkFolder {
 public:
  explicit WorkFolder(const std::string& named) : path_(named), own_(named.empty()) {
    if (!own_) {
      if (!directory_exists(named)) throw_input("--work {}: there is no such directory", named);
      path_ = std::filesystem::absolute(path_);
      return;
    }
    std::string pattern = (std::filesystem::temp_directory_path() / "perigee-agent-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw_environment("{}: cannot make a folder there", pattern);
    path_ = pattern;
  }
  ~WorkFolder() {
    std::error_code ec;
    if (own_) std::filesystem::remove_all(path_, ec);
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  bool own_;
};

// "calculator,python", or the path of a JSON list.
nlohmann::json tools_of(const std::string& text) {
  if (text.empty()) return nlohmann::json::array();
  if (text[0] == '[') return parse_json(text, "--tools");
  if (file_exists(text)) return parse_json(read_file(text), text);
  nlohmann::json list = nlohmann::json::array();
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    list.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return list;
}

nlohmann::json to_json(const agents::LoopResult& r, const policy::Tokenizer& tokenizer,
                       const std::vector<int32_t>& prompt) {
  nlohmann::json turns = nlohmann::json::array();
  for (const Segment& s : r.segments) {
    nlohmann::json tools = nlohmann::json::array();
    for (const ToolEvent& e : s.tools)
      tools.push_back({{"name", e.name},
                       {"input", e.input},
                       {"output", e.output},
                       {"status", e.status},
                       {"duration_us", e.duration_us},
                       {"digest", e.digest}});
    const auto sampled = std::find(s.mask.begin(), s.mask.end(), uint8_t{0}) - s.mask.begin();
    turns.push_back({{"text", tokenizer.decode(std::span(s.tokens).first(static_cast<size_t>(sampled)))},
                     {"tokens", s.tokens},
                     {"mask", s.mask},
                     {"logprobs", s.logprobs},
                     {"tools", std::move(tools)}});
  }
  return {{"answer", r.last.content}, {"finish", finish_name(r.finish)},
          {"error", r.error},         {"turns", std::move(turns)},
          {"tokens", r.tokens},       {"prompt_ids", prompt}};
}

int agent(const Options& o) {
  if (o.max_turns < 1 || o.max_turns > 100000)
    throw_input("--max-turns {}: 1 to 100000 is expected", o.max_turns);
  if (o.max_tokens < 1) throw_input("--max-tokens {}: at least 1 is expected", o.max_tokens);
  if (o.threads < 0 || o.threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o.threads);
  if (o.memory_mib < 1 || o.memory_mib > (1 << 30))
    throw_input("--memory-mib {}: at least 1 is expected", o.memory_mib);
  if (o.wall_s < 0 || !(o.tool_wall_s > 0)) throw_input("agent: a limit of time is above 0");
  if (o.tool_output_bytes < 64)
    throw_input("--tool-output-bytes {}: at least 64 is expected", o.tool_output_bytes);
  const auto box = agents::make_toolbox(tools_of(o.tools), "--tools", {{"mcp", agents::add_mcp_tools}});
  policy::EngineConfig config;
  config.memory_bytes = o.memory_mib << 20;
  config.max_running = 1;
  OpenModel::Options open = o.open;
  open.before_weights = [&](const OpenModel& m) { m.check_room(config, "lower --memory-mib, or use --device cpu"); };
  const OpenModel model(o.model, open);
  std::vector<policy::Message> messages;
  if (!o.system.empty()) messages.push_back({policy::Role::kSystem, o.system});
  messages.push_back({policy::Role::kUser, o.task});
  const std::string declared = o.no_declare ? "" : box->declarations();
  const auto prompt = policy::render_chat(model.tokenizer(), messages, declared, true);

  kernels::Context ctx(static_cast<int>(o.threads));
  policy::Engine engine(model.engine_backend(ctx, config), model.layout(), config);
  engine.set_weights(model.arena(), 0);
  EngineTurns source(engine, o.sampling, model);
  const WorkFolder folder(o.work);
  agents::ToolContext context;
  context.work = folder.path();
  agents::LoopLimits limits;
  limits.max_turns = o.max_turns;
  limits.max_tokens = o.max_tokens;
  limits.wall_s = o.wall_s;
  limits.tool_wall_s = o.tool_wall_s;
  limits.tool_output_bytes = o.tool_output_bytes;
  Live live(model.tokenizer());

  struct sigaction action {
  }, former{};
  action.sa_handler = on_interrupt;
  ::sigaction(SIGINT, &action, &former);
  std::stop_source stop;
  std::jthread watch([&](std::stop_token done) {
    while (!done.stop_requested() && !interrupted) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    if (interrupted) stop.request_stop();
  });
  const auto result = agents::run_agent(source, model.tokenizer(), *box, prompt, limits, context,
                                        o.json ? nullptr : &live, stop.get_token());
  watch.request_stop();
  watch.join();
  ::sigaction(SIGINT, &former, nullptr);
  if (o.json) {
    print_json(to_json(result, model.tokenizer(), prompt));
  } else {
    fmt::print("--- {}, {}, {}\n", counted(result.turns, "turn", "turns"), counted(result.tokens, "token", "tokens"),
               finish_name(result.finish));
    if (!result.error.empty()) fmt::print(stderr, "perigee: {}\n", printable_line(result.error));
  }
  return result.finish == FinishReason::kStop ? 0 : result.finish == FinishReason::kCancelled ? 130 : 1;
}

}  // namespace

void add_agent(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("agent", "Let a model work on a task with tools", kGroupModel);
  command.positional("TASK", o->task, "what it is to do")
      .option("--model", o->model, "DIRECTORY", "config.json and safetensors")
      .required("--model")
      .option("--tools", o->tools, "LIST",
              "names with commas between, a JSON list, or a file with one (docs/tools.md)")
      .option("--system", o->system, "TEXT", "the system message")
      .option("--work", o->work, "DIRECTORY",
              "what its tools work on; default: an empty folder that is removed afterwards")
      .option("--max-turns", o->max_turns, "N", "turns of the model at most")
      .option("--max-tokens", o->max_tokens, "N", "tokens after the task at most, tool answers included")
      .option("--wall", o->wall_s, "SECONDS", "for all of it; 0: no limit")
      .option("--tool-wall", o->tool_wall_s, "SECONDS", "for one call of a tool")
      .option("--tool-output-bytes", o->tool_output_bytes, "N", "of one answer of a tool at most")
      .flag("--no-declare", o->no_declare, "do not declare the tools in the prompt (a model trained so)");
  declare_sampling(command, o->sampling);
  declare_place(command, o->open);
  command.option("--threads", o->threads, "N", "0: one per processor")
      .option("--memory-mib", o->memory_mib, "N", "for the state of the conversation")
      .flag("--json", o->json, "print one JSON object with every turn, at the end")
      .example("agent --model runs/tool-use/checkpoints/v00000260 --tools calculator --no-declare '123*456'")
      .example("agent --model models/mine --tools python,files --work . 'Sort the lines of notes.txt'");
  command.action([o] { return agent(*o); });
}

}  // namespace perigee::apps
