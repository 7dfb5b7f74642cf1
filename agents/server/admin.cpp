// The admin listener: pause, resume, weights, abort, status. Its own port; it never shares the API's.
#include <fmt/format.h>

#include "agents/server/service.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

namespace {

ordered_json status_of(Service& service) {
  const HostStats h = service.host().stats();
  return {{"paused", h.paused != 0},
          {"queued", h.queued},
          {"running", h.running},
          {"sessions", h.sessions},
          {"weight_version", h.weights_version},
          {"broken", service.host().broken()}};
}

}  // namespace

void admin_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  const net::http::Request& request = exchange->request();
  const std::string_view action = std::string_view(request.path).substr(std::string_view("/admin/").size());
  if (request.method == "GET" || request.method == "HEAD") {
    if (action != "status")
      throw ApiError(404, fmt::format("Invalid URL ({} {})", request.method, quote(request.path)), "",
                     "unknown_url");
    exchange->answer({200, status_of(service).dump()});
    return;
  }
  const json value = request.body.empty() ? json::object() : parse_body(request.body);
  Fields body(value, "");
  std::optional<uint32_t> version_now;  // the host's numbers are of its last step
  if (action == "pause") {
    // abort: what runs is cancelled; wait: it is finished first; keep: it stays where it is.
    const std::string mode = body.string("mode").value_or("keep");
    body.finish();
    if (mode != "abort" && mode != "wait" && mode != "keep")
      refuse("mode", "mode is {}: \"abort\", \"wait\" or \"keep\" is expected", quote(mode));
    if (mode == "wait") {
      // As long as the longest request: resume and abort must be heard meanwhile.
      service.spawn([&service, exchange] {
        try {
          service.host().pause(PauseMode::kWait);
          exchange->answer({200, status_of(service).dump()});
        } catch (...) {
          exchange->answer(api_error(std::current_exception()).answer());
        }
      });
      return;
    }
    service.host().pause(mode == "abort" ? PauseMode::kAbort : PauseMode::kKeep);
  } else if (action == "resume") {
    body.finish();
    service.host().resume();
  } else if (action == "weights") {
    body.need("path");
    const std::string path = *body.string("path", 4096);
    const auto version = body.integer("version", 0, UINT32_MAX);
    body.finish();
    if (!service.config().update_weights) throw ApiError(501, "this server does not change its weights");
    version_now = service.config().update_weights(path, version);
  } else if (action == "abort") {
    body.need("request_id");
    const std::string id = *body.string("request_id", 200);
    body.finish();
    if (!service.abort(id))
      throw ApiError(404, fmt::format("no request {} runs", quote(id)), "request_id", "not_found");
  } else {
    throw ApiError(404, fmt::format("Invalid URL ({} {})", request.method, quote(request.path)), "",
                   "unknown_url");
  }
  ordered_json status = status_of(service);
  if (version_now) status["weight_version"] = *version_now;
  exchange->answer({200, status.dump()});
}

}  // namespace perigee::agents
