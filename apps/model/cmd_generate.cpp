// perigee generate: text from a model, printed as it comes.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "apps/command_line/commands.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/random.h"
#include "base/text.h"
#include "kernels/context.h"
#include "policy/engine/engine.h"
#include "policy/tokenizer/chat.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/tasks/conversation.h"

namespace perigee::apps {
namespace {

struct Options {
  std::string model, ids, system;
  OpenModel::Options open;
  std::string tools;
  std::optional<std::string> prompt, chat, messages;
  SamplingOptions sampling;
  int64_t count = 1, max_tokens = 256, threads = 0, memory_mib = 1024;
  bool json = false, ignore_stop = false, special = false;
};

// Prints pieces of text as they come: whole UTF-8 sequences, and on a terminal nothing that could command it.
class Stream {
 public:
  explicit Stream(bool terminal) : terminal_(terminal) {}
  void add(std::string_view bytes) {
    held_ += bytes;
    size_t ready = 0;
    while (ready < held_.size()) {
      const std::string_view rest = std::string_view(held_).substr(ready);
      const size_t n = utf8_sequence_bytes(rest);
      if (n == 0 && rest.size() < 4 && (static_cast<unsigned char>(rest[0]) >= 0xc2))
        break;  // may be completed yet
      ready += std::max<size_t>(n, 1);
    }
    put(std::string_view(held_).substr(0, ready));
    held_.erase(0, ready);
  }
  void end() {
    put(held_);
    held_.clear();
    std::fputc('\n', stdout);
    std::fflush(stdout);
  }

 private:
  void put(std::string_view text) {
    const std::string shown = terminal_ ? printable(text) : std::string(text);
    std::fwrite(shown.data(), 1, shown.size(), stdout);
    std::fflush(stdout);
  }
  bool terminal_;
  std::string held_;
};

std::vector<int32_t> prompt_of(const Options& o, const OpenModel& model) {
  const int given = (o.prompt ? 1 : 0) + (o.chat ? 1 : 0) + (o.messages ? 1 : 0) + (o.ids.empty() ? 0 : 1);
  if (given != 1) throw_input("generate: give one of --prompt, --chat, --messages and --ids");
  if (!o.system.empty() && !o.chat) throw_input("generate: --system goes with --chat");
  if (!o.tools.empty() && !o.chat && !o.messages)
    throw_input("generate: --tools goes with --chat or --messages");
  if (!o.ids.empty()) return parse_ids(o.ids, model.config().vocab_size);
  if (o.chat || o.messages) {
    std::vector<policy::Message> messages;
    std::string tools;
    if (!o.tools.empty()) {
      const std::string text = read_file(o.tools);
      parse_json(text, o.tools);  // says what is wrong, and where
      tools = rollout::tools_text(nlohmann::ordered_json::parse(text), o.tools);
    }
    if (o.messages)
      return policy::render_chat(
          model.tokenizer(),
          rollout::read_messages(parse_json(read_file(*o.messages), *o.messages), *o.messages), tools, true);
    if (!o.system.empty()) messages.push_back({policy::Role::kSystem, o.system});
    messages.push_back({policy::Role::kUser, *o.chat});
    return policy::render_chat(model.tokenizer(), messages, tools, true);
  }
  std::vector<int32_t> ids{model.config().bos_id};
  const std::vector<int32_t> plain = model.tokenizer().encode(*o.prompt, o.special);
  ids.insert(ids.end(), plain.begin(), plain.end());
  return ids;
}

struct Sample {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  FinishReason finish = FinishReason::kNone;
};

nlohmann::json to_json(const Sample& s, const policy::Tokenizer& tokenizer) {
  double sum = 0;
  for (const float x : s.logprobs) sum += x;
  return {{"text", tokenizer.decode(s.tokens, true)},
          {"tokens", s.tokens},
          {"logprobs", s.logprobs},
          {"logprob", sum},
          {"finish", finish_name(s.finish)}};
}

int generate(const Options& o) {
  if (o.count < 1 || o.count > 4096) throw_input("-n {}: 1 to 4096 is expected", o.count);
  if (o.max_tokens < 1) throw_input("--max-tokens {}: at least 1 is expected", o.max_tokens);
  if (o.threads < 0 || o.threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o.threads);
  if (o.memory_mib < 1 || o.memory_mib > (1 << 30))
    throw_input("--memory-mib {}: at least 1 is expected", o.memory_mib);
  policy::EngineConfig config;
  config.memory_bytes = o.memory_mib << 20;
  config.max_running = std::min(config.max_running, o.count);
  OpenModel::Options open = o.open;
  open.before_weights = [&](const OpenModel& m) { m.check_room(config, "lower --memory-mib, or use --device cpu"); };
  const OpenModel model(o.model, open);

  policy::GenerationGroup group;
  group.prompt = prompt_of(o, model);
  if (group.prompt.empty()) throw_input("generate: the prompt has no token");
  const int64_t total = static_cast<int64_t>(group.prompt.size()) + o.max_tokens;
  if (total > model.config().max_length)
    throw_input("generate: prompt and --max-tokens make {} tokens, and the model's model_max_length is {}",
                total, model.config().max_length);
  if (!o.ignore_stop) group.stop_tokens = rollout::stop_tokens(model.config(), model.tokenizer());
  for (int64_t i = 0; i < o.count; ++i) {
    policy::GenerationRequest request;
    request.id = static_cast<uint64_t>(i);
    // The first sample's seed is the one given, so that -n 1 and the first of -n 8 agree.
    request.seed = i == 0 ? static_cast<uint64_t>(o.sampling.seed)
                          : derive_seed(static_cast<uint64_t>(o.sampling.seed), static_cast<uint64_t>(i));
    request.max_new_tokens = o.max_tokens;
    request.sampling = o.sampling.params(model.config().vocab_size);
    group.members.push_back(std::move(request));
  }
  const std::vector<int32_t> stops = group.stop_tokens;

  kernels::Context ctx(static_cast<int>(o.threads));
  policy::Engine engine(model.engine_backend(ctx, config), model.layout(), config);
  engine.set_weights(model.arena(), 0);
  engine.submit(std::move(group));

  std::vector<Sample> samples(static_cast<size_t>(o.count));
  const bool streams = !o.json && o.count == 1;
  Stream stream(isatty(STDOUT_FILENO) != 0);
  std::vector<policy::GeneratedToken> tokens;
  while (!engine.idle()) {
    tokens.clear();
    engine.step(tokens);
    for (const policy::GeneratedToken& t : tokens) {
      Sample& s = samples[t.id];
      s.tokens.push_back(t.token);
      s.logprobs.push_back(t.logprob);
      s.finish = t.finish;
      const bool is_stop = std::find(stops.begin(), stops.end(), t.token) != stops.end();
      if (streams && !is_stop) stream.add(model.tokenizer().token(t.token));
    }
  }
  if (o.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const Sample& s : samples) list.push_back(to_json(s, model.tokenizer()));
    print_json({{"samples", std::move(list)}});
  } else if (streams) {
    stream.end();
  } else {
    for (size_t i = 0; i < samples.size(); ++i) {
      fmt::print("--- sample {} ({} tokens, {})\n", i + 1, samples[i].tokens.size(),
                 finish_name(samples[i].finish));
      Stream whole(isatty(STDOUT_FILENO) != 0);
      whole.add(model.tokenizer().decode(samples[i].tokens, true));
      whole.end();
    }
  }
  return 0;
}

}  // namespace

