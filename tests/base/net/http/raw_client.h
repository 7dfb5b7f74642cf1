// A client that sends exactly the bytes it is told to, over a blocking socket with a time limit.
#pragma once
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace perigee {

class RawClient {
 public:
  explicit RawClient(uint16_t port, int receive_buffer = 0) {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (receive_buffer > 0) setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0;
  }
  ~RawClient() { close(); }
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  bool connected() const { return connected_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  // False when the other end has closed.
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }
  // Appends what comes to received(); false at the end of the connection or after the time.
  bool receive(double within_s = 10) {
    pollfd p{fd_, POLLIN, 0};
    if (poll(&p, 1, static_cast<int>(within_s * 1000)) != 1) return false;
    char buffer[16384];
    const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
    if (n <= 0) {
      ended_ = true;
      return false;
    }
    received_.append(buffer, static_cast<size_t>(n));
    return true;
  }
  // Reads until the text is there. False: it did not come.
  bool wait_for(std::string_view text, double within_s = 10) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(within_s);
    while (received_.find(text) == std::string::npos)
      if (std::chrono::steady_clock::now() > until || !receive(within_s)) return false;
    return true;
  }
  const std::string& rest(double within_s = 10) {
    while (receive(within_s)) {
    }
    return received_;
  }
  bool ended() const { return ended_; }
  const std::string& received() const { return received_; }
  std::string& received() { return received_; }

 private:
  int fd_ = -1;
  bool connected_ = false, ended_ = false;
  std::string received_;
};

struct RawAnswer {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks put together
  bool complete = false;
};

// Takes the first answer out of bytes. complete is false when it is not all there.
inline RawAnswer take_answer(std::string& bytes) {
  RawAnswer out;
  const size_t end = bytes.find("\r\n\r\n");
  if (end == std::string::npos || bytes.size() < 12) return out;
  out.status = std::atoi(bytes.substr(9, 3).c_str());
  for (size_t at = bytes.find("\r\n") + 2; at < end + 2;) {
    const size_t stop = bytes.find("\r\n", at), colon = bytes.find(':', at);
    std::string name = bytes.substr(at, colon - at);
    for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    out.headers[name] = bytes.substr(colon + 2, stop - colon - 2);
    at = stop + 2;
  }
  size_t at = end + 4;
  if (out.headers.contains("transfer-encoding")) {
    for (;;) {
      const size_t line = bytes.find("\r\n", at);
      if (line == std::string::npos) return out;
      const size_t n = std::strtoul(bytes.c_str() + at, nullptr, 16);
      if (bytes.size() < line + 2 + n + 2) return out;
      out.body += bytes.substr(line + 2, n);
      at = line + 2 + n + 2;
      if (n == 0) break;
    }
  } else {
    const size_t n = out.headers.contains("content-length")
                         ? std::strtoul(out.headers["content-length"].c_str(), nullptr, 10)
                         : bytes.size() - at;
    if (bytes.size() < at + n) return out;
    out.body = bytes.substr(at, n);
    at += n;
  }
  bytes.erase(0, at);
  out.complete = true;
  return out;
}

// Sends one request over a connection of its own and reads the whole answer.
inline RawAnswer ask(uint16_t port, const std::string& method, const std::string& target,
                     const std::string& body = "", const std::string& more_headers = "",
                     double within_s = 30) {
  RawClient client(port);
  std::string text =
      method + " " + target + " HTTP/1.1\r\nHost: localhost:" + std::to_string(port) + "\r\n" + more_headers;
  if (!body.empty() || method == "POST")
    text += "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n";
  text += "Connection: close\r\n\r\n" + body;
  client.send(text);
  client.rest(within_s);
  return take_answer(client.received());
}

}  // namespace perigee
