// Arrays as self-describing, compressed, checksummed bytes: how tokens, log-probabilities and versions lie
// on disk.
//
//   offset size
//   0      1    format, 1
//   1      1    codec: 0 stored, 1 zstd
//   2      1    bytes of an element: 1, 2, 4 or 8
//   3      1    layout: 0 as they are, 1 planes (all first bytes of the elements, then all second bytes, ...)
//   4      4    number of elements, little-endian
//   8      8    XXH3-64 of the payload, seeded with bytes 0..7 as a little-endian number; little-endian
//   16     ...  payload: the elements, little-endian, in that layout, under that codec
//
// The checksum is of the bytes as stored, so any changed byte is found before the decompressor sees it.
// Planes make small integers and floats of like size compress better: their high bytes lie together. An
// encoding is a pure function of the elements and the version of zstd. Thread-safe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace perigee {

constexpr size_t kBlobHeaderBytes = 16;

enum class BlobStatus : uint8_t {
  kOk,
  kTooShort,       // fewer bytes than a header
  kUnknownFormat,  // format, codec or layout of a later version
  kWrongWidth,     // elements of another size than asked for
  kChecksum,       // a byte changed since it was written, or bytes are missing or added
  kDamaged,        // the checksum holds and yet the payload does not decode to its count: written wrongly
};
// As part of a sentence: "checksum does not match".
std::string_view blob_status_text(BlobStatus);

// Appends nothing to and keeps nothing of out but its capacity.
// REQUIRES width 1, 2, 4 or 8, and at most 2^31 bytes.
void encode_blob_bytes(std::span<const std::byte> elements, int width, std::vector<uint8_t>& out);
BlobStatus decode_blob_bytes(std::span<const uint8_t> blob, int width, std::vector<std::byte>& out);
// Checks all that can be checked without decoding.
BlobStatus check_blob(std::span<const uint8_t> blob);

template <class T>
std::vector<uint8_t> encode_blob(std::span<const T> elements) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<uint8_t> out;
  encode_blob_bytes(std::as_bytes(elements), sizeof(T), out);
  return out;
}
template <class T>
std::vector<uint8_t> encode_blob(const std::vector<T>& elements) {
  return encode_blob(std::span<const T>(elements));
}
// out is what it was when the status is not kOk.
template <class T>
BlobStatus decode_blob(std::span<const uint8_t> blob, std::vector<T>& out) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<std::byte> bytes;
  const BlobStatus status = decode_blob_bytes(blob, sizeof(T), bytes);
  if (status != BlobStatus::kOk) return status;
  out.resize(bytes.size() / sizeof(T));
  if (!bytes.empty()) __builtin_memcpy(out.data(), bytes.data(), bytes.size());
  return status;
}

}  // namespace perigee
