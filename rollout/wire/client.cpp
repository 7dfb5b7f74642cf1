#include "rollout/wire/client.h"

#include <unistd.h>

#include <algorithm>

#include "rollout/wire/protocol.h"

namespace perigee::rollout {


HubClient::HubClient(zmq::context_t& context, const std::string& endpoint, const std::string& role,
                     const std::string& name, const std::string& run, std::function<Json()> fields,
                     const ClientOptions& options)
    : options_(options),
      role_(role),
      name_(name),
      run_(run),
      fields_(std::move(fields)),
      dealer_(context, endpoint, name, options.bus) {
  say_hello();
}

void HubClient::say_hello() {
  Json header = fields_ ? fields_() : Json::object();
  header["role"] = role_;
  header["name"] = name_;
  header["run"] = run_;
  header["pid"] = ::getpid();
  header["from"] = kept_.empty() ? next_seq_ : kept_.front().seq;
  joined_ = false;
  last_hello_ = Clock::now();
  ++hellos_;
  dealer_.send(BusMessage("hello", std::move(header)));
}

void HubClient::on_time() {
  const auto now = Clock::now();
  if (!joined_) {
    if (now - last_hello_ >= std::chrono::milliseconds(options_.hello_timeout_ms)) say_hello();
    return;
  }
  if (now - last_heartbeat_ >= std::chrono::milliseconds(options_.heartbeat_ms)) {
    last_heartbeat_ = now;
    // With the last number that was sent: so the hub notices when it was lost and nothing follows it.
    int64_t upto = next_seq_ - 1;
    for (const auto& kept : kept_)
      if (!kept.sent) {
        upto = kept.seq - 1;
        break;
      }
    dealer_.send(BusMessage("heartbeat", {{"epoch", epoch_}, {"upto", upto}, {"got", got_}}));
  }
  pump();
}

void HubClient::pump() {
  for (auto& kept : kept_) {
    if (kept.sent) continue;
    kept.message.header["epoch"] = epoch_;
    if (!dealer_.send(kept.message)) return;
    kept.sent = true;
  }
}

bool HubClient::handle(const BusMessage& message) {
  const std::string type = message.type();
  if (type == net::kWho) {
    if (joined_) say_hello();
    return false;
  }
  if (type == "welcome") {
    const auto epoch = field<uint64_t>(message.header, "epoch");
    if (!epoch) return false;
    epoch_ = *epoch;
    got_ = field<int64_t>(message.header, "no").value_or(0);
    joined_ = true;
    last_heartbeat_ = Clock::now();
    // The pump waits until the role has seen which work was taken away.
    for (auto& kept : kept_) kept.sent = false;
    return true;
  }
  if (field<uint64_t>(message.header, "epoch").value_or(epoch_) != epoch_ || !joined_) return false;
  if (const auto no = field<int64_t>(message.header, "no")) {
    if (*no != got_ + 1) {  // what came between is lost, and this one comes again if it is needed
      say_hello();
      return false;
    }
    got_ = *no;
  }
  if (type == "ack") {
    const int64_t upto = field<int64_t>(message.header, "upto").value_or(0);
    while (!kept_.empty() && kept_.front().sent && kept_.front().seq <= upto) {
      kept_bytes_ -= kept_.front().message.bytes();
      kept_.pop_front();
    }
    return false;
  }
  return true;
}

std::optional<BusMessage> HubClient::receive(int timeout_ms) {
  const auto until = Clock::now() + std::chrono::milliseconds(timeout_ms);
  for (;;) {
    on_time();
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    const int slice = static_cast<int>(std::clamp<int64_t>(left, 0, joined_ ? options_.heartbeat_ms : std::min(100, options_.hello_timeout_ms)));
    auto message = dealer_.receive(slice);
    if (message && handle(*message)) return message;
    if (!message && Clock::now() >= until) return std::nullopt;
  }
}

void HubClient::send_durable(BusMessage message) {
  message.header["seq"] = next_seq_;
  message.header["run"] = run_;
  kept_bytes_ += message.bytes();
  kept_.push_back({next_seq_++, false, std::move(message)});
  if (joined_) pump();
}

void HubClient::send(BusMessage message) {
  if (!joined_) return;
  message.header["epoch"] = epoch_;
  message.header["run"] = run_;
  dealer_.send(std::move(message));
}

void HubClient::forget(const std::function<bool(const BusMessage&)>& pred) {
  for (Kept& kept : kept_) {
    if (!pred(kept.message)) continue;
    kept_bytes_ -= kept.message.bytes();
    kept.message = BusMessage("moot", {{"seq", kept.seq}, {"run", run_}});
    kept_bytes_ += kept.message.bytes();
  }
}

}  // namespace perigee::rollout
