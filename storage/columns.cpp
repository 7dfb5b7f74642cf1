#include "storage/columns.h"

#include <bit>
#include <cstring>

namespace perigee::storage {

Segment segment_row(Database& db, Query& q) {
  Segment s;
  s.episode_id = q.int64(0);
  s.index = q.int32(1);
  s.attempt = q.int32(2);
  s.finish = finish_column(db, q.text(3));
  const auto place = [&](const char* column) {
    return [&s, column] { return fmt::format("episode {}, segment {}, {}", s.episode_id, s.index, column); };
  };
  s.tokens = decode_column<int32_t>(db, q.blob(5), place("tokens"));
  s.logprobs = decode_column<float>(db, q.blob(6), place("logprobs"));
  s.versions = decode_column<uint32_t>(db, q.blob(7), place("versions"));
  if (!q.is_null(8)) s.mask = decode_column<uint8_t>(db, q.blob(8), place("mask"));
  const size_t n = s.tokens.size();
  if (static_cast<int64_t>(n) != q.int64(4) || s.logprobs.size() != n || s.versions.size() != n ||
      (!s.mask.empty() && s.mask.size() != n))
    throw_environment("{}: {}: the arrays differ in length: the file was altered", db.file().string(),
                      place("tokens")());
  return s;
}

std::vector<ToolEvent> load_tools(Database& db, int64_t episode_id, int32_t segment_index) {
  Query q = db.query(
      "SELECT turn, started_us, duration_us, name, input, output, status, digest FROM tool_events "
      "WHERE episode_id = ? AND segment_index = ? ORDER BY position");
  q.with(episode_id, segment_index);
  std::vector<ToolEvent> tools;
  while (q.step())
    tools.push_back({q.int32(0), q.int64(1), q.int64(2), q.str(3), std::string(bytes_text(q.blob(4))),
                     std::string(bytes_text(q.blob(5))), q.str(6), q.str(7)});
  return tools;
}

std::vector<Segment> load_segments(Database& db, int64_t episode_id) {
  Query q = db.query(
      "SELECT episode_id, segment_index, attempt, finish, token_count, tokens, logprobs, versions, mask "
      "FROM segments WHERE episode_id = ? ORDER BY segment_index");
  q.bind(episode_id);
  std::vector<Segment> segments;
  while (q.step()) {
    segments.push_back(segment_row(db, q));
    segments.back().tools = load_tools(db, episode_id, segments.back().index);
  }
  return segments;
}

std::vector<RewardComponent> load_components(Database& db, int64_t episode_id) {
  Query q = db.query(
      "SELECT name, value_bits, weight_bits, status, detail FROM reward_components WHERE episode_id = ? "
      "ORDER BY position");
  q.bind(episode_id);
  std::vector<RewardComponent> components;
  while (q.step()) components.push_back({q.str(0), q.exact(1), q.exact(2), q.str(3), q.str(4)});
  return components;
}

bool same_bits(const Segment& a, const Segment& b) {
  return a.episode_id == b.episode_id && a.attempt == b.attempt && a.index == b.index &&
         a.finish == b.finish && a.tokens == b.tokens && a.versions == b.versions && a.mask == b.mask &&
         a.tools == b.tools && a.logprobs.size() == b.logprobs.size() &&
         (a.logprobs.empty() ||
          std::memcmp(a.logprobs.data(), b.logprobs.data(), a.logprobs.size() * sizeof(float)) == 0);
}

namespace {
bool same(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}
}  // namespace

bool same_bits(const Reward& a, const Reward& b) {
  if (a.episode_id != b.episode_id || !same(a.total, b.total) || a.failed != b.failed ||
      a.components.size() != b.components.size())
    return false;
  for (size_t i = 0; i < a.components.size(); ++i) {
    const RewardComponent &x = a.components[i], &y = b.components[i];
    if (x.name != y.name || !same(x.value, y.value) || !same(x.weight, y.weight) || x.status != y.status ||
        x.detail != y.detail)
      return false;
  }
  return true;
}

}  // namespace perigee::storage
