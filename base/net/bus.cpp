#include "base/net/bus.h"

#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>

namespace perigee::net {
namespace {

constexpr int kMaxFrames = 65536;

void set_common(zmq::socket_t& socket, const BusOptions& options) {
  socket.set(zmq::sockopt::linger, options.linger_ms);
  socket.set(zmq::sockopt::maxmsgsize, options.max_message_bytes);
  socket.set(zmq::sockopt::sndhwm, options.high_water_messages);
  socket.set(zmq::sockopt::rcvhwm, options.high_water_messages);
  socket.set(zmq::sockopt::heartbeat_ivl, options.heartbeat_ms);
  socket.set(zmq::sockopt::heartbeat_timeout, 5 * options.heartbeat_ms);
  socket.set(zmq::sockopt::handshake_ivl, 10000);
}

// One multipart message, or nothing within the timeout. Frames beyond kMaxFrames are read and forgotten.
bool receive_parts(zmq::socket_t& socket, int timeout_ms, std::vector<zmq::message_t>& parts) {
  parts.clear();
  zmq::message_t part;
  try {
    if (!socket.recv(part, zmq::recv_flags::dontwait)) {
      if (timeout_ms == 0) return false;
      zmq::pollitem_t item{socket.handle(), 0, ZMQ_POLLIN, 0};
      if (zmq::poll(&item, 1, std::chrono::milliseconds(timeout_ms)) == 0) return false;
      if (!socket.recv(part, zmq::recv_flags::dontwait)) return false;
    }
  } catch (const zmq::error_t& e) {
    if (e.num() == EINTR) return false;  // a signal: the caller looks at its stop token and comes back
    throw;
  }
  bool more = part.more();
  parts.push_back(std::move(part));
  while (more) {
    zmq::message_t next;
    // The parts of a message arrive together: this never waits.
    if (!socket.recv(next, zmq::recv_flags::none)) break;
    more = next.more();
    if (parts.size() < kMaxFrames) parts.push_back(std::move(next));
  }
  return true;
}

// Goes through a header without keeping any of it; stops where it is nested deeper than any message of a run. (What makes
// a value of it calls itself for each level.)
class Depth : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool key(string_t&) override { return true; }
  bool start_object(size_t) override { return ++depth_ <= kMost; }
  bool start_array(size_t) override { return ++depth_ <= kMost; }
  bool end_object() override { return --depth_ >= 0; }
  bool end_array() override { return --depth_ >= 0; }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  static constexpr int kMost = 100;
  int depth_ = 0;
};

// parts[first] is the header.
std::optional<Message> parse(const std::vector<zmq::message_t>& parts, size_t first) {
  if (parts.size() <= first || parts.size() >= kMaxFrames) return std::nullopt;
  const auto* data = static_cast<const uint8_t*>(parts[first].data());
  Message message;
  Depth depth;
  if (!Json::sax_parse(data, data + parts[first].size(), &depth, Json::input_format_t::cbor)) return std::nullopt;
  message.header = Json::from_cbor(data, data + parts[first].size(), true, false);
  if (!message.header.is_object()) return std::nullopt;
  const auto type = message.header.find("type");
  if (type == message.header.end() || !type->is_string()) return std::nullopt;
  for (size_t i = first + 1; i < parts.size(); ++i)
    message.frames.emplace_back(static_cast<const char*>(parts[i].data()), parts[i].size());
  return message;
}

int64_t wire_bytes(const std::vector<zmq::message_t>& parts) {
  int64_t sum = 0;
  for (const auto& p : parts) sum += static_cast<int64_t>(p.size());
  return sum;
}

// A whole number in [0, limit] under `key`; 0 when absent, -1 when it is something else.
int64_t count_field(const Json& header, const char* key, int64_t limit) {
  const auto it = header.find(key);
  if (it == header.end()) return 0;
  if (!it->is_number_integer()) return -1;
  const int64_t n = it->get<int64_t>();
  return n < 0 || n > limit ? -1 : n;
}

void check_size(const BusOptions& options, const Message& message, size_t bytes) {
  if (static_cast<int64_t>(bytes) <= options.max_message_bytes) return;
  throw_environment("a message \"{}\" has a part of {} bytes, and at most {} may be sent: raise bus.max_message_mib",
                    message.type(), bytes, options.max_message_bytes);
}
void check_frames(const BusOptions& options, const Message& message) {
  for (const auto& frame : message.frames) check_size(options, message, frame.size());
}

// Header and frames, all or nothing. False when the queue is full; zmq::error_t otherwise.
bool send_parts(zmq::socket_t& socket, const BusOptions& options, const std::string* peer, const Message& message,
                int64_t* bytes) {
  const std::vector<uint8_t> header = Json::to_cbor(message.header);
  check_size(options, message, header.size());
  *bytes = static_cast<int64_t>(header.size());
  const auto dontwait = zmq::send_flags::dontwait, more = zmq::send_flags::sndmore | dontwait;
  // Only the first part can find the queue full; the others follow it.
  if (peer != nullptr) {
    if (!socket.send(zmq::buffer(*peer), more)) return false;
    socket.send(zmq::buffer(header), message.frames.empty() ? dontwait : more);
  } else if (!socket.send(zmq::buffer(header), message.frames.empty() ? dontwait : more)) {
    return false;
  }
  for (size_t i = 0; i < message.frames.size(); ++i) {
    socket.send(zmq::buffer(message.frames[i]), i + 1 == message.frames.size() ? dontwait : more);
    *bytes += static_cast<int64_t>(message.frames[i].size());
  }
  return true;
}

constexpr int64_t kMaxWindow = 1 << 20;

}  // namespace

