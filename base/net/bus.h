// The bus of a run: messages over ZeroMQ between one Router (the hub) and any number of Dealers (its workers), with
// credits. Grammar of a message and the life of a credit: docs/formats/bus.md.
//
// Invariants:
//  B1  A peer has at most as many messages on their way to it as it gave credits for. What exceeds them waits in
//      the Router, in order, and is counted as a stall; nothing is dropped while the peer is there.
//  B2  Between one Dealer and one Router messages keep their order, in either direction.
//  B3  A message that cannot be parsed or that breaks a limit is counted and ignored; it never reaches the caller.
//  B4  No call blocks longer than the timeout it is given. "Would block" is a returned value.
//  B5  A frame longer than max_message_bytes is an Error of the sender: the other end would close the connection.
//
// Thread safety: an object belongs to one thread at a time.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "base/error.h"

namespace perigee::net {

using Json = nlohmann::json;

// header: a CBOR map on the wire; its "type" is a string. frames: raw bytes, little endian, as the type says.
struct Message {
  Json header;
  std::vector<std::string> frames;

  Message() = default;
  explicit Message(std::string_view type) : header{{"type", type}} {}
  Message(std::string_view type, Json fields) : header(std::move(fields)) { header["type"] = type; }

  std::string type() const { return header.value("type", std::string()); }
  int64_t bytes() const;  // of the frames, and roughly of the header
};

struct BusOptions {
  int64_t max_message_bytes = int64_t{256} << 20;  // of one frame; a longer one closes the connection that sent it
  int high_water_messages = 4096;                  // queued in ZeroMQ for one peer, each way
  int linger_ms = 500;                             // how long closing waits for what is still queued
  int heartbeat_ms = 2000;                         // ZeroMQ pings; a peer silent for five of them is reconnected
  int window = 64;                                 // Dealer: messages it takes before it gives new credits
  int64_t max_peers = 1024;                        // Router: a further one takes the place of the one that was silent longest
};

// What a Router knows of a peer.
struct PeerStats {
  int64_t credits = 0;
  int64_t queued_messages = 0, queued_bytes = 0;  // waiting for credits
  int64_t stalls = 0;                             // messages that had to wait
};

struct BusCounts {
  int64_t received = 0, received_bytes = 0, sent = 0, sent_bytes = 0, malformed = 0, unroutable = 0;
};

struct Inbound {
  std::string peer;  // its routing id: unique for the life of one Dealer object
  Message message;
};

class Router {
 public:
  // Binds. Throws Error(kEnvironment) naming the endpoint when it is taken or cannot be bound.
  Router(zmq::context_t& context, const std::string& endpoint, const BusOptions& options = {});

  // The next message, waiting up to timeout_ms for it. Credits that came with it are booked. A message of type "hello"
  // resets its sender: credits are what it says ("window"), and what was queued for it is dropped.
  std::optional<Inbound> receive(int timeout_ms);
  // Sends, or queues until the peer gives a credit. False when there is no such peer (any more).
  // Throws Error(kEnvironment) for a message that no peer would accept (B5).
  bool send(const std::string& peer, Message message);
  // Like send but outside the credits, never queued: to ask a stranger for its hello, at most once per message of it.
  bool send_uncredited(const std::string& peer, const Message& message);
  // Peers that could not be reached or made room for others, since the last call: they are forgotten, and what was queued for
  // them is lost.
  // One that lives says who it is when it is asked.
  std::vector<std::string> take_gone() { return std::exchange(gone_, {}); }

  std::optional<PeerStats> peer(const std::string& peer) const;
  int64_t waiting() const;  // messages of all peers that wait for credits
  int64_t stalls() const { return stalls_; }  // messages that had to wait for a credit, whoever they were for
  const BusCounts& counts() const { return counts_; }

 private:
  struct Peer {
    int64_t credits = 0, queued_bytes = 0, stalls = 0;
    int64_t heard = 0;  // its last message, as a count of all
    std::deque<Message> queue;
  };
  enum class Sent { kSent, kFull, kGone };
  Sent transmit(const std::string& peer, const Message& message);
  bool pump(const std::string& peer, Peer& state);  // false: it is gone
  void make_room();

  BusOptions options_;
  zmq::socket_t socket_;
  std::map<std::string, Peer> peers_;
  std::vector<std::string> gone_;
  int64_t stalls_ = 0;
  BusCounts counts_;
};

class Dealer {
 public:
  // Connects (the Router may come later, or come back). The routing id is `name` and something unique to this object.
  Dealer(zmq::context_t& context, const std::string& endpoint, const std::string& name, const BusOptions& options = {});

  // The next message, waiting up to timeout_ms. Taking it gives its credit back (in batches, or with the next send).
  std::optional<Message> receive(int timeout_ms);
  // False when the queue to the Router is full: try again later. A "hello" gets the window and resets the credits.
  // Throws Error(kEnvironment) for a message that the Router would not accept (B5).
  bool send(Message message);

  const std::string& id() const { return id_; }
  const BusCounts& counts() const { return counts_; }

 private:
  bool transmit(const Message& message);

  BusOptions options_;
  std::string id_;
  zmq::socket_t socket_;
  int64_t owed_ = 0;  // credits to give back
  BusCounts counts_;
};

// Message type that the Router may send outside the credits.
inline constexpr std::string_view kWho = "who";

// An ipc:// endpoint `name` in `directory`, or where that path is too long for a socket, in a directory of its own
// under the system's temporary directory, derived from `directory`. Creates the directory, for its owner only.
std::string ipc_endpoint(const std::string& directory, const std::string& name);

// Vectors of plain values as frames and back. A frame whose length is no multiple gives nullopt.
template <class T>
std::string to_frame(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}
template <class T>
std::optional<std::vector<T>> from_frame(const std::string& frame) {
  if (frame.size() % sizeof(T) != 0) return std::nullopt;
  std::vector<T> values(frame.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), frame.data(), frame.size());
  return values;
}

}  // namespace perigee::net
