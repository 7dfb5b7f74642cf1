// The API over one model: routes requests to the functions of the endpoints, which stand in a file per family.
//
// A request's life: the server's thread reads it and asks the guard (key, Host, Origin) with its header · a worker thread
// parses it, renders its prompt and starts it on the host · tokens come back over a Generation to the server's thread,
// which writes them · a client that goes cancels it.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

#include "agents/host/host.h"
#include "agents/loop/loop.h"
#include "agents/server/generation.h"
#include "agents/server/request.h"
#include "base/net/http/server.h"
#include "policy/grammar/token_index.h"
#include "policy/tokenizer/tokenizer.h"

namespace perigee::agents {

class ToolBox;

// Who may ask.
struct GuardConfig {
  std::string key;                // "": none is asked for
  std::set<std::string> hosts;    // values of Host that are taken, in lower case; empty: any
  std::set<std::string> origins;  // values of Origin that are taken; a request without one is not a browser's
};
// Refuses with 401 or 403; lets /health pass without a key.
std::optional<net::http::Answer> guard(const GuardConfig& config, const net::http::Request& request);
// The values of Host that name a listener: localhost, 127.0.0.1, [::1] and the address, with the port.
std::set<std::string> host_names(const std::string& address, uint16_t port);

// Threads for what takes longer than the server's thread may: parsing, rendering, compiling schemas.
class Workers {
 public:
  Workers(int threads, size_t max_waiting);
  ~Workers();  // finishes what waits
  // False: too much waits.
  bool submit(std::function<void()> f);

 private:
  void run();
  const size_t max_waiting_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

struct ServiceConfig {
  std::string model;  // its name for clients
  RequestLimits limits;
  GuardConfig guard, admin_guard;
  int64_t max_sessions = 0;           // shown only; the host refuses
  LoopLimits run_limits;              // of the agent loop; a request may ask for less
  int max_runs = 64;                  // agent loops at once
  std::filesystem::path work_folder;  // a folder below for each session's tools; "": the tools get none
  bool thinking = true;               // <think>...</think> becomes reasoning_content
  int64_t created = 0;                // of the model, seconds since 1970
  // Loads the weights of a checkpoint directory into the host; returns their version. Empty: not offered.
  std::function<uint32_t(const std::string& directory, std::optional<int64_t> version)> update_weights;
};

class ResponseStore;

// Beginning of the names in the work folder of what is being removed; no session is called so.
inline constexpr const char* kGoneFolder = ".gone-";

class Service {
 public:
  // All outlive the service. tools: of the agent loop; may be null.
  Service(ServiceConfig config, Host& host, const policy::Tokenizer& tokenizer,
          const policy::TokenIndex& index, const ToolBox* tools);
  ~Service();

  // Before the servers take requests. post: the function of the server that answers.
  void attach(const net::http::Server* server, Wake::Post post);
  void handle(std::shared_ptr<net::http::Exchange> exchange);        // the API's handler
  void handle_admin(std::shared_ptr<net::http::Exchange> exchange);  // the admin listener's handler
  // Stops taking generations (503); those that run go on.
  void drain() { draining_ = true; }
  int64_t open_generations();

  const ServiceConfig& config() const { return config_; }
  Host& host() { return host_; }
  const policy::Tokenizer& tokenizer() const { return tokenizer_; }
  const policy::TokenIndex& index() const { return index_; }
  const ToolBox* tools() const { return tools_; }
  Wake& wake() { return *wake_; }
  ServerMetrics& metrics() { return metrics_; }
  ResponseStore& responses() { return *responses_; }

  // The tokens that end a turn.
  const std::vector<int32_t>& end_tokens() const { return end_tokens_; }
  // ApiError 404 when it is another model's name; "" is ours.
  void check_model(const std::string& name) const;
  // The tokens a request may generate after its prompt. ERRORS (ApiError 400): there is no room.
  int64_t allowed_tokens(const Drawing& drawing, int64_t prompt_tokens) const;
  // Everything of a HostRequest that the drawing says.
  void fill(const Drawing& drawing, int64_t prompt_tokens, HostRequest& out) const;
  // The seed of each choice: the first has the request's own, so that a choice can be asked for again alone.
  static std::vector<uint64_t> seeds(const Drawing& drawing);

