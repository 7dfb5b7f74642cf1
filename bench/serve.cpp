// 500 clients that stream at once over HTTP, against the same requests given to the engine alone.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "agents/host/host.h"
#include "agents/server/api_server.h"
#include "base/error.h"
#include "base/random.h"
#include "bench/rig.h"
#include "policy/grammar/token_index.h"

namespace perigee::bench {
namespace {

using namespace policy;

constexpr int kClients = 500;
constexpr int64_t kPrompt = 8, kTokens = 8;
constexpr uint32_t kVersion = 1;

std::vector<int32_t> prompt_of(int client) {
  Random random(derive_seed(3, static_cast<uint64_t>(client)));
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < kPrompt; ++i) ids.push_back(static_cast<int32_t>(random.next_int(3, 255)));
  return ids;
}
uint64_t seed_of(int client) {
  return 1000 + static_cast<uint64_t>(client);
}

struct Outcome {
  std::vector<std::vector<int32_t>> tokens;  // by client
  std::vector<double> first_ms;
  double seconds = 0;
  double rate() const { return kClients * kTokens / seconds; }
};

Outcome engine_alone(Engine& engine) {
  Outcome out;
  out.tokens.resize(kClients);
  const double begin = now_s();
  for (int i = 0; i < kClients; ++i) {
    GenerationRequest r;
    r.id = static_cast<uint64_t>(i) + 1;
    r.seed = seed_of(i);
    r.max_new_tokens = kTokens;
    GenerationGroup group;
    group.prompt = prompt_of(i);
    group.members.push_back(std::move(r));
    engine.submit(std::move(group));
  }
  std::vector<GeneratedToken> tokens;
  while (!engine.idle()) {
    tokens.clear();
    engine.step(tokens);
    for (const GeneratedToken& t : tokens) {
      std::vector<int32_t>& of = out.tokens[t.id - 1];
      if (of.empty()) out.first_ms.push_back((now_s() - begin) * 1e3);
      of.push_back(t.token);
    }
  }
  out.seconds = now_s() - begin;
  return out;
}

struct Client {
  int fd = -1;
  std::string answer;
  double first = 0;
};

// The body of a chunked answer.
std::string body_of(const std::string& answer) {
  std::string body;
  size_t at = answer.find("\r\n\r\n");
  PERIGEE_CHECK(at != std::string::npos && answer.starts_with("HTTP/1.1 200"), "{}", answer.substr(0, 200));
  at += 4;
  for (;;) {
    const size_t line = answer.find("\r\n", at);
    PERIGEE_CHECK(line != std::string::npos, "a stream was cut");
    const size_t size = std::strtoul(answer.c_str() + at, nullptr, 16);
    if (size == 0) return body;
    body.append(answer, line + 2, size);
    at = line + 2 + size + 2;
  }
}

std::vector<int32_t> tokens_of(const std::string& body) {
  std::vector<int32_t> tokens;
  bool done = false;
  for (size_t at = 0; at < body.size();) {
    const size_t end = std::min(body.find('\n', at), body.size());
    const std::string_view line(body.data() + at, end - at);
    at = end + 1;
    if (!line.starts_with("data: ")) continue;
    if (line == "data: [DONE]") {
      done = true;
      continue;
    }
    const auto event = nlohmann::json::parse(line.substr(6));
    for (const auto& choice : event.at("choices"))
      if (const auto ids = choice.find("token_ids"); ids != choice.end())
        for (const auto& id : *ids) tokens.push_back(id.get<int32_t>());
  }
  PERIGEE_CHECK(done, "a stream ended without [DONE]");
  return tokens;
}

Outcome through_server(uint16_t port) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(port);
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::vector<Client> clients(kClients);
  std::vector<pollfd> polls(kClients);
  const double begin = now_s();
  for (int i = 0; i < kClients; ++i) {
    Client& c = clients[static_cast<size_t>(i)];
    c.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c.fd < 0 || connect(c.fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0)
      throw_environment("serve: cannot open {} connections: {}", kClients, std::strerror(errno));
    const std::string body = nlohmann::json({{"prompt", prompt_of(i)},
                                             {"max_tokens", kTokens},
                                             {"seed", seed_of(i)},
                                             {"ignore_eos", true},
                                             {"stream", true},
                                             {"return_token_ids", true}})
                                 .dump();
    const std::string request = fmt::format(
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: "
        "application/json\r\nConnection: close\r\n"
        "Content-Length: {}\r\n\r\n{}",
        port, body.size(), body);
    PERIGEE_CHECK(send(c.fd, request.data(), request.size(), MSG_NOSIGNAL) ==
                  static_cast<ssize_t>(request.size()));
    polls[static_cast<size_t>(i)] = {c.fd, POLLIN, 0};
  }
  Outcome out;
  int open = kClients;
  char buffer[65536];
  while (open > 0) {
    PERIGEE_CHECK(poll(polls.data(), polls.size(), 60'000) > 0, "{} streams stand still", open);
    for (size_t i = 0; i < polls.size(); ++i) {
      if (polls[i].revents == 0) continue;
      Client& c = clients[i];
      const ssize_t n = recv(c.fd, buffer, sizeof buffer, 0);
      if (n > 0) {
        c.answer.append(buffer, static_cast<size_t>(n));
        if (c.first == 0 && c.answer.find("data: ") != std::string::npos) c.first = now_s() - begin;
        continue;
      }
      PERIGEE_CHECK(n == 0, "{}", std::strerror(errno));
      close(c.fd);
      polls[i].fd = -1;
      polls[i].revents = 0;
      --open;
    }
  }
  out.seconds = now_s() - begin;
  for (const Client& c : clients) {
    out.tokens.push_back(tokens_of(body_of(c.answer)));
    out.first_ms.push_back(c.first * 1e3);
  }
  return out;
}

double percentile(std::vector<double> v, double p) {
  std::sort(v.begin(), v.end());
  return v[std::min(v.size() - 1, static_cast<size_t>(p * static_cast<double>(v.size())))];
}

int64_t peak_mib() {
  rusage u{};
  getrusage(RUSAGE_SELF, &u);
  return u.ru_maxrss / 1024;
}

}  // namespace

void bench_serve(Rig& rig) {
  if (!rig.wants("http-tokens") && !rig.wants("http-first")) return;
  const ParamLayout layout(load_model_config(rig.options().model), Dtype::kF32);
  HugeBuffer weights(static_cast<size_t>(layout.weight_bytes()));
  {
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    initialize(layout, 1, flat.data());
    layout.flat_to_weights(flat.data(), weights.data());
  }
  EngineConfig config;
  config.max_running = kClients;
  config.memory_bytes = int64_t{4} << 30;
  const auto make_engine = [&](const EngineConfig& e) {
    auto engine = std::make_unique<Engine>(rig.context(), layout, e);
    engine->set_weights(weights.data(), kVersion);
    return engine;
  };
  const auto engine = make_engine(config);
  engine_alone(*engine);  // memory is touched, buffers have their sizes

  const ByteTokenizer tokenizer(layout.config().vocab_size);
  const TokenIndex index(tokenizer);
  agents::HostConfig host_config;
  host_config.engine = config;
  agents::MemoryLog log;
  agents::Host host(layout, host_config, make_engine, &log);
  agents::ServiceConfig service;
  service.model = "bench";
  service.limits.vocab = layout.config().vocab_size;
  service.limits.max_context = 4096;
  service.limits.default_max_tokens = kTokens;
  agents::ApiServer server(std::move(service), {}, host, tokenizer, index, nullptr);

  // In turns, because the machine's speed drifts.
  std::vector<double> alone, served, share;
  std::vector<double> first, first_alone;
  const int64_t before = peak_mib();
  for (int round = 0; round < 2; ++round) {
    const Outcome a = engine_alone(*engine), s = through_server(server.port());
    PERIGEE_CHECK(a.tokens == s.tokens, "streams are lost, crossed or differ from the engine's");
    alone.push_back(a.rate());
    served.push_back(s.rate());
    share.push_back(s.rate() / a.rate());
    first = s.first_ms;
    first_alone = a.first_ms;
  }
  Figure f;
  f.name = "http-tokens";
  f.unit = "tokens/s";
  f.value = median(served);
  f.low = *std::min_element(served.begin(), served.end());
  f.high = *std::max_element(served.begin(), served.end());
  f.limit = median(alone);
  f.share = median(share);
  f.aim = 0.9;
  f.turns = 2;
  f.note = fmt::format(
      "{} streams of {} + {} tokens at once, each with the engine's tokens: {:.0f} % of the engine alone "
      "({:.0f} tokens/s); clients on the same processors; {} MiB more at the peak",
      kClients, kPrompt, kTokens, 100 * f.share, f.limit, peak_mib() - before);
  if (rig.wants(f.name)) rig.report(f);
  Figure t;
  t.name = "http-first";
  t.unit = "ms";
  t.value = t.low = median(first);
  t.high = percentile(first, 0.99);
  t.time = true;
  t.limit = median(first_alone);
  t.share = t.limit / t.value;
  t.turns = 2;
  t.note = fmt::format(
      "to the first token, median of {}; 99th percentile {:.0f}; the engine alone: {:.0f} and {:.0f}",
      kClients, t.high, t.limit, percentile(first_alone, 0.99));
  if (rig.wants(t.name)) rig.report(t);
}

}  // namespace perigee::bench
