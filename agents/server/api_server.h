// The API behind its listeners: what `perigee serve`, its tests and its benchmark start.
#pragma once
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agents/server/service.h"

namespace perigee::agents {

struct ListenConfig {
  std::string address = "127.0.0.1";
  uint16_t port = 0;                   // 0: any free one
  std::optional<uint16_t> admin_port;  // on 127.0.0.1; absent: no admin listener
  std::string key;                     // of both; "": none. Anything but loopback needs one
  std::vector<std::string>
      hosts;  // further values of Host that are taken, with their port where it is not 80
  std::vector<std::string> origins;  // of pages that may use the API
  net::http::Limits limits;
};

class ApiServer {
 public:
  // host, tokenizer, index and tools outlive it; config.guard and config.admin_guard are filled here.
  // ERRORS (input): another address than loopback without a key. ERRORS (environment): the port.
  ApiServer(ServiceConfig config, const ListenConfig& listen, Host& host, const policy::Tokenizer& tokenizer,
            const policy::TokenIndex& index, const ToolBox* tools);
  ~ApiServer();  // stop(0)

  uint16_t port() const { return api_->port(); }
  uint16_t admin_port() const { return admin_ ? admin_->port() : 0; }
  Service& service() { return *service_; }
  net::http::ServerStats stats() const { return api_->stats(); }

  // No new requests or connections; what runs goes on.
  void drain();
  // drain(), waits so long for what runs, then cuts it.
  void stop(std::chrono::milliseconds patience);

 private:
  struct Guards;
  std::shared_ptr<Guards> guards_;
  std::unique_ptr<Service> service_;
  std::unique_ptr<net::http::Server> api_, admin_;
  bool stopped_ = false;
};

}  // namespace perigee::agents
