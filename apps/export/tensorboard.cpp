#include "apps/export/tensorboard.h"

#include <array>
#include <bit>
#include <map>

namespace perigee::apps {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? c >> 1 ^ 0x82f63b78u : c >> 1;
    table[i] = c;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kTable = make_table();

template <class Word>
std::string little_endian(Word value) {
  std::string out;
  for (size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i));
  return out;
}

std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}

// Fields of a message, by their wire types.
std::string fixed64(int field, double value) {
  return varint(static_cast<uint64_t>(field) << 3 | 1) + little_endian(std::bit_cast<uint64_t>(value));
}
std::string fixed32(int field, float value) {
  return varint(static_cast<uint64_t>(field) << 3 | 5) + little_endian(std::bit_cast<uint32_t>(value));
}
std::string integer(int field, int64_t value) {
  return varint(static_cast<uint64_t>(field) << 3) + varint(static_cast<uint64_t>(value));
}
std::string bytes(int field, std::string_view value) {
  return varint(static_cast<uint64_t>(field) << 3 | 2) + varint(value.size()) + std::string(value);
}

uint32_t masked(std::string_view data) {
  const uint32_t crc = crc32c(data);
  return std::rotr(crc, 15) + 0xa282ead8u;
}

std::string record(const std::string& event) {
  const std::string length = little_endian(uint64_t{event.size()});
  return length + little_endian(masked(length)) + event + little_endian(masked(event));
}

}  // namespace

uint32_t crc32c(std::string_view data) {
  uint32_t crc = ~0u;
  for (const char c : data) crc = kTable[(crc ^ static_cast<uint8_t>(c)) & 0xff] ^ crc >> 8;
  return ~crc;
}

std::string tensorboard_header(double wall_time) { return record(fixed64(1, wall_time) + bytes(3, "brain.Event:2")); }

std::string tensorboard_scalar(double wall_time, int64_t step, std::string_view tag, double value) {
  const std::string scalar = bytes(1, tag) + fixed32(2, static_cast<float>(value));
  return record(fixed64(1, wall_time) + integer(2, step) + bytes(5, bytes(1, scalar)));
}

std::string tensorboard_events(StoreQueries& store, const std::string& run_id) {
  const auto seconds = [](int64_t us) { return static_cast<double>(us) / 1e6; };
  double now = seconds(store.run(run_id).created_us);
  std::string out = tensorboard_header(now);
  std::map<std::pair<std::string, int64_t>, double> times;
  for (const PolicyVersion& v : store.versions(run_id)) times[{v.phase, v.step}] = seconds(v.created_us);
  for (const StepMetrics& m : store.metrics(run_id)) {
    // A step that changed no weights has no time of its own.
    if (const auto it = times.find({m.phase, m.step}); it != times.end()) now = it->second;
    for (const auto& [name, value] : m.values) out += tensorboard_scalar(now, m.step, m.phase + "/" + name, value);
  }
  for (const Evaluation& e : store.evaluations(run_id))
    out += tensorboard_scalar(seconds(e.created_us), e.step, (e.phase == "rl" ? "eval/" : "eval-" + e.phase + "/") + e.name,
                              e.accuracy);
  return out;
}

}  // namespace perigee::apps
