// /v1/sessions: create, list, look at, fork, suspend, delete. Running: session_run.cpp.
#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <filesystem>
#include <random>

#include "agents/server/json_text.h"
#include "agents/server/session_turn.h"
#include "base/text.h"

namespace perigee::agents {

using nlohmann::json;
using nlohmann::ordered_json;

namespace {

std::string new_name() {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("sess_{:016x}{:08x}", random(), static_cast<uint32_t>(random()));
}

ordered_json status_json(const SessionStatus& s) {
  constexpr std::string_view kWhere[] = {"memory", "disk", "tokens"};
  ordered_json out;
  out["id"] = s.info.name;
  out["object"] = "session";
  out["created_at"] = s.info.created_us / 1'000'000;
  out["last_used_at"] = s.last_used_us / 1'000'000;
  out["tokens"] = s.tokens;
  out["turns"] = s.turns;
  out["turn_ends"] = s.turn_ends;
  out["state"] = kWhere[static_cast<int>(s.where)];
  out["running"] = s.running;
  out["parent"] = s.info.parent.empty() ? ordered_json(nullptr) : ordered_json(s.info.parent);
  out["parent_tokens"] = s.info.parent_tokens;
  out["metadata"] = ordered_json::parse(s.info.meta, nullptr, false);
  return out;
}

// The value of ?name=VALUE, or "".
std::string query_value(std::string_view query, std::string_view name) {
  while (!query.empty()) {
    const size_t end = std::min(query.find('&'), query.size());
    const std::string_view pair = query.substr(0, end);
    if (pair.starts_with(name) && pair.substr(name.size()).starts_with('='))
      return std::string(pair.substr(name.size() + 1));
    query.remove_prefix(std::min(end + 1, query.size()));
  }
  return "";
}

json body_of(const net::http::Request& request) {
  return request.body.empty() ? json::object() : parse_body(request.body);
}

std::string metadata_of(Fields& body) {
  const json* v = body.find("metadata");
  if (v == nullptr) return "{}";
  if (!v->is_object()) refuse("metadata", "'metadata' is an object");
  std::string text = v->dump();
  if (text.size() > 16384) refuse("metadata", "'metadata' is longer than 16384 bytes");
  return text;
}

void list(Service& service, net::http::Exchange& exchange) {
  const std::string& query = exchange.request().query;
  int64_t limit = 100;
  if (const std::string text = query_value(query, "limit"); !text.empty()) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), limit);
    if (error != std::errc() || end != text.data() + text.size() || limit < 1 || limit > 10'000)
      refuse("limit", "limit is {}: a whole number from 1 to 10000 is expected", quote(text));
  }
  const std::string after = query_value(query, "after");
  ordered_json data = ordered_json::array();
  bool more = false;
  for (const SessionStatus& s : service.host().sessions()) {
    if (s.info.name <= after) continue;
    if (static_cast<int64_t>(data.size()) == limit) {
      more = true;
      break;
    }
    data.push_back(status_json(s));
  }
  exchange.answer(
      {200, ordered_json{{"object", "list"}, {"data", std::move(data)}, {"has_more", more}}.dump()});
}

void create(Service& service, net::http::Exchange& exchange) {
  const json value = body_of(exchange.request());
  Fields body(value, "");
  SessionInfo info;
  info.name = body.string("id").value_or(new_name());
  check_session_name(info.name, "id");
  info.meta = metadata_of(body);
  body.finish();
  service.host().open_session(info);
  exchange.answer({201, status_json(service.host().session(info.name)).dump()});
}

