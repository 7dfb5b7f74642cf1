#include "policy/weights/safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <set>
#include <tuple>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is read in place");

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's limit
constexpr size_t kMaxRank = 16;
constexpr const char* kMetadataKey = "__metadata__";

struct TypeInfo {
  TensorType type;
  const char* name;
  int64_t bytes;
};
constexpr TypeInfo kTypes[] = {{TensorType::kF32, "F32", 4},
                               {TensorType::kBf16, "BF16", 2},
                               {TensorType::kF16, "F16", 2},
                               {TensorType::kI32, "I32", 4},
                               {TensorType::kI64, "I64", 8}};

const TypeInfo& info(TensorType type) {
  return kTypes[static_cast<size_t>(type)];
}

template <class T>
T load(const std::byte* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// IEEE binary16, exactly.
float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1Fu,
                 mantissa = h & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormal
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent - 15 + 127;
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

// Reads one tensor's entry; offsets are checked against data_bytes, order and cover later.
struct Entry {
  TensorView view;
  uint64_t begin = 0, end = 0;
};

Entry read_entry(const std::string& path, const std::string& name, const json& value, uint64_t data_bytes) {
  const auto fail = [&](std::string_view what) {
    throw_input("{}: tensor {}: {}", path, quote(name, 120), what);
  };
  if (!value.is_object() || value.size() != 3 || !value.contains("dtype") || !value.contains("shape") ||
      !value.contains("data_offsets"))
    fail("its header is not {\"dtype\", \"shape\", \"data_offsets\"}");
  Entry e;
  e.view.name = name;
  const json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                  [&](const TypeInfo& t) { return dtype == json(t.name); });
  if (type == std::end(kTypes))
    fail(fmt::format("dtype {} is not supported; F32, BF16, F16, I32 and I64 are", json_brief(dtype)));
  e.view.type = type->type;
  if (!shape.is_array() || shape.size() > kMaxRank)
    fail(fmt::format("shape {} is not a list of sizes", json_brief(shape)));
  // Zero-sized dimensions make any other size harmless, but sizes are bounded first so that no product
  // overflows.
  uint64_t elements = 1;
  for (const json& d : shape) {
    if (!d.is_number_unsigned() || d.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
      fail(fmt::format("shape {} is not a list of sizes", json_brief(shape)));
    const uint64_t size = d.get<uint64_t>();
    if (__builtin_mul_overflow(elements, size, &elements) || elements > static_cast<uint64_t>(INT64_MAX) / 16)
      fail(fmt::format("shape {} overflows", json_brief(shape)));
    e.view.shape.push_back(static_cast<int64_t>(size));
  }
  e.view.elements = static_cast<int64_t>(elements);
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned())
    fail(fmt::format("data_offsets {} is not [begin, end]", json_brief(offsets)));
  e.begin = offsets[0].get<uint64_t>();
  e.end = offsets[1].get<uint64_t>();
  if (e.begin > e.end || e.end > data_bytes)
    fail(fmt::format("data_offsets {} reach outside the {} bytes of data; the file is truncated or corrupt",
                     json_brief(offsets), data_bytes));
  if (e.end - e.begin != elements * static_cast<uint64_t>(type->bytes))
    fail(fmt::format("{} {} needs {} bytes, but data_offsets {} hold {}", type->name,
                     shape_text(e.view.shape), elements * static_cast<uint64_t>(type->bytes),
                     json_brief(offsets), e.end - e.begin));
  return e;
}

std::map<std::string, std::string> read_metadata(const std::string& path, const json& value) {
  if (!value.is_object()) throw_input("{}: __metadata__ is not an object of texts", path);
  std::map<std::string, std::string> out;
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) throw_input("{}: __metadata__: {} is not a text", path, quote(key));
    out[key] = text.get<std::string>();
  }
  return out;
}

}  // namespace

int64_t tensor_type_bytes(TensorType type) {
  return info(type).bytes;
}
const char* tensor_type_name(TensorType type) {
  return info(type).name;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += fmt::format("{}{}", i > 0 ? ", " : "", shape[i]);
  return out + "]";
}

void to_float32(const TensorView& t, int64_t begin, int64_t count, float* out) {
  PERIGEE_CHECK(begin >= 0 && count >= 0 && begin <= t.elements - count, "{} + {} of {}", begin, count,
                t.elements);
  if (count == 0) return;
  const std::byte* p = t.data + begin * tensor_type_bytes(t.type);
  switch (t.type) {
    case TensorType::kF32:
      std::memcpy(out, p, static_cast<size_t>(count) * 4);
      return;
    case TensorType::kBf16:
      for (int64_t i = 0; i < count; ++i)
        out[i] = std::bit_cast<float>(static_cast<uint32_t>(load<uint16_t>(p + 2 * i)) << 16);
      return;
    case TensorType::kF16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_f16(load<uint16_t>(p + 2 * i));
      return;
    case TensorType::kI32:
    case TensorType::kI64:
      throw_input("{}: tensor {}: {} where floating point is expected", t.file, quote(t.name, 120),
                  tensor_type_name(t.type));
  }
}

std::vector<float> to_float32(const TensorView& t) {
  std::vector<float> out(static_cast<size_t>(t.elements));
  to_float32(t, 0, t.elements, out.data());
  return out;
}

