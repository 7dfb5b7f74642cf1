// perigee serve: a model behind the OpenAI API (docs/serving.md).
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <filesystem>
#include <thread>

#include "agents/host/host.h"
#include "agents/mcp/mcp_tools.h"
#include "agents/server/api_server.h"
#include "agents/tools/toolbox.h"
#include "apps/command_line/commands.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "apps/serve/session_store.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "kernels/context.h"
#include "policy/engine/backend.h"
#include "policy/grammar/token_index.h"

namespace perigee::apps {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string model, directory, tools, stop = "finish";
  OpenModel::Options open;
  std::optional<std::string> name, key_file;
  agents::ListenConfig listen;
  std::vector<std::string> hosts, origins;
  std::optional<int64_t> admin_port, max_context, idle_mib;
  int64_t port = 8000, threads = 0, memory_mib = 1024, max_running = 256, prefill_chunk = 512,
          prefix_cache_mib = 256, default_max_tokens = 1024, connections = 1024, body_mib = 32,
          patience_s = 60, max_turns = 16, run_tokens = 65536;
  double run_s = 600;
  bool no_thinking = false;
};

std::atomic<int> g_signals{0};
void on_signal(int) {
  // The second one: now. What was acknowledged is on the disk.
  if (++g_signals >= 2) _exit(130);
}

// To standard error, where somebody may read it: a server does not end for want of a reader or of room in a log.
template <class... A>
void tell(fmt::format_string<A...> format, A&&... a) {
  try {
    fmt::print(stderr, format, std::forward<A>(a)...);
  } catch (const std::exception&) {
  }
}

void within(const char* option, int64_t value, int64_t lo, int64_t hi) {
  if (value < lo || value > hi) throw_input("{} {}: {} to {} is expected", option, value, lo, hi);
}