void show(Service& service, net::http::Exchange& exchange, const std::string& name) {
  ordered_json out = status_json(service.host().session(name));
  const SessionRecord record = service.host().session_record(name);
  const SessionView view = view_session(service.tokenizer(), record, service.config().thinking);
  ordered_json messages = ordered_json::array();
  for (const SessionMessage& m : view.messages) {
    ordered_json one = message_json(m.message);
    one["turn"] = m.turn;
    one["sampled"] = m.sampled;
    messages.push_back(std::move(one));
  }
  out["messages"] = std::move(messages);
  out["tools"] = view.tools.empty() ? ordered_json::array() : ordered_json::parse(view.tools, nullptr, false);
  std::string text = out.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
  if (query_value(exchange.request().query, "tokens") == "true") {
    // By hand: a session may have a million of them.
    std::string ids, mask, logprobs, versions;
    for (const SessionTurn& t : record.turns)
      for (size_t i = 0; i < t.segment.tokens.size(); ++i) {
        const char* comma = ids.empty() ? "" : ",";
        ids += comma;
        append_json(ids, int64_t{t.segment.tokens[i]});
        mask += fmt::format("{}{}", comma, t.segment.mask.empty() ? 1 : t.segment.mask[i]);
        logprobs += comma;
        append_json(logprobs, t.segment.logprobs[i]);
        versions += fmt::format("{}{}", comma, t.segment.versions[i]);
      }
    text.pop_back();
    text += fmt::format(",\"token_ids\":[{}],\"mask\":[{}],\"logprobs\":[{}],\"versions\":[{}]}}", ids, mask,
                        logprobs, versions);
  }
  exchange.answer({200, std::move(text)});
}

void fork(Service& service, net::http::Exchange& exchange, const std::string& name) {
  const json value = body_of(exchange.request());
  Fields body(value, "");
  const std::string child = body.string("id").value_or(new_name());
  check_session_name(child, "id");
  const auto turn = body.integer("turn", 0, int64_t{1} << 31),
             token = body.integer("token", 0, int64_t{1} << 40);
  const std::string meta = metadata_of(body);
  body.finish();
  if (turn && token) refuse("turn", "turn and token exclude each other");
  const SessionStatus s = service.host().session(name);
  int64_t at = token.value_or(s.tokens);
  if (turn) {
    if (*turn > s.turns) refuse("turn", "turn is {}; the session has {}", *turn, s.turns);
    at = *turn == 0 ? 0 : s.turn_ends[static_cast<size_t>(*turn) - 1];
  }
  if (at > s.tokens) refuse("token", "token is {}; the session has {}", at, s.tokens);
  if (at == 0) {
    SessionInfo info;
    info.name = child;
    info.parent = name;
    info.meta = meta;
    service.host().open_session(info);
  } else {
    service.host().fork_session(name, at, child, meta);
  }
  exchange.answer({201, status_json(service.host().session(child)).dump()});
}

// The files of its tools: another session of this name must not find them, nor may they fill the disk. Moved away first,
// so that one that is opened at this moment has a folder of its own.
void remove_work(Service& service, const std::string& name) {
  namespace fs = std::filesystem;
  const fs::path& all = service.config().work_folder;
  if (all.empty()) return;
  static std::atomic<uint64_t> count{0};
  std::error_code error;
  const fs::path gone = all / fmt::format("{}{}-{}", kGoneFolder, ::getpid(), count++);
  fs::rename(all / name, gone, error);
  if (!error) fs::remove_all(gone, error);
}

}  // namespace

void sessions_endpoint(Service& service, std::shared_ptr<net::http::Exchange> exchange) {
  constexpr std::string_view kPath = "/v1/sessions";
  const net::http::Request& request = exchange->request();
  std::string rest = request.path.substr(kPath.size());
  if (rest.empty() || rest == "/") {
    if (request.method == "POST") return create(service, *exchange);
    return list(service, *exchange);
  }
  rest.erase(0, 1);
  const size_t slash = rest.find('/');
  const std::string name = rest.substr(0, slash),
                    action = slash == std::string::npos ? "" : rest.substr(slash + 1);
  check_session_name(name, "");
  if (action.empty() && request.method == "GET") return show(service, *exchange, name);
  if (action.empty() && request.method == "DELETE") {
    service.host().close_session(name);
    remove_work(service, name);
    exchange->answer(
        {200, ordered_json{{"id", name}, {"object", "session.deleted"}, {"deleted", true}}.dump()});
    return;
  }
  if (request.method == "POST" && action == "fork") return fork(service, *exchange, name);
  if (request.method == "POST" && action == "suspend") {
    service.host().suspend(name);
    exchange->answer({200, status_json(service.host().session(name)).dump()});
    return;
  }
  if (request.method == "POST" && action == "run") return session_run(service, exchange, name);
  throw ApiError(404, fmt::format("Invalid URL ({} {})", request.method, quote(request.path)), "",
                 "unknown_url");
}

}  // namespace perigee::agents
