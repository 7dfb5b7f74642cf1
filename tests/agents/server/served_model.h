// A small model with random weights behind the API, in this process.
#pragma once
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "agents/host/host.h"
#include "agents/server/api_server.h"
#include "agents/tools/toolbox.h"
#include "kernels/context.h"
#include "policy/grammar/token_index.h"
#include "policy/model/config.h"
#include "tests/base/net/http/raw_client.h"
#include "tests/base/temp_directory.h"
#include "tests/policy/small_model.h"

namespace perigee::agents {

using nlohmann::json;

// The architecture of the tiny golden case: bytes as tokens.
struct TinyModel {
  explicit TinyModel(uint64_t seed)
      : layout(policy::load_model_config(std::string(PERIGEE_SOURCE_DIR) + "/tests/golden/tiny"),
               policy::Dtype::kF32),
        arena(layout) {
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    policy::initialize(layout, seed, flat.data());
    layout.flat_to_weights(flat.data(), arena.data());
  }
  policy::ParamLayout layout;
  policy::testing::Arena arena;
};

// What a stream said.
struct Streamed {
  int status = 0;
  std::vector<json> events;
  std::vector<std::string> names;  // of the events, where they have one
  bool done = false;               // [DONE]
  bool complete = false;           // the last chunk came
  json error;                      // of a refusal
};
inline Streamed read_stream(const RawAnswer& a) {
  Streamed out;
  out.status = a.status;
  out.complete = a.complete;
  if (a.status != 200) {
    out.error = json::parse(a.body, nullptr, false);
    return out;
  }
  std::string name;
  for (size_t at = 0; at < a.body.size();) {
    const size_t end = std::min(a.body.find('\n', at), a.body.size());
    const std::string line = a.body.substr(at, end - at);
    at = end + 1;
    if (line.starts_with("event: ")) name = line.substr(7);
    if (!line.starts_with("data: ")) continue;
    if (line == "data: [DONE]") {
      out.done = true;
      continue;
    }
    EXPECT_FALSE(out.done) << "after [DONE]: " << line;
    out.events.push_back(json::parse(line.substr(6)));
    out.names.push_back(std::exchange(name, {}));
  }
  return out;
}

struct ServedOptions {
  uint64_t seed = 5;
  std::string key;
  bool admin = true;
  json tools = {"calculator"};
  net::http::Limits limits = {};
  int64_t memory_bytes = 64 << 20, max_running = 64, max_queued = 1024;
  SessionLog* log = nullptr;
  std::filesystem::path state_folder;
};

class ServedModel {
 public:
  explicit ServedModel(const ServedOptions& o = {})
      : model_(o.seed),
        next_(o.seed + 100),
        tokenizer_(model_.layout.config().vocab_size),
        index_(tokenizer_),
        ctx_(1) {
    HostConfig config;
    config.engine.max_running = o.max_running;
    config.engine.memory_bytes = o.memory_bytes;
    config.engine.prefix_cache_bytes = o.memory_bytes / 4;
    config.engine.prefix_chunk = 64;
    config.state_folder = o.state_folder;
    config.max_queued = o.max_queued;
    host_ = std::make_unique<Host>(
        model_.layout, config,
        [this](const policy::EngineConfig& c) {
          auto engine = std::make_unique<policy::Engine>(ctx_, model_.layout, c);
          engine->set_weights(model_.arena.data(), 7);
          return engine;
        },
        o.log != nullptr ? o.log : &log_);
    if (!o.tools.empty()) tools_ = make_toolbox(o.tools, "tools");
    ServiceConfig service;
    service.model = "tiny";
    service.limits.vocab = model_.layout.config().vocab_size;
    service.limits.max_context = 8192;
    service.limits.default_max_tokens = 32;
    service.run_limits.max_tokens = 600;
    service.work_folder = work_.path();
    service.update_weights = [this](const std::string& path, std::optional<int64_t> version) {
      if (path != "next") throw_input("{}: no model", path);
      const auto number = static_cast<uint32_t>(version.value_or(8));
      host_->set_weights(next_.arena.data(), number);
      return number;
    };
    ListenConfig listen;
    listen.key = o.key;
    listen.limits = o.limits;
    listen.origins = {"https://friend.example"};
    if (o.admin) listen.admin_port = 0;
    api_ = std::make_unique<ApiServer>(std::move(service), listen, *host_, tokenizer_, index_, tools_.get());
  }
  ~ServedModel() { api_.reset(); }

  json post(const std::string& path, const json& body, int expect = 200) {
    const RawAnswer a = ask(api_->port(), "POST", path, body.dump());
    EXPECT_EQ(a.status, expect) << path << " " << body.dump().substr(0, 300) << "\n" << a.body.substr(0, 500);
    return json::parse(a.body, nullptr, false);
  }
  json get(const std::string& path, int expect = 200) {
    const RawAnswer a = ask(api_->port(), "GET", path);
    EXPECT_EQ(a.status, expect) << path << "\n" << a.body;
    return json::parse(a.body, nullptr, false);
  }
  Streamed stream(const std::string& path, json body) {
    body["stream"] = true;
    return read_stream(ask(api_->port(), "POST", path, body.dump()));
  }
  json admin(const std::string& action, const json& body, int expect = 200) {
    const RawAnswer a = ask(api_->admin_port(), "POST", "/admin/" + action, body.dump());
    EXPECT_EQ(a.status, expect) << action << " " << a.body;
    return json::parse(a.body, nullptr, false);
  }
  static bool eventually(const std::function<bool()>& f, double within_s = 20) {
    for (double t = 0; t < within_s; t += 0.01) {
      if (f()) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return f();
  }
  bool quiet() {
    const HostStats s = host_->stats();
    return s.running == 0 && s.queued == 0 && api_->service().open_generations() == 0;
  }
  uint16_t port() const { return api_->port(); }
  ApiServer& api() { return *api_; }
  Host& host() { return *host_; }
  std::filesystem::path work() const { return work_.path(); }
  const policy::Tokenizer& tokenizer() const { return tokenizer_; }
  TinyModel& model() { return model_; }
  kernels::Context& context() { return ctx_; }

 private:
  TinyModel model_, next_;
  policy::ByteTokenizer tokenizer_;
  policy::TokenIndex index_;
  kernels::Context ctx_;
  TempDirectory work_;
  MemoryLog log_;
  std::unique_ptr<Host> host_;
  std::unique_ptr<ToolBox> tools_;
  std::unique_ptr<ApiServer> api_;
};

inline json user(const std::string& text) {
  return {{"role", "user"}, {"content", text}};
}

}  // namespace perigee::agents
