#include "rollout/weights/base_weights.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "policy/device/initialize.h"
#include "policy/device/transfer.h"
#include "rollout/setup/run_model.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {
namespace {

constexpr size_t kMostBytes = 4096;  // of a packet

struct Descriptor {
  int fd = -1;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  int take() { return std::exchange(fd, -1); }
};

std::string socket_path(const std::string& run_dir) { return net::ipc_endpoint(run_dir + "/sockets", "base").substr(6); }

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  PERIGEE_CHECK(path.size() < sizeof address.sun_path, "{}", path);
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

// One packet, with a descriptor when it is not negative.
bool send_packet(int socket, const std::string& text, int descriptor) {
  iovec part{const_cast<char*>(text.data()), text.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (descriptor >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(head), &descriptor, sizeof descriptor);
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
}

std::optional<std::string> receive_packet(int socket, Descriptor& descriptor) {
  std::string text(kMostBytes, '\0');
  iovec part{text.data(), text.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (n <= 0) return std::nullopt;
  const cmsghdr* head = CMSG_FIRSTHDR(&message);
  if (head != nullptr && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
    std::memcpy(&descriptor.fd, CMSG_DATA(head), sizeof(int));
  text.resize(static_cast<size_t>(n));
  return text;
}

bool same_user(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == ::geteuid();
}

void limit_waiting(int socket) {
  const timeval limit{5, 0};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

Json header_of(const BaseNotice& n) { return {{"bytes", n.bytes}, {"fingerprint", n.fingerprint}}; }

std::optional<BaseNotice> notice_of(const Json& header) {
  const auto bytes = field<int64_t>(header, "bytes");
  const auto fingerprint = field<std::string>(header, "fingerprint");
  if (!bytes || !fingerprint) return std::nullopt;
  return BaseNotice{*bytes, *fingerprint};
}

// One question to the keeper.
Json ask(const std::string& run_dir, const Json& question, int sent, Descriptor& received) {
  const std::string path = socket_path(run_dir);
  Descriptor connection{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  const sockaddr_un address = address_of(path);
  if (connection.fd < 0 || ::connect(connection.fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    throw_environment("{}: nobody keeps the model of this run there: {}", path, std::strerror(errno));
  limit_waiting(connection.fd);
  std::optional<std::string> answer;
  if (send_packet(connection.fd, question.dump(), sent)) answer = receive_packet(connection.fd, received);
  if (!answer) throw_environment("{}: the keeper of the run's model does not answer", path);
  return Json::parse(*answer, nullptr, false);
}

}  // namespace

policy::ResidentWeights make_base(const RunConfig& config, const policy::ParamLayout& layout, kernels::Device* device) {
  auto weights = policy::ResidentWeights::create(device, layout.weight_bytes());
  if (device != nullptr && !config.model.path.empty()) {
    policy::device_load(*device, layout, config.model.path, weights.writable());
  } else if (device != nullptr && layout.matrices() == policy::MatrixForm::kTiles) {
    policy::device_initialize(*device, layout, config.seed(), weights.writable());
  } else if (device == nullptr) {
    layout.flat_to_weights(initial_weights(config, layout).data(), weights.writable());
  } else {
    // Panels: the bits of the CPU.
    std::vector<std::byte> arena(static_cast<size_t>(layout.weight_bytes()));
    layout.flat_to_weights(initial_weights(config, layout).data(), arena.data());
    device->copy_in(weights.writable(), arena.data(), layout.weight_bytes());
  }
  if (device != nullptr) device->synchronize();
  return weights;
}

policy::BaseReference base_reference(const RunConfig& config, const policy::ParamLayout& layout, std::string fingerprint) {
  policy::BaseReference reference;
  if (config.model.path.empty())
    reference.model = {{"seed", config.run.seed},
                       {"made_on", layout.matrices() == policy::MatrixForm::kTiles ? "cuda" : "cpu"}};
  else
    reference.model = {{"path", config.model.path}};
  reference.dtype = config.model.dtype;
  reference.fingerprint = std::move(fingerprint);
  return reference;
}

BaseKeeper::BaseKeeper(const std::string& run_dir) : path_(socket_path(run_dir)) {
  ::unlink(path_.c_str());
  const sockaddr_un address = address_of(path_);
  listening_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  wake_ = ::eventfd(0, EFD_CLOEXEC);
  if (listening_ < 0 || wake_ < 0 || ::bind(listening_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(listening_, 64) != 0) {
    const int error = errno;
    if (listening_ >= 0) ::close(listening_);
    if (wake_ >= 0) ::close(wake_);
    throw_environment("{}: cannot listen there: {}", path_, std::strerror(error));
  }
  thread_ = std::thread([this] { serve(); });
}

BaseKeeper::~BaseKeeper() {
  const uint64_t one = 1;
  if (::write(wake_, &one, sizeof one) == sizeof one) thread_.join();
  ::close(listening_);
  ::close(wake_);
  ::unlink(path_.c_str());
  if (descriptor_ >= 0) ::close(descriptor_);
}

void BaseKeeper::serve() {
  for (;;) {
    pollfd both[2] = {{listening_, POLLIN, 0}, {wake_, POLLIN, 0}};
    if (::poll(both, 2, -1) < 0 && errno != EINTR) return;
    if (both[1].revents != 0) return;
    if (both[0].revents == 0) continue;
    Descriptor connection{::accept4(listening_, nullptr, nullptr, SOCK_CLOEXEC)};
    if (connection.fd >= 0 && same_user(connection.fd)) answer(connection.fd);
  }
}

void BaseKeeper::answer(int connection) {
  limit_waiting(connection);
  Descriptor offered;
  const auto text = receive_packet(connection, offered);
  if (!text) return;
  const Json question = Json::parse(*text, nullptr, false);
  // The first one stays: those that map it agree about it.
  if (question.is_object() && offered.fd >= 0 && descriptor_ < 0) {
    if (const auto notice = notice_of(question)) {
      notice_ = *notice;
      descriptor_ = offered.take();
    }
  }
  send_packet(connection, descriptor_ >= 0 ? header_of(notice_).dump() : "{}", descriptor_);
}

std::optional<SharedBase> ask_for_base(const std::string& run_dir, kernels::Device* device, int64_t bytes) {
  Descriptor received;
  const auto notice = notice_of(ask(run_dir, Json::object(), -1, received));
  if (!notice || received.fd < 0) return std::nullopt;
  if (notice->bytes != bytes)
    throw_environment("the run's model has {} bytes, not {}: the roles disagree about it", notice->bytes, bytes);
  return SharedBase{policy::ResidentWeights::map(device, received.take(), bytes), notice->fingerprint};
}

std::optional<SharedBase> wait_for_base(const std::string& run_dir, kernels::Device* device, int64_t bytes,
                                        std::stop_token stop) {
  for (;;) {
    if (auto base = ask_for_base(run_dir, device, bytes)) return base;
    if (stop.stop_requested()) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

void offer_base(const RunConfig& config, const std::string& run_dir) {
  Descriptor held;
  if (notice_of(ask(run_dir, Json::object(), -1, held))) return;
  const auto start = std::chrono::steady_clock::now();
  const auto layout = make_layout(config);
  std::unique_ptr<kernels::Device> device;
  if (config.run.device == "cuda") device = std::make_unique<kernels::Device>(0, int64_t{1} << 20);
  const auto weights = make_base(config, *layout, device.get());
  const int64_t bytes = layout->weight_bytes();
  const BaseNotice notice{bytes, device ? policy::weights_fingerprint(*device, weights.data(), bytes)
                                        : policy::weights_fingerprint(weights.data(), bytes)};
  Descriptor answered;
  ask(run_dir, header_of(notice), weights.descriptor(), answered);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::fputs(fmt::format("{} MiB of weights, fingerprint {}, {} in {:.1f} s\n", bytes >> 20, notice.fingerprint,
                         config.model.path.empty() ? "made" : "loaded", seconds)
                 .c_str(),
             stderr);
}

}  // namespace perigee::rollout