  // Generations by request id, for aborting and counting. done: when it is over.
  void opened(const std::string& id, std::shared_ptr<Generation> generation);
  void done(const std::string& id);
  bool abort(const std::string& id);
  void abort_all();

  // Sessions whose answers are being written by the agent loop.
  bool begin_run();  // false: too many
  std::stop_token run_stop() const { return stop_runs_.get_token(); }
  void end_run();
  // A thread for f, ended before the service is destroyed. f does not throw.
  void spawn(std::function<void()> f);

 private:
  using Function = void (*)(Service&, std::shared_ptr<net::http::Exchange>);
  void route(std::shared_ptr<net::http::Exchange> exchange, bool admin);

  const ServiceConfig config_;
  Host& host_;
  const policy::Tokenizer& tokenizer_;
  const policy::TokenIndex& index_;
  const ToolBox* const tools_;
  std::vector<int32_t> end_tokens_;
  const net::http::Server* server_ = nullptr;
  std::unique_ptr<Wake> wake_;
  ServerMetrics metrics_;
  const std::unique_ptr<ResponseStore> responses_;
  std::atomic<bool> draining_{false};
  std::atomic<int> runs_{0};
  std::stop_source stop_runs_;
  std::mutex mutex_;
  std::multimap<std::string, std::shared_ptr<Generation>> open_;
  friend void metrics_endpoint(Service&, std::shared_ptr<net::http::Exchange>);
  struct Spawned {
    std::thread thread;
    std::shared_ptr<std::atomic<bool>> done;
  };
  std::vector<Spawned> spawned_;  // under mutex_
  // Last: their threads end first.
  Workers workers_, slow_workers_, admin_workers_;
};

// The conversations of /v1/responses by the id of their last response, for previous_response_id. In memory only, the
// least recently used go first. Thread safe.
class ResponseStore {
 public:
  void put(const std::string& id, std::vector<ChatMessage> conversation);
  // Empty: not there (any more).
  std::vector<ChatMessage> get(const std::string& id);

 private:
  static constexpr size_t kMaxBytes = size_t{64} << 20;
  struct Entry {
    std::vector<ChatMessage> messages;
    size_t bytes = 0;
    uint64_t used = 0;
  };
  std::mutex mutex_;
  std::map<std::string, Entry> entries_;
  std::map<uint64_t, std::string> by_use_;
  size_t bytes_ = 0;
  uint64_t clock_ = 0;
};

// What the host or a reader threw, as the API says it. Rethrows nothing.
ApiError api_error(std::exception_ptr error);

// The endpoints, by family. They throw ApiError and Error before they answer.
void chat_endpoint(Service&, std::shared_ptr<net::http::Exchange>);         // chat.cpp
void completions_endpoint(Service&, std::shared_ptr<net::http::Exchange>);  // completions.cpp
void responses_endpoint(Service&, std::shared_ptr<net::http::Exchange>);    // responses.cpp
void tokenize_endpoint(Service&, std::shared_ptr<net::http::Exchange>);     // text.cpp
void detokenize_endpoint(Service&, std::shared_ptr<net::http::Exchange>);
void models_endpoint(Service&, std::shared_ptr<net::http::Exchange>);
void health_endpoint(Service&, std::shared_ptr<net::http::Exchange>);  // state.cpp
void liveness_endpoint(Service&, std::shared_ptr<net::http::Exchange>);
void metrics_endpoint(Service&, std::shared_ptr<net::http::Exchange>);
void sessions_endpoint(Service&, std::shared_ptr<net::http::Exchange>);  // sessions.cpp
void session_run(Service&, std::shared_ptr<net::http::Exchange>,
                 const std::string& session);                         // session_run.cpp
void admin_endpoint(Service&, std::shared_ptr<net::http::Exchange>);  // admin.cpp

}  // namespace perigee::agents