// What a Host header can hold: a name or an address, with its port where that is not 80.
void check_host(const std::string& host) {
  constexpr std::string_view kOthers = ".-_:[]";
  const size_t colon = host.rfind(':');
  const std::string port = colon == std::string::npos || host.ends_with(']') ? "" : host.substr(colon + 1);
  const bool letters = std::all_of(host.begin(), host.end(), [&](unsigned char c) {
    return std::isalnum(c) != 0 || c >= 0x80 || kOthers.find(static_cast<char>(c)) != std::string_view::npos;
  });
  const bool number =
      std::all_of(port.begin(), port.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
  if (host.empty() || colon == 0 || host.ends_with(':') || !letters || !number)
    throw_input("--allow-host {}: NAME:PORT is expected, such as example.org:8000", quote(host));
}

// What an Origin header can hold.
void check_origin(const std::string& origin) {
  if (origin == "null") return;  // of a page without one, such as a file
  const size_t name = origin.find("://");
  if (name == std::string::npos || name == 0 || origin.find_first_of(" \t\r\n") != std::string::npos ||
      origin.find('/', name + 3) != std::string::npos || name + 3 == origin.size())
    throw_input(
        "--allow-origin {}: SCHEME://NAME or SCHEME://NAME:PORT is expected, such as https://example.org",
        quote(origin));
}

std::string read_key(const std::string& path) {
  std::string key = read_file(path, 4096);
  while (!key.empty() && (key.back() == '\n' || key.back() == '\r' || key.back() == ' ')) key.pop_back();
  if (key.size() < 8) throw_input("{}: a key of at least 8 characters is expected", path);
  for (const char c : key)
    if (c <= ' ' || c > '~')
      throw_input("{}: a key is one line of printable characters without blanks", path);
  struct stat s {};
  if (stat(path.c_str(), &s) == 0 && (s.st_mode & (S_IRWXG | S_IRWXO)) != 0)
    fmt::print(stderr, "perigee: warning: {}: others than its owner may use this file; chmod 600 it\n", path);
  return key;
}

// Gives the host other weights while it runs. The model that was opened stays, with its layout and tokenizer; beside its
// weights there are others only while they change.
class Weights {
 public:
  Weights(const std::string& directory, const OpenModel::Options& options) : model_(directory, options) {}
  const OpenModel& model() const { return model_; }

  uint32_t update(agents::Host& host, const std::string& directory, std::optional<int64_t> version) {
    const std::lock_guard lock(mutex_);
    auto next = model_.other_weights(directory);
    const uint32_t number = version ? static_cast<uint32_t>(*version) : version_ + 1;
    host.set_weights(next.data(), number);  // nothing refers to those before when it returns
    version_ = number;
    model_.replace_weights(std::move(next));
    return number;
  }

 private:
  std::mutex mutex_;
  OpenModel model_;
  uint32_t version_ = 0;  // as the engine was given them first
};

int serve(const Options& o) {
  within("--port", o.port, 0, 65535);
  within("--threads", o.threads, 0, 4096);
  within("--memory-mib", o.memory_mib, 1, 1 << 30);
  within("--max-running", o.max_running, 1, 65536);
  within("--prefill-chunk", o.prefill_chunk, 1, 1 << 20);
  within("--prefix-cache-mib", o.prefix_cache_mib, 0, o.memory_mib);
  if (o.idle_mib) within("--idle-mib", *o.idle_mib, 0, o.memory_mib);
  if (o.max_context) within("--max-context", *o.max_context, 1, int64_t{1} << 40);
  if (o.name && o.name->empty())
    throw_input("--name: it is empty; without the option the model is called as its directory");
  for (const std::string& host : o.hosts) check_host(host);
  for (const std::string& origin : o.origins) check_origin(origin);
  within("--default-max-tokens", o.default_max_tokens, 1, int64_t{1} << 40);
  within("--connections", o.connections, 1, 100'000);
  within("--body-mib", o.body_mib, 1, 1024);
  within("--patience", o.patience_s, 0, 86400);
  within("--max-turns", o.max_turns, 1, 10'000);
  within("--run-tokens", o.run_tokens, 1, int64_t{1} << 40);
  if (!(o.run_s > 0)) throw_input("--run-seconds {}: a time above 0 is expected", o.run_s);
  if (o.stop != "finish" && o.stop != "checkpoint")
    throw_input("--stop {}: finish or checkpoint is expected", quote(o.stop));
  agents::ListenConfig listen = o.listen;
  listen.port = static_cast<uint16_t>(o.port);
  if (listen.address == "localhost") listen.address = "127.0.0.1";
  if (o.admin_port) {
    within("--admin-port", *o.admin_port, 0, 65535);
    listen.admin_port = static_cast<uint16_t>(*o.admin_port);
  }
  if (o.key_file) listen.key = read_key(*o.key_file);
  if (listen.key.empty() && !net::http::is_loopback(listen.address))
    throw_input("--host {}: other machines reach this address, so a key is needed: give --key-file",
                listen.address);
  listen.hosts = o.hosts;
  listen.origins = o.origins;
  listen.limits.connections = o.connections;
  listen.limits.body_bytes = o.body_mib << 20;

  agents::HostConfig config;
  config.engine.max_running = o.max_running;
  config.engine.prefill_chunk = o.prefill_chunk;
  config.engine.memory_bytes = o.memory_mib << 20;
  config.engine.prefix_cache_bytes = o.prefix_cache_mib << 20;
  if (o.idle_mib) config.idle_bytes = *o.idle_mib << 20;
  OpenModel::Options open = o.open;
  open.before_weights = [&](const OpenModel& m) {
    m.check_room(config.engine, "lower --memory-mib, --max-running or --prefill-chunk, or use --device cpu");
  };
  Weights weights(o.model, open);
  const OpenModel& model = weights.model();
  const policy::TokenIndex index(model.tokenizer());
  // A directory may hold other weights than when its sessions were suspended.
  config.model = model.fingerprint();
  config.warn = [](const std::string& line) {
    // Why the host is down is the error that the server ends with, unless it is ending already.
    if (g_signals > 0 || !line.starts_with("the host is down: ")) tell("perigee: warning: {}\n", line);
  };

  std::unique_ptr<agents::SessionLog> log;
  agents::ServiceConfig service;
  if (o.directory.empty()) {
    log = std::make_unique<agents::MemoryLog>();
  } else {
    make_directories(o.directory);
    log = std::make_unique<SessionStore>(fs::path(o.directory) / "store.sqlite", "sessions", StoreOptions{},
                                         fs::weakly_canonical(o.model).string());
    config.state_folder = fs::path(o.directory) / "states";
    make_directories(config.state_folder.string());
    service.work_folder = fs::path(o.directory) / "work";
  }
  std::unique_ptr<agents::ToolBox> tools;
  if (!o.tools.empty()) {
    // A file, or the list itself.
    const bool inline_list = o.tools.starts_with('[');
    tools = agents::make_toolbox(
        parse_json(inline_list ? o.tools : read_file(o.tools), inline_list ? "--tools" : o.tools),
        inline_list ? "--tools" : o.tools, {{"mcp", agents::add_mcp_tools}});
  }

  // What the engine computes with. It outlives the host.
  std::unique_ptr<kernels::Context> ctx;
  agents::Host host(
      model.layout(), config,
      [&](const policy::EngineConfig& engine_config) {
        ctx = std::make_unique<kernels::Context>(static_cast<int>(o.threads));
        auto engine = std::make_unique<policy::Engine>(model.engine_backend(*ctx, engine_config),
                                                       model.layout(), engine_config);
        engine->set_weights(model.arena(), 0);
        return engine;
      },
      log.get());

  service.model = o.name.value_or(fs::weakly_canonical(o.model).filename().string());
  service.limits.vocab = model.config().vocab_size;
  service.limits.max_context =
      std::min(model.config().max_length, o.max_context.value_or(model.config().max_length));
  service.limits.default_max_tokens = o.default_max_tokens;
  service.thinking = !o.no_thinking;
  service.created = static_cast<int64_t>(std::time(nullptr));
  service.run_limits.max_turns = o.max_turns;
  service.run_limits.max_tokens = o.run_tokens;
  service.run_limits.wall_s = o.run_s;
  service.update_weights = [&](const std::string& directory, std::optional<int64_t> version) {
    return weights.update(host, directory, version);
  };
  agents::ApiServer server(std::move(service), listen, host, model.tokenizer(), index, tools.get());

  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  ::signal(SIGPIPE, SIG_IGN);  // standard error may be a pipe whose reader has gone
  const bool v6 = listen.address.find(':') != std::string::npos;
  fmt::print("serving {} at http://{}{}{}:{}/v1", server.service().config().model, v6 ? "[" : "",
             listen.address, v6 ? "]" : "", server.port());
  if (listen.admin_port) fmt::print(", admin at http://127.0.0.1:{}/admin", server.admin_port());
  fmt::print("{}{}\n", listen.key.empty() ? "" : ", with a key",
             model.on_gpu() ? ", on " + model.place() : "");
  std::fflush(stdout);

  while (g_signals == 0 && host.broken().empty()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  if (const std::string why = host.broken(); !why.empty()) throw_environment("the server ends: {}", why);
  tell("perigee: stopping: {} requests to {} (again: now)\n", server.service().open_generations(),
       o.stop == "finish" ? "finish" : "set down");
  server.drain();
  host.stop(o.stop == "finish" ? agents::PauseMode::kWait : agents::PauseMode::kKeep,
            std::chrono::seconds(o.patience_s));
  server.stop(std::chrono::seconds(5));  // what is generated may still have to be sent
  return 0;
}

}  // namespace

void add_serve(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("serve", "Serve a model over HTTP, as the OpenAI API", kGroupModel);
  command.option("--model", o->model, "DIRECTORY", "config.json and safetensors")
      .required("--model")
      .option("--host", o->listen.address, "ADDRESS", "to listen on; another than loopback needs --key-file")
      .option("--port", o->port, "N", "0: any free one")
      .option("--admin-port", o->admin_port, "N",
              "pause, resume, weights and abort, on 127.0.0.1; without it: none")
      .option("--key-file", o->key_file, "FILE",
              "holds the key that clients send as Authorization: Bearer KEY")
      .list("--allow-host", o->hosts, "NAME:PORT", "a further value of the Host header; may be repeated")
      .list("--allow-origin", o->origins, "ORIGIN", "pages of this origin may use the API; may be repeated")
      .option("--name", o->name, "NAME", "of the model for clients; the directory's without it")
      .option("--dir", o->directory, "DIRECTORY",
              "sessions are kept here; without it they end with the server")
      .option("--tools", o->tools, "FILE",
              "tools of the agent loop, a JSON list (docs/tools.md), or the list itself")
      .option("--max-context", o->max_context, "N", "tokens of a sequence; the model's length without it")
      .option("--default-max-tokens", o->default_max_tokens, "N",
              "of an answer when the request does not say")
      .option("--max-running", o->max_running, "N", "sequences computed at once")
      .option("--prefill-chunk", o->prefill_chunk, "N", "prompt tokens in one step")
      .option("--memory-mib", o->memory_mib, "N", "for states and latents; what does not fit waits")
      .option("--prefix-cache-mib", o->prefix_cache_mib, "N",
              "of it, for prefixes that prompts share; 0: off")
      .option("--idle-mib", o->idle_mib, "N",
              "of it, for sessions between two turns, the others wait on disk; half without it")
      .option("--connections", o->connections, "N", "open at once")
      .option("--body-mib", o->body_mib, "N", "of a request at most")
      .option("--max-turns", o->max_turns, "N", "of one run of the agent loop")
      .option("--run-tokens", o->run_tokens, "N", "of one run of the agent loop")
      .option("--run-seconds", o->run_s, "S", "of one run of the agent loop")
      .option("--stop", o->stop, "NAME",
              "on SIGTERM: finish what runs, or checkpoint sessions where they are")
      .option("--patience", o->patience_s, "S", "how long to finish at most")
      .flag("--no-thinking", o->no_thinking, "<think>...</think> stays in the content");
  declare_place(command, o->open);
  command.option("--threads", o->threads, "N", "0: one per processor")
      .example("serve --model models/tiny --port 8000 --dir serve")
      .example("serve --model models/tiny --host 0.0.0.0 --key-file key --admin-port 8001");
  command.action([o] { return serve(*o); });
}

}  // namespace perigee::apps
