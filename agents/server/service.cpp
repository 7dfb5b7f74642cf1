#include "agents/server/service.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <new>
#include <random>

#include "base/error.h"
#include "base/random.h"
#include "base/text.h"

namespace perigee::agents {

using net::http::Answer;
using net::http::Exchange;
using net::http::Request;

namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

void answer_error(const std::shared_ptr<Exchange>& exchange) {
  exchange->answer(api_error(std::current_exception()).answer());
}

}  // namespace

std::optional<Answer> guard(const GuardConfig& config, const Request& request) {
  if (!config.hosts.empty() && !config.hosts.contains(lower(request.header("host").value_or(""))))
    return ApiError(
               403,
               fmt::format("the Host header names {}, which is not this server (--allow-host adds names)",
                           quote(request.header("host").value_or(""))),
               "", "host_not_allowed")
        .answer();
  if (const auto origin = request.header("origin"); origin && !config.origins.contains(std::string(*origin)))
    return ApiError(
               403,
               fmt::format("pages of {} may not use this server (--allow-origin lets them)", quote(*origin)),
               "", "origin_not_allowed")
        .answer();
  if (config.key.empty() || request.path == "/health" || request.method == "OPTIONS") return std::nullopt;
  const auto given = request.header("authorization");
  constexpr std::string_view kBearer = "bearer ";
  if (!given || request.count("authorization") != 1 || given->size() < kBearer.size() ||
      lower(given->substr(0, kBearer.size())) != kBearer)
    return ApiError(401, "You didn't provide an API key: send the header 'Authorization: Bearer KEY'.", "",
                    "missing_api_key")
        .answer();
  if (!net::http::equal_in_constant_time(given->substr(kBearer.size()), config.key))
    return ApiError(401, "Incorrect API key provided.", "", "invalid_api_key").answer();
  return std::nullopt;
}

std::set<std::string> host_names(const std::string& address, uint16_t port) {
  std::set<std::string> out;
  for (const std::string& name :
       {std::string("localhost"), std::string("127.0.0.1"), std::string("[::1]"),
        address.find(':') == std::string::npos ? lower(address) : "[" + lower(address) + "]"})
    out.insert(fmt::format("{}:{}", name, port));
  return out;
}

Workers::Workers(int threads, size_t max_waiting) : max_waiting_(max_waiting) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
}

Workers::~Workers() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& t : threads_) t.join();
}

bool Workers::submit(std::function<void()> f) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || waiting_.size() >= max_waiting_) return false;
    waiting_.push_back(std::move(f));
  }
  changed_.notify_one();
  return true;
}

void Workers::run() {
  pthread_setname_np(pthread_self(), "requests");
  for (;;) {
    std::function<void()> f;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      f = std::move(waiting_.front());
      waiting_.pop_front();
    }
    f();
  }
}

ApiError api_error(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const ApiError& e) {
    return e;
  } catch (const NotFound& e) {
    return ApiError(404, e.what(), "", "not_found");
  } catch (const Conflict& e) {
    return ApiError(409, e.what(), "", "conflict");
  } catch (const Overloaded& e) {
    return ApiError(503, e.what(), "", "overloaded");
  } catch (const Error& e) {
    if (e.kind() == Error::Kind::kInput) return ApiError(400, e.what());
    return ApiError(503, e.what(), "", "unavailable");
  } catch (const std::bad_alloc&) {
    return ApiError(503, "out of memory", "", "unavailable");
  } catch (const std::exception& e) {
    return ApiError(500, fmt::format("a bug in the server: {}", e.what()), "", "internal_error");
  }
}

Service::Service(ServiceConfig config, Host& host, const policy::Tokenizer& tokenizer,
                 const policy::TokenIndex& index, const ToolBox* tools)
    : config_(std::move(config)),
      host_(host),
      tokenizer_(tokenizer),
      index_(index),
      tools_(tools),
      responses_(std::make_unique<ResponseStore>()),
      workers_(2, 4096),
      slow_workers_(2, 64),
      admin_workers_(2, 64) {
  for (const auto name : {policy::special::kImEnd, policy::special::kEos, policy::special::kEot})
    end_tokens_.push_back(tokenizer.special(name));
  // What a process that was killed did not come to remove.
  std::error_code ignored;
  if (!config_.work_folder.empty())
    for (const auto& entry : std::filesystem::directory_iterator(config_.work_folder, ignored))
      if (entry.path().filename().string().starts_with(kGoneFolder))
        std::filesystem::remove_all(entry.path(), ignored);
}

Service::~Service() {
  abort_all();
  std::vector<Spawned> all;
  {
    const std::lock_guard lock(mutex_);
    all.swap(spawned_);
  }
  for (Spawned& s : all) s.thread.join();
  while (metrics_.generating > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  host_.around_tokens(nullptr);
  // Answers whose server is gone: they and their generations hold each other.
  for (const auto& [id, generation] : open_) generation->forget();
}

void Service::abort_all() {
  stop_runs_.request_stop();
  std::vector<std::shared_ptr<Generation>> found;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, generation] : open_) found.push_back(generation);
  }
  for (const auto& g : found) g->cancel();
}

