// GET /health, /liveness, /metrics: of the process, of the engine, and numbers for Prometheus.
#include <fmt/format.h>

#include <chrono>

#include "agents/server/service.h"

namespace perigee::agents {

void health_endpoint(Service&, std::shared_ptr<net::http::Exchange> exchange) {
  exchange->answer({200, "{\"status\":\"ok\"}"});
}

void liveness_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  if (const std::string why = service.host().broken(); !why.empty()) throw ApiError(503, why, "", "broken");
  if (!service.host().alive(std::chrono::seconds(10)))
    throw ApiError(503, "the engine did not answer within 10 seconds", "", "not_alive");
  exchange->answer({200, "{\"status\":\"ok\"}"});
}

void metrics_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  const HostStats h = service.host().stats();
  const ServerMetrics& m = service.metrics();
  std::string out;
  const auto to = std::back_inserter(out);
  const auto value = [&](const char* type, const char* name, const char* help, auto v,
                         const std::string& labels = "") {
    if (labels.empty() || out.find(fmt::format("# TYPE perigee_{} ", name)) == std::string::npos)
      fmt::format_to(to, "# HELP perigee_{} {}\n# TYPE perigee_{} {}\n", name, help, name, type);
    fmt::format_to(to, "perigee_{}{} {}\n", name, labels.empty() ? "" : "{" + labels + "}", v);
  };
  const auto gauge = [&](const char* name, const char* help, auto v, const std::string& labels = "") {
    value("gauge", name, help, v, labels);
  };
  const auto counter = [&](const char* name, const char* help, auto v, const std::string& labels = "") {
    value("counter", name, help, v, labels);
  };
  gauge("requests_queued", "Requests that have not begun.", h.queued);
  gauge("requests_running", "Requests that have begun.", h.running);
  gauge("paused", "1 while generation is paused.", h.paused);
  counter("requests_total", "Requests taken by the engine's host.", h.requests);
  counter("choices_done_total", "Choices that ended, by reason.", h.done_stop, "reason=\"stop\"");
  counter("choices_done_total", "", h.done_length, "reason=\"length\"");
  counter("choices_done_total", "", h.cancelled, "reason=\"cancelled\"");
  counter("choices_done_total", "", h.failed, "reason=\"error\"");
  counter("prompt_tokens_total", "Tokens of prompts, cached ones included.", h.prompt_tokens);
  counter("cached_tokens_total", "Tokens of prompts that were not computed again.", h.cached_tokens);
  counter("generated_tokens_total", "Tokens sampled.", h.generated_tokens);
  gauge("engine_sequences", "Sequences of the engine.", h.engine.running, "state=\"running\"");
  gauge("engine_sequences", "", h.engine.waiting, "state=\"waiting\"");
  gauge("engine_sequences", "", h.engine.held, "state=\"held\"");
  gauge("engine_memory_bytes", "Memory of states and latents in use.", h.engine.memory_used_bytes);
  gauge("engine_memory_budget_bytes", "And what there is of it.", h.engine.memory_budget_bytes);
  gauge("prefix_cache_bytes", "Memory of cached prefixes.", h.engine.prefix_cache_bytes);
  counter("prefix_lookups_total", "Prompts that could have found a cached prefix.", h.engine.prefix_lookups);
  counter("prefix_hits_total", "Prompts that did.", h.engine.prefix_hits);
  counter("engine_busy_seconds_total", "Time of the engine's thread.", h.busy_seconds);
  counter("engine_step_seconds_total", "Of it, in the engine's steps.", h.step_seconds);
  out +=
      "# HELP perigee_step_seconds Time of one step of the engine.\n# TYPE perigee_step_seconds histogram\n";
  int64_t sum = 0;
  for (size_t i = 0; i < std::size(h.step_buckets); ++i) {
    sum += h.step_buckets[i];
    if (i < std::size(HostStats::kStepBounds))
      fmt::format_to(to, "perigee_step_seconds_bucket{{le=\"{}\"}} {}\n", HostStats::kStepBounds[i], sum);
    else
      fmt::format_to(to, "perigee_step_seconds_bucket{{le=\"+Inf\"}} {}\n", sum);
  }
  fmt::format_to(to, "perigee_step_seconds_sum {}\nperigee_step_seconds_count {}\n", h.step_seconds, sum);
  gauge("sessions", "Open sessions.", h.sessions);
  gauge("sessions_in_memory", "Sessions whose state is in memory.", h.sessions_in_memory);
  gauge("sessions_on_disk", "Sessions whose state is on disk.", h.sessions_on_disk);
  counter("session_turns_total", "Turns committed.", h.turns);
  counter("session_forks_total", "Sessions forked.", h.forks);
  counter("session_suspends_total", "States written to disk.", h.suspends);
  counter("session_resumes_total", "Sessions that went on from a state on disk.", h.resumes);
  counter("session_replayed_tokens_total", "Tokens of sessions that were computed again.", h.replays);
  counter("snapshot_bytes_written_total", "Bytes of states written to disk.", h.snapshot_bytes_written);
  counter("snapshots_failed_total", "States that could not be written.", h.snapshots_failed);
  counter("snapshots_refused_total", "State files that were damaged or foreign.", h.snapshots_refused);
  counter("log_commits_total", "Durable commits of turns.", h.log_commits);
  counter("log_seconds_total", "Time of them.", h.log_seconds);
  gauge("weights_version", "Version of the weights.", h.weights_version);
  gauge("broken", "1 when the host refuses everything.", service.host().broken().empty() ? 0 : 1);

  gauge("streams_open", "Streaming answers being written.", m.streams.load());
  counter("disconnected_total", "Requests cancelled since their client went.", m.disconnected.load());
  counter("stop_text_total", "Choices that ended by a stop text.", m.stop_text.load());
  for (const auto& [name, help, histogram] :
       {std::tuple{"time_to_first_token_seconds", "From a request's start to its first token.",
                   &m.first_token},
        std::tuple{"time_between_tokens_seconds", "Between two tokens of a choice.", &m.between_tokens},
        std::tuple{"request_seconds", "From a request's start to its last token.", &m.whole_request}}) {
    fmt::format_to(to, "# HELP perigee_{} {}\n# TYPE perigee_{} histogram\n", name, help, name);
    histogram->write(fmt::format("perigee_{}", name), "", out);
  }
  if (service.server_ != nullptr) {
    const net::http::ServerStats s = service.server_->stats();
    gauge("http_connections", "Open connections.", s.connections);
    gauge("http_exchanges", "Requests being answered.", s.exchanges);
    gauge("http_buffered_bytes", "Bytes of answers that clients have not taken.", s.buffered_bytes);
    counter("http_connections_total", "Connections accepted.", s.accepted);
    counter("http_refused_connections_total", "Connections over the limit.", s.refused_connections);
    counter("http_requests_total", "Requests read.", s.requests);
    counter("http_bad_requests_total", "Requests that were no HTTP or broke a limit.", s.bad_requests);
    counter("http_timeouts_total", "Connections closed for being slow.", s.timeouts);
    counter("http_gone_total", "Connections lost while they were answered.", s.gone);
  }
  exchange->answer({200, std::move(out), "text/plain; version=0.0.4"});
}

}  // namespace perigee::agents
