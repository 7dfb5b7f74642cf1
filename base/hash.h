// XXH3-128 of memory, the hash that names weights, tool outputs and files throughout. Not cryptographic: it
// finds damage and differences, it does not stop someone who wants to collide.
#pragma once
#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>

namespace perigee {

struct Hash128 {
  uint64_t high = 0, low = 0;

  bool operator==(const Hash128&) const = default;
  // 32 lower-case hex digits, high word first: what `xxhsum -H128` prints.
  std::string hex() const {
    constexpr char digits[] = "0123456789abcdef";
    std::string text(32, '0');
    for (int i = 0; i < 16; ++i) {
      text[15 - i] = digits[(high >> (4 * i)) & 15];
      text[31 - i] = digits[(low >> (4 * i)) & 15];
    }
    return text;
  }
};

inline Hash128 hash128(const void* data, size_t bytes) {
  const XXH128_hash_t h = XXH3_128bits(data, bytes);
  return {h.high64, h.low64};
}
template <class T>
Hash128 hash128(std::span<const T> values) {
  static_assert(std::is_trivially_copyable_v<T>);
  return hash128(values.data(), values.size_bytes());
}
inline Hash128 hash128(std::string_view text) {
  return hash128(text.data(), text.size());
}
inline std::string hash_hex(std::string_view text) {
  return hash128(text).hex();
}

// The same hash over pieces: how they are cut does not matter.
class Hasher {
 public:
  Hasher() : state_(XXH3_createState()) {
    if (!state_) throw std::bad_alloc();
    XXH3_128bits_reset(state_.get());
  }
  void update(const void* data, size_t bytes) {
    if (bytes > 0) XXH3_128bits_update(state_.get(), data, bytes);
  }
  void update(std::string_view text) { update(text.data(), text.size()); }
  Hash128 digest() const {
    const XXH128_hash_t h = XXH3_128bits_digest(state_.get());
    return {h.high64, h.low64};
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

}  // namespace perigee