std::vector<int64_t> to_int64(const TensorView& t) {
  std::vector<int64_t> out(static_cast<size_t>(t.elements));
  if (t.type != TensorType::kI32 && t.type != TensorType::kI64)
    throw_input("{}: tensor {}: {} where integers are expected", t.file, quote(t.name, 120),
                tensor_type_name(t.type));
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = t.type == TensorType::kI64 ? load<int64_t>(t.data + 8 * i) : load<int32_t>(t.data + 4 * i);
  return out;
}

std::optional<int64_t> first_non_finite(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(x[i])) return i;
  return std::nullopt;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(std::make_unique<std::string>(path)), map_(path) {
  if (map_.size() < 8)
    throw_input("{}: not a safetensors file: {} bytes; it is truncated", path, map_.size());
  const uint64_t header_bytes = load<uint64_t>(map_.data());
  if (header_bytes > kMaxHeaderBytes)
    throw_input("{}: not a safetensors file: its header would have {} bytes", path, header_bytes);
  if (header_bytes > map_.size() - 8)
    throw_input("{}: the header has {} bytes, the file only {}; it is truncated", path, header_bytes,
                map_.size());
  const std::string_view text(reinterpret_cast<const char*>(map_.data()) + 8, header_bytes);
  if (!text.starts_with('{'))
    throw_input("{}: not a safetensors file: its header does not start with '{{'", path);
  const json header = parse_json(text, path, {.comments = false, .max_depth = 4});
  const std::byte* data = map_.data() + 8 + header_bytes;
  const uint64_t data_bytes = map_.size() - 8 - header_bytes;

  std::vector<Entry> entries;
  entries.reserve(header.size());
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadataKey)
      metadata_ = read_metadata(path, value);
    else
      entries.push_back(read_entry(path, name, value, data_bytes));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.view.name) < std::tie(b.begin, b.end, b.view.name);
  });
  uint64_t covered = 0;
  for (Entry& e : entries) {
    if (e.begin != covered)
      throw_input(
          "{}: tensor {}: its data starts at {}, {} the end of what comes before it ({}); the file is "
          "corrupt",
          path, quote(e.view.name, 120), e.begin, e.begin < covered ? "before" : "after", covered);
    covered = e.end;
    e.view.data = data + e.begin;
    e.view.file = *path_;
    tensors_.push_back(std::move(e.view));
  }
  if (covered != data_bytes)
    throw_input("{}: {} bytes of data belong to no tensor; the file is corrupt", path, data_bytes - covered);
  for (size_t i = 0; i < tensors_.size(); ++i) index_.emplace(tensors_[i].name, i);
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

int64_t TensorSpec::elements() const {
  int64_t n = 1;
  for (int64_t d : shape) {
    PERIGEE_CHECK(d >= 0, "tensor {} dimension {}", name, d);
    PERIGEE_CHECK(!__builtin_mul_overflow(n, d, &n), "tensor {} shape {}", name, shape_text(shape));
  }
  return n;
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::span<const TensorSpec> specs,
                                     const std::map<std::string, std::string>& metadata)
    : file_(path) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  // ordered_json searches from the front for each key, so distinctness is checked apart and entries are
  // appended.
  auto& object = header.get_ref<nlohmann::ordered_json::object_t&>();
  std::set<std::string_view> names{kMetadataKey};
  for (const TensorSpec& s : specs) {
    PERIGEE_CHECK(names.insert(s.name).second, "tensor {} twice", s.name);
    object.push_back({s.name,
                      {{"dtype", tensor_type_name(s.type)},
                       {"shape", s.shape},
                       {"data_offsets", {remaining_, remaining_ + s.bytes()}}}});
    remaining_ += s.bytes();
  }
  std::string text = header.dump();
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');  // the data starts at a multiple of 64
  const uint64_t header_bytes = text.size();
  file_.write(&header_bytes, 8);
  file_.write(text);
}

void SafetensorsWriter::write(const void* data, int64_t bytes) {
  PERIGEE_CHECK(bytes >= 0 && bytes <= remaining_, "{} bytes, {} remain", bytes, remaining_);
  file_.write(data, static_cast<size_t>(bytes));
  remaining_ -= bytes;
}

void SafetensorsWriter::write_float32(const float* x, int64_t count, TensorType type) {
  if (type == TensorType::kF32) return write(x, count * 4);
  PERIGEE_CHECK(type == TensorType::kBf16, "{}", tensor_type_name(type));
  uint16_t piece[4096];
  for (int64_t done = 0; done < count;) {
    const int64_t n = std::min<int64_t>(count - done, std::ssize(piece));
    for (int64_t i = 0; i < n; ++i) piece[i] = kernels::to_bf16(x[done + i]);
    write(piece, n * 2);
    done += n;
  }
}

void SafetensorsWriter::commit() {
  PERIGEE_CHECK(remaining_ == 0, "{} bytes remain", remaining_);
  file_.commit();
}

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSpec> specs;
  for (const NamedTensor& t : tensors) specs.push_back(t.spec);
  SafetensorsWriter out(path, specs, metadata);
  for (const NamedTensor& t : tensors) out.write(t.data, t.spec.bytes());
  out.commit();
}

}  // namespace perigee::policy
