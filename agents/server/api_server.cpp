#include "agents/server/api_server.h"

#include <thread>

#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {

// The names of a listener hold its port, which is known once it listens: until then nobody is let in.
struct ApiServer::Guards {
  std::atomic<bool> known{false};
  GuardConfig api, admin;

  std::optional<net::http::Answer> check(const GuardConfig& config, const net::http::Request& request) const {
    if (!known) return ApiError(503, "the server is starting", "", "starting").answer();
    return guard(config, request);
  }
};

ApiServer::ApiServer(ServiceConfig config, const ListenConfig& listen, Host& host,
                     const policy::Tokenizer& tokenizer, const policy::TokenIndex& index,
                     const ToolBox* tools)
    : guards_(std::make_shared<Guards>()) {
  const bool local = net::http::is_loopback(listen.address);
  if (!local && listen.key.empty())
    throw_input("--host {}: other machines reach this address, so a key is needed: give --key-file",
                listen.address);
  service_ = std::make_unique<Service>(std::move(config), host, tokenizer, index, tools);

  const auto refusal = [](int status, std::string_view message) {
    return ApiError(status, std::string(message)).answer();
  };
  net::http::ServerOptions options;
  options.address = listen.address;
  options.port = listen.port;
  options.limits = listen.limits;
  options.refusal = refusal;
  options.guard = [g = guards_](const net::http::Request& r) { return g->check(g->api, r); };
  api_ = std::make_unique<net::http::Server>(
      std::move(options),
      [s = service_.get()](std::shared_ptr<net::http::Exchange> e) { s->handle(std::move(e)); });
  if (listen.admin_port) {
    net::http::ServerOptions o;
    o.port = *listen.admin_port;
    o.limits = listen.limits;
    o.limits.connections = 64;
    o.limits.body_bytes = 1 << 20;
    o.refusal = refusal;
    o.guard = [g = guards_](const net::http::Request& r) { return g->check(g->admin, r); };
    admin_ = std::make_unique<net::http::Server>(
        std::move(o),
        [s = service_.get()](std::shared_ptr<net::http::Exchange> e) { s->handle_admin(std::move(e)); });
    guards_->admin.key = listen.key;
    guards_->admin.hosts = host_names("127.0.0.1", admin_->port());
  }
  service_->attach(api_.get(), api_->poster());
  // A page that makes a browser ask this server by another name is told apart by Host. With a key it could not speak to
  // it anyway, so on other addresses any name will do unless some are given.
  guards_->api.key = listen.key;
  if (local) guards_->api.hosts = host_names(listen.address, api_->port());
  for (const std::string& name : listen.hosts) {
    if (!local && guards_->api.hosts.empty()) guards_->api.hosts = host_names(listen.address, api_->port());
    guards_->api.hosts.insert(name);
  }
  guards_->api.origins.insert(listen.origins.begin(), listen.origins.end());
  guards_->known = true;
}

ApiServer::~ApiServer() {
  stop(std::chrono::milliseconds(0));
}

void ApiServer::drain() {
  service_->drain();
  api_->drain();
}

void ApiServer::stop(std::chrono::milliseconds patience) {
  if (std::exchange(stopped_, true)) return;
  drain();
  const auto until = std::chrono::steady_clock::now() + patience;
  const auto wait = [&](auto time) {
    while (std::chrono::steady_clock::now() < time &&
           (service_->open_generations() > 0 || api_->stats().exchanges > 0))
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  wait(until);
  service_->abort_all();
  wait(std::chrono::steady_clock::now() + std::chrono::seconds(2));
  if (admin_) admin_->stop();
  api_->stop();
  service_.reset();  // ends its workers and waits for what the host still does for it
}

}  // namespace perigee::agents