int64_t Message::bytes() const {
  int64_t sum = 256;
  for (const auto& f : frames) sum += static_cast<int64_t>(f.size());
  return sum;
}

Router::Router(zmq::context_t& context, const std::string& endpoint, const BusOptions& options)
    : options_(options), socket_(context, zmq::socket_type::router) {
  set_common(socket_, options);
  socket_.set(zmq::sockopt::router_mandatory, true);
  socket_.set(zmq::sockopt::router_handover, true);
  try {
    socket_.bind(endpoint);
  } catch (const zmq::error_t& e) {
    throw_environment("cannot listen on {}: {}; is another run using this directory or port?", endpoint, e.what());
  }
}

std::optional<Inbound> Router::receive(int timeout_ms) {
  std::vector<zmq::message_t> parts;
  for (;;) {
    if (!receive_parts(socket_, timeout_ms, parts)) return std::nullopt;
    ++counts_.received;
    counts_.received_bytes += wire_bytes(parts);
    std::string id(static_cast<const char*>(parts[0].data()), parts[0].size());
    auto message = parse(parts, 1);
    if (!message) {
      ++counts_.malformed;
      continue;
    }
    const std::string type = message->type();
    const int64_t credit = count_field(message->header, "credit", kMaxWindow);
    const int64_t window = count_field(message->header, "window", kMaxWindow);
    auto it = peers_.find(id);
    if (credit < 0 || window < 0) {
      ++counts_.malformed;
      continue;
    }
    if (it != peers_.end()) it->second.heard = counts_.received;
    if (type == "hello") {
      if (it == peers_.end()) make_room();
      Peer& peer = peers_[id];
      peer.heard = counts_.received;
      peer.queue.clear();
      peer.queued_bytes = 0;
      peer.credits = window;
    } else if (it != peers_.end()) {
      it->second.credits = std::min(it->second.credits + credit, kMaxWindow);
      if (!pump(id, it->second)) {
        // What it says now is of a connection that came back: the caller asks who it is.
        gone_.push_back(id);
        peers_.erase(it);
      }
    }
    if (type == "credit") continue;
    return Inbound{std::move(id), std::move(*message)};
  }
}

// Who restarts comes under another id, and nobody says that the former one is over: without this a run of many restarts would
// hear no worker any more. A peer that lives has sent a sign of it since.
void Router::make_room() {
  while (!peers_.empty() && static_cast<int64_t>(peers_.size()) >= options_.max_peers) {
    const auto oldest = std::min_element(peers_.begin(), peers_.end(),
                                         [](const auto& a, const auto& b) { return a.second.heard < b.second.heard; });
    gone_.push_back(oldest->first);
    peers_.erase(oldest);
  }
}

Router::Sent Router::transmit(const std::string& peer, const Message& message) {
  int64_t bytes = 0;
  try {
    if (!send_parts(socket_, options_, &peer, message, &bytes)) return Sent::kFull;
  } catch (const zmq::error_t& e) {
    if (e.num() == EHOSTUNREACH) {
      ++counts_.unroutable;
      return Sent::kGone;
    }
    throw;
  }
  ++counts_.sent;
  counts_.sent_bytes += bytes;
  return Sent::kSent;
}

