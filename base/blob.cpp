#include "base/blob.h"

#include <xxhash.h>
#include <zstd.h>

#include <bit>
#include <memory>
#include <new>

#include "base/error.h"

namespace perigee {
namespace {

static_assert(std::endian::native == std::endian::little, "the element bytes of a blob are little-endian");

constexpr uint8_t kFormat = 1, kStored = 0, kZstd = 1, kPlain = 0, kPlanes = 1;
constexpr size_t kMaxRawBytes = size_t{1} << 31;
constexpr int kLevel = 1;

// Contexts are kept per thread: making one costs more than compressing a segment.
struct FreeContext {
  void operator()(ZSTD_CCtx* c) const { ZSTD_freeCCtx(c); }
  void operator()(ZSTD_DCtx* d) const { ZSTD_freeDCtx(d); }
};
ZSTD_CCtx* compressor() {
  thread_local std::unique_ptr<ZSTD_CCtx, FreeContext> context(ZSTD_createCCtx());
  if (!context) throw std::bad_alloc();
  return context.get();
}
ZSTD_DCtx* decompressor() {
  thread_local std::unique_ptr<ZSTD_DCtx, FreeContext> context(ZSTD_createDCtx());
  if (!context) throw std::bad_alloc();
  return context.get();
}

template <class T>
void put(uint8_t* at, T value) {
  __builtin_memcpy(at, &value, sizeof value);
}
template <class T>
T get(const uint8_t* at) {
  T value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

uint64_t checksum(const uint8_t* header, std::span<const uint8_t> payload) {
  // The header's first half seeds the hash of the payload: one pass, and both are covered.
  return XXH3_64bits_withSeed(payload.data(), payload.size(), get<uint64_t>(header));
}

void to_planes(const std::byte* in, size_t count, int width, uint8_t* out) {
  for (int b = 0; b < width; ++b)
    for (size_t i = 0; i < count; ++i) *out++ = static_cast<uint8_t>(in[i * width + b]);
}
void from_planes(const uint8_t* in, size_t count, int width, std::byte* out) {
  for (int b = 0; b < width; ++b)
    for (size_t i = 0; i < count; ++i) out[i * width + b] = static_cast<std::byte>(*in++);
}

bool valid_width(int width) {
  return width == 1 || width == 2 || width == 4 || width == 8;
}

}  // namespace

std::string_view blob_status_text(BlobStatus status) {
  switch (status) {
    case BlobStatus::kOk:
      return "sound";
    case BlobStatus::kTooShort:
      return "shorter than its header";
    case BlobStatus::kUnknownFormat:
      return "of an unknown format";
    case BlobStatus::kWrongWidth:
      return "of elements of another size";
    case BlobStatus::kChecksum:
      return "checksum does not match";
    case BlobStatus::kDamaged:
      return "payload does not decode to its count";
  }
  return "?";
}

void encode_blob_bytes(std::span<const std::byte> elements, int width, std::vector<uint8_t>& out) {
  PERIGEE_CHECK(valid_width(width) && elements.size() % width == 0 && elements.size() <= kMaxRawBytes,
                "width {} bytes {}", width, elements.size());
  const size_t raw = elements.size(), count = raw / width;
  thread_local std::vector<uint8_t> planes;
  planes.resize(raw);
  if (raw > 0) to_planes(elements.data(), count, width, planes.data());
  const uint8_t layout = width > 1 ? kPlanes : kPlain;

  out.resize(kBlobHeaderBytes + ZSTD_compressBound(raw));
  const size_t packed = ZSTD_compressCCtx(compressor(), out.data() + kBlobHeaderBytes,
                                          out.size() - kBlobHeaderBytes, planes.data(), raw, kLevel);
  const bool stored = ZSTD_isError(packed) || packed >= raw;
  if (stored && raw > 0) __builtin_memcpy(out.data() + kBlobHeaderBytes, planes.data(), raw);
  out.resize(kBlobHeaderBytes + (stored ? raw : packed));
  out[0] = kFormat;
  out[1] = stored ? kStored : kZstd;
  out[2] = static_cast<uint8_t>(width);
  out[3] = layout;
  put(out.data() + 4, static_cast<uint32_t>(count));
  put(out.data() + 8, checksum(out.data(), std::span<const uint8_t>(out).subspan(kBlobHeaderBytes)));
}

BlobStatus check_blob(std::span<const uint8_t> blob) {
  if (blob.size() < kBlobHeaderBytes) return BlobStatus::kTooShort;
  if (checksum(blob.data(), blob.subspan(kBlobHeaderBytes)) != get<uint64_t>(blob.data() + 8))
    return BlobStatus::kChecksum;
  if (blob[0] != kFormat || blob[1] > kZstd || blob[3] > kPlanes || !valid_width(blob[2]))
    return BlobStatus::kUnknownFormat;
  const size_t raw = size_t{get<uint32_t>(blob.data() + 4)} * blob[2];
  if (raw > kMaxRawBytes) return BlobStatus::kDamaged;
  const std::span<const uint8_t> payload = blob.subspan(kBlobHeaderBytes);
  const unsigned long long content =
      blob[1] == kStored ? payload.size() : ZSTD_getFrameContentSize(payload.data(), payload.size());
  return content == raw ? BlobStatus::kOk : BlobStatus::kDamaged;
}

BlobStatus decode_blob_bytes(std::span<const uint8_t> blob, int width, std::vector<std::byte>& out) {
  if (const BlobStatus status = check_blob(blob); status != BlobStatus::kOk) return status;
  if (blob[2] != width) return BlobStatus::kWrongWidth;
  const size_t count = get<uint32_t>(blob.data() + 4), raw = count * width;
  std::span<const uint8_t> planes = blob.subspan(kBlobHeaderBytes);
  thread_local std::vector<uint8_t> unpacked;
  if (blob[1] == kZstd) {
    unpacked.resize(raw);
    const size_t n = ZSTD_decompressDCtx(decompressor(), unpacked.data(), raw, planes.data(), planes.size());
    if (ZSTD_isError(n) || n != raw) return BlobStatus::kDamaged;
    planes = unpacked;
  }
  out.resize(raw);
  if (raw == 0) return BlobStatus::kOk;
  if (blob[3] == kPlanes)
    from_planes(planes.data(), count, width, out.data());
  else
    __builtin_memcpy(out.data(), planes.data(), raw);
  return BlobStatus::kOk;
}

}  // namespace perigee