void Service::attach(const net::http::Server* server, Wake::Post post) {
  server_ = server;
  wake_ = std::make_unique<Wake>(std::move(post));
  host_.around_tokens([wake = wake_.get()](bool begins) { wake->hold(begins); });
}

void Service::check_model(const std::string& name) const {
  if (name.empty() || name == config_.model) return;
  throw ApiError(
      404, fmt::format("The model {} does not exist; this server has {}.", quote(name), quote(config_.model)),
      "model", "model_not_found");
}

int64_t Service::allowed_tokens(const Drawing& drawing, int64_t prompt_tokens) const {
  const int64_t left = config_.limits.max_context - prompt_tokens;
  if (left < 1)
    throw ApiError(
        400,
        fmt::format("This model's maximum context length is {} tokens; your messages came to {} tokens.",
                    config_.limits.max_context, prompt_tokens),
        "messages", "context_length_exceeded");
  if (drawing.max_tokens && *drawing.max_tokens > left)
    throw ApiError(
        400,
        fmt::format(
            "This model's maximum context length is {} tokens: {} of the prompt and {} to generate are more.",
            config_.limits.max_context, prompt_tokens, *drawing.max_tokens),
        "max_tokens", "context_length_exceeded");
  // Without a word of the request: the server's default, and at least what the request wants as its minimum.
  const int64_t tokens = drawing.max_tokens.value_or(
      std::min(left, std::max(config_.limits.default_max_tokens, drawing.min_tokens)));
  if (drawing.min_tokens > tokens)
    refuse("min_tokens", "min_tokens is {}; {} tokens can be generated", drawing.min_tokens, tokens);
  return tokens;
}

std::vector<uint64_t> Service::seeds(const Drawing& d) {
  uint64_t seed = 0;
  if (d.seed) {
    seed = *d.seed;
  } else {
    static thread_local std::mt19937_64 random{std::random_device{}()};
    seed = random() >> 11;  // a number that every JSON reader keeps exactly
  }
  std::vector<uint64_t> out{seed};
  for (int64_t i = 1; i < d.choices; ++i) out.push_back(derive_seed(seed, static_cast<uint64_t>(i)) >> 11);
  return out;
}

void Service::fill(const Drawing& d, int64_t prompt_tokens, HostRequest& out) const {
  out.seeds = seeds(d);
  out.max_new_tokens = allowed_tokens(d, prompt_tokens);
  out.min_new_tokens = d.min_tokens;
  out.sampling = d.sampling;
  if (!d.ignore_eos) out.stop_tokens = end_tokens_;
  out.top_logprobs = d.top_logprobs;
  out.prompt_logprobs = d.prompt_logprobs;
}

void Service::opened(const std::string& id, std::shared_ptr<Generation> generation) {
  const std::lock_guard lock(mutex_);
  open_.emplace(id, std::move(generation));
}

void Service::done(const std::string& id) {
  const std::lock_guard lock(mutex_);
  open_.erase(id);
}

bool Service::abort(const std::string& id) {
  std::vector<std::shared_ptr<Generation>> found;
  {
    const std::lock_guard lock(mutex_);
    const auto [first, last] = open_.equal_range(id);
    for (auto i = first; i != last; ++i) found.push_back(i->second);
  }
  for (const auto& g : found) g->cancel();
  return !found.empty();
}

int64_t Service::open_generations() {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(open_.size()) + runs_;
}

bool Service::begin_run() {
  if (++runs_ <= config_.max_runs) return true;
  --runs_;
  return false;
}
void Service::end_run() {
  --runs_;
}

void ResponseStore::put(const std::string& id, std::vector<ChatMessage> conversation) {
  size_t bytes = 200;
  for (const ChatMessage& m : conversation) {
    bytes += sizeof m + m.message.content.size() + m.reasoning.value_or("").size();
    for (const auto& c : m.message.tool_calls) bytes += sizeof c + c.arguments.size();
  }
  const std::lock_guard lock(mutex_);
  entries_[id] = {std::move(conversation), bytes, ++clock_};
  by_use_[clock_] = id;
  bytes_ += bytes;
  while (bytes_ > kMaxBytes && entries_.size() > 1) {
    const auto oldest = by_use_.begin();
    bytes_ -= entries_.at(oldest->second).bytes;
    entries_.erase(oldest->second);
    by_use_.erase(oldest);
  }
}

std::vector<ChatMessage> ResponseStore::get(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto at = entries_.find(id);
  if (at == entries_.end()) return {};
  by_use_.erase(at->second.used);
  at->second.used = ++clock_;
  by_use_[clock_] = id;
  return at->second.messages;
}