bool Router::pump(const std::string& peer, Peer& state) {
  while (state.credits > 0 && !state.queue.empty()) {
    const Sent sent = transmit(peer, state.queue.front());
    if (sent == Sent::kFull) return true;
    if (sent == Sent::kGone) return false;
    --state.credits;
    state.queued_bytes -= state.queue.front().bytes();
    state.queue.pop_front();
  }
  return true;
}

bool Router::send(const std::string& peer, Message message) {
  check_frames(options_, message);
  auto it = peers_.find(peer);
  if (it == peers_.end()) return false;
  Peer& state = it->second;
  if (state.credits > 0 && state.queue.empty()) {
    const Sent sent = transmit(peer, message);
    if (sent == Sent::kGone) {
      peers_.erase(it);
      gone_.push_back(peer);
      return false;
    }
    if (sent == Sent::kSent) {
      --state.credits;
      return true;
    }
  }
  ++state.stalls;
  ++stalls_;
  state.queued_bytes += message.bytes();
  state.queue.push_back(std::move(message));
  return true;
}

bool Router::send_uncredited(const std::string& peer, const Message& message) {
  return transmit(peer, message) == Sent::kSent;
}

std::optional<PeerStats> Router::peer(const std::string& peer) const {
  const auto it = peers_.find(peer);
  if (it == peers_.end()) return std::nullopt;
  const Peer& p = it->second;
  return PeerStats{p.credits, static_cast<int64_t>(p.queue.size()), p.queued_bytes, p.stalls};
}

int64_t Router::waiting() const {
  int64_t sum = 0;
  for (const auto& [id, p] : peers_) sum += static_cast<int64_t>(p.queue.size());
  return sum;
}

Dealer::Dealer(zmq::context_t& context, const std::string& endpoint, const std::string& name, const BusOptions& options)
    : options_(options), socket_(context, zmq::socket_type::dealer) {
  PERIGEE_CHECK(options.window >= 1 && options.window <= kMaxWindow, "window {}", options.window);
  std::random_device random;
  id_ = fmt::format("{}#{}-{:08x}{:08x}", name, ::getpid(), random(), random());
  set_common(socket_, options);
  socket_.set(zmq::sockopt::routing_id, id_);
  socket_.set(zmq::sockopt::reconnect_ivl, 20);
  socket_.set(zmq::sockopt::reconnect_ivl_max, 500);
  try {
    socket_.connect(endpoint);
  } catch (const zmq::error_t& e) {
    throw_environment("cannot connect to {}: {}", endpoint, e.what());
  }
}

std::optional<Message> Dealer::receive(int timeout_ms) {
  std::vector<zmq::message_t> parts;
  for (;;) {
    if (!receive_parts(socket_, timeout_ms, parts)) return std::nullopt;
    ++counts_.received;
    counts_.received_bytes += wire_bytes(parts);
    auto message = parse(parts, 0);
    if (!message) {
      ++counts_.malformed;
      continue;
    }
    if (message->type() != kWho && ++owed_ * 2 >= options_.window && transmit(Message("credit", {{"credit", owed_}})))
      owed_ = 0;
    return message;
  }
}

bool Dealer::send(Message message) {
  const bool hello = message.type() == "hello";
  if (hello)
    message.header["window"] = options_.window;
  else if (owed_ > 0)
    message.header["credit"] = owed_;
  if (!transmit(message)) return false;
  owed_ = 0;
  return true;
}

bool Dealer::transmit(const Message& message) {
  int64_t bytes = 0;
  check_frames(options_, message);
  if (!send_parts(socket_, options_, nullptr, message, &bytes)) return false;
  ++counts_.sent;
  counts_.sent_bytes += bytes;
  return true;
}

std::string ipc_endpoint(const std::string& directory, const std::string& name) {
  namespace fs = std::filesystem;
  std::error_code ec;
  fs::path where = fs::absolute(directory, ec);
  // Also leave room for what ZeroMQ adds to the path while it binds.
  if ((where / name).string().size() + 1 > sizeof(sockaddr_un::sun_path)) {
    const uint64_t key = std::hash<std::string>{}(where.string());
    where = fs::temp_directory_path() / fmt::format("perigee-{}-{:016x}", ::getuid(), key);
  }
  fs::create_directories(where, ec);
  if (ec) throw_environment("cannot create {} for the sockets of the run: {}", where.string(), ec.message());
  struct stat info {};
  if (::chmod(where.c_str(), 0700) != 0 || ::stat(where.c_str(), &info) != 0 || info.st_uid != ::geteuid())
    throw_environment("{} belongs to someone else: sockets of the run cannot live there", where.string());
  return "ipc://" + (where / name).string();
}

}  // namespace perigee::net
