#include "agents/session/snapshot_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "base/file.h"

namespace perigee::agents {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they lie in memory");

constexpr std::string_view kMagic = "perisnap";
constexpr uint32_t kFormat = 1;

struct Header {
  char magic[8];
  uint32_t format, weights_version;
  int64_t position, bytes;
  Hash128 model, tokens, payload;
  uint64_t checksum;
};
static_assert(sizeof(Header) == kSnapshotHeaderBytes);

uint64_t checksum_of(const Header& h) {
  return XXH3_64bits(&h, offsetof(Header, checksum));
}

// A read-only descriptor; files here are small enough for one read, and are not ours to map: they may vanish.
class File {
 public:
  explicit File(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int64_t size() const {
    struct stat s;
    return fd_ >= 0 && ::fstat(fd_, &s) == 0 && S_ISREG(s.st_mode) ? static_cast<int64_t>(s.st_size) : -1;
  }
  bool read(void* to, int64_t bytes) {
    auto* p = static_cast<char*>(to);
    while (bytes > 0) {
      const ssize_t n = ::read(fd_, p, static_cast<size_t>(bytes));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      p += n;
      bytes -= n;
    }
    return true;
  }

 private:
  int fd_;
};

}  // namespace

void write_snapshot(const std::string& path, const policy::Snapshot& snapshot,
                    std::span<const int32_t> tokens, const Hash128& model, uint32_t weights_version) {
  PERIGEE_CHECK(snapshot.position <= static_cast<int64_t>(tokens.size()), "{} of {} tokens",
                snapshot.position, tokens.size());
  Header h = {};
  std::memcpy(h.magic, kMagic.data(), kMagic.size());
  h.format = kFormat;
  h.weights_version = weights_version;
  h.position = snapshot.position;
  h.bytes = static_cast<int64_t>(snapshot.bytes.size());
  h.model = model;
  h.tokens = hash128(tokens.first(static_cast<size_t>(snapshot.position)));
  h.payload = hash128(std::span<const std::byte>(snapshot.bytes));
  h.checksum = checksum_of(h);
  AtomicFile file(path);
  file.write(&h, sizeof h);
  file.write(snapshot.bytes.data(), snapshot.bytes.size());
  file.commit();
}

SnapshotRead read_snapshot(const std::string& path, std::span<const int32_t> tokens, const Hash128& model) {
  File file(path);
  const int64_t size = file.size();
  if (size < 0) return {{}, "it can not be opened"};
  Header h;
  if (size < kSnapshotHeaderBytes || !file.read(&h, sizeof h)) return {{}, "it is too short"};
  if (std::memcmp(h.magic, kMagic.data(), kMagic.size()) != 0) return {{}, "it is not a snapshot"};
  if (h.checksum != checksum_of(h)) return {{}, "its header is damaged"};
  if (h.format != kFormat)
    return {{}, "it is of format " + std::to_string(h.format) + ", this program reads 1"};
  if (h.model != model) return {{}, "it is of another model"};
  if (h.bytes != size - kSnapshotHeaderBytes) return {{}, "it is cut short or longer than it says"};
  if (h.position < 0 || h.position >= static_cast<int64_t>(tokens.size()) ||
      h.tokens != hash128(tokens.first(static_cast<size_t>(h.position))))
    return {{}, "it is of other tokens"};
  policy::Snapshot snapshot;
  snapshot.position = h.position;
  snapshot.bytes.resize(static_cast<size_t>(h.bytes));
  if (!file.read(snapshot.bytes.data(), h.bytes)) return {{}, "it can not be read"};
  if (h.payload != hash128(std::span<const std::byte>(snapshot.bytes))) return {{}, "its payload is damaged"};
  return {std::move(snapshot), {}};
}

}  // namespace perigee::agents