void Service::spawn(std::function<void()> f) {
  auto done = std::make_shared<std::atomic<bool>>(false);
  const std::lock_guard lock(mutex_);
  std::erase_if(spawned_, [](Spawned& s) {
    const bool over = *s.done;
    if (over) s.thread.join();
    return over;
  });
  spawned_.push_back({std::thread([f = std::move(f), done]() mutable {
                        f();
                        f = nullptr;
                        *done = true;
                      }),
                      done});
}

void Service::handle(std::shared_ptr<Exchange> exchange) {
  try {
    route(exchange, false);
  } catch (...) {
    answer_error(exchange);
  }
}

void Service::handle_admin(std::shared_ptr<Exchange> exchange) {
  try {
    route(exchange, true);
  } catch (...) {
    answer_error(exchange);
  }
}

void Service::route(std::shared_ptr<Exchange> exchange, bool admin) {
  enum class Where { kHere, kWorker, kSlow };
  struct Route {
    std::string_view method, path;  // a path that ends with '/' is a beginning
    Function function;
    Where where;
  };
  static constexpr Route kRoutes[] = {
      {"POST", "/v1/chat/completions", chat_endpoint, Where::kWorker},
      {"POST", "/v1/completions", completions_endpoint, Where::kWorker},
      {"POST", "/v1/responses", responses_endpoint, Where::kWorker},
      {"GET", "/v1/models", models_endpoint, Where::kHere},
      {"GET", "/v1/models/", models_endpoint, Where::kHere},
      {"POST", "/tokenize", tokenize_endpoint, Where::kWorker},
      {"POST", "/detokenize", detokenize_endpoint, Where::kWorker},
      {"GET", "/health", health_endpoint, Where::kHere},
      {"GET", "/liveness", liveness_endpoint, Where::kSlow},
      {"GET", "/metrics", metrics_endpoint, Where::kWorker},
      {"GET", "/v1/sessions", sessions_endpoint, Where::kWorker},
      {"POST", "/v1/sessions", sessions_endpoint, Where::kWorker},
      {"GET", "/v1/sessions/", sessions_endpoint, Where::kWorker},
      {"POST", "/v1/sessions/", sessions_endpoint, Where::kWorker},
      {"DELETE", "/v1/sessions/", sessions_endpoint, Where::kWorker},
  };
  static constexpr Route kAdminRoutes[] = {
      {"GET", "/health", health_endpoint, Where::kHere},
      {"GET", "/admin/", admin_endpoint, Where::kSlow},
      {"POST", "/admin/", admin_endpoint, Where::kSlow},
  };
  const Request& request = exchange->request();
  // The guard let this origin pass.
  const std::string origin(request.header("origin").value_or(""));
  if (!origin.empty()) {
    exchange->add_header("Access-Control-Allow-Origin", origin);
    exchange->add_header("Access-Control-Expose-Headers", "x-request-id");
    exchange->add_header("Vary", "Origin");
  }
  const std::span<const Route> routes = admin ? std::span<const Route>(kAdminRoutes) : kRoutes;
  const std::string_view method = request.method == "HEAD" ? "GET" : std::string_view(request.method);
  std::vector<std::string> allowed;
  for (const Route& r : routes) {
    if (r.path.ends_with('/') ? !request.path.starts_with(r.path) : request.path != r.path) continue;
    if (method != r.method) {
      allowed.emplace_back(r.method);
      continue;
    }
    if (r.where == Where::kHere) return r.function(*this, exchange);
    if (draining_ && r.method == "POST" && !admin)
      throw ApiError(503, "the server is stopping", "", "stopping");
    // Nothing that clients of the API ask for keeps the administrator waiting.
    Workers& workers = admin ? admin_workers_ : r.where == Where::kSlow ? slow_workers_ : workers_;
    const bool taken = workers.submit([this, exchange, function = r.function] {
      try {
        if (!exchange->gone()) function(*this, exchange);
      } catch (...) {
        answer_error(exchange);
      }
    });
    if (!taken) throw ApiError(503, "too many requests wait; try again later", "", "overloaded");
    return;
  }
  if (request.method == "OPTIONS" && !origin.empty()) {
    exchange->answer({204,
                      "",
                      "",
                      {{"Access-Control-Allow-Methods", "GET, POST, DELETE"},
                       {"Access-Control-Allow-Headers", "authorization, content-type"}}});
    return;
  }
  if (!allowed.empty()) {
    ApiError e(405, fmt::format("Not allowed: {} is for {}.", request.path, join(allowed)));
    Answer a = e.answer();
    a.headers.emplace_back("Allow", join(allowed));
    exchange->answer(std::move(a));
    return;
  }
  throw ApiError(404, fmt::format("Invalid URL ({} {})", request.method, quote(request.path)), "",
                 "unknown_url");
}

}  // namespace perigee::agents