void add_generate(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("generate", "Let a model continue a text", kGroupModel);
  command.option("--model", o->model, "DIRECTORY", "config.json and safetensors")
      .required("--model")
      .option("--prompt", o->prompt, "TEXT", "continue this text")
      .option("--chat", o->chat, "TEXT", "answer this message of a user, in the chat template")
      .option("--system", o->system, "TEXT", "the system message before --chat")
      .option("--messages", o->messages, "FILE",
              "answer a conversation, a JSON list of messages (docs/tasks.md)")
      .option("--tools", o->tools, "FILE", "tools that --chat or --messages may call, a JSON list")
      .option("--ids", o->ids, "IDS", "continue these token ids: 1,2,3")
      .flag("--special", o->special,
            "names of special tokens in --prompt, such as <|im_end|>, mean those tokens")
      .option("-n,--samples", o->count, "N", "how many continuations")
      .option("--max-tokens", o->max_tokens, "N", "of each at most")
      .flag("--ignore-stop", o->ignore_stop, "go on after the end token");
  declare_sampling(command, o->sampling);
  declare_place(command, o->open);
  command.option("--threads", o->threads, "N", "0: one per processor")
      .option("--memory-mib", o->memory_mib, "N", "for states and latents; what does not fit waits")
      .flag("--json", o->json, "print one JSON object with tokens and log-probabilities, at the end")
      .example("generate --model models/tiny --prompt '12+30=' --temperature 0")
      .example("generate --model models/tiny --chat 'What is 12+30?' -n 4 --json");
  command.action([o] { return generate(*o); });
}

}  // namespace perigee::apps
