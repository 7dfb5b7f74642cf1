#include "apps/inspect/api.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "apps/inspect/wire.h"
#include "apps/runs/run_metrics.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps::inspect {
namespace {

using nlohmann::json;

constexpr int64_t kPoints = 1500;  // of a curve: more than a screen is wide
constexpr size_t kConfigBytes = 256 << 10;

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

std::string unescape(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '+') {
      out += ' ';
    } else if (text[i] != '%') {
      out += text[i];
    } else {
      const int high = i + 2 < text.size() ? hex_digit(text[i + 1]) : -1,
                low = i + 2 < text.size() ? hex_digit(text[i + 2]) : -1;
      if (high < 0 || low < 0) throw_input("the address holds a % that is no escape");
      out += static_cast<char>(high * 16 + low);
      i += 2;
    }
  }
  return out;
}

// The curves of one phase, a point for each step or, of long runs, for each `every` steps: their mean.
json curves(const std::vector<StepMetrics>& rows, size_t begin, size_t end) {
  std::map<std::string, std::vector<std::pair<double, int64_t>>> sums;  // by name: of each point
  const int64_t every = (static_cast<int64_t>(end - begin) + kPoints - 1) / kPoints;
  json steps = json::array();
  size_t points = 0;
  for (size_t i = begin; i < end; ++i) {
    const size_t point = (i - begin) / static_cast<size_t>(every);
    if (point == points) {
      ++points;
      steps.push_back(rows[i].step);
    } else {
      steps.back() = rows[i].step;
    }
    for (const auto& [name, value] : rows[i].values) {
      auto& curve = sums[name];
      curve.resize(points);
      if (!std::isfinite(value)) continue;
      curve[point].first += value;
      ++curve[point].second;
    }
  }
  json series = json::object();
  for (auto& [name, curve] : sums) {
    curve.resize(points);
    json values = json::array();
    for (const auto& [sum, n] : curve)
      values.push_back(n > 0 ? json(sum / static_cast<double>(n)) : json(nullptr));
    series[name] = std::move(values);
  }
  return {{"phase", rows[begin].phase},
          {"every", every},
          {"steps", std::move(steps)},
          {"series", std::move(series)}};
}

}  // namespace

Params::Params(std::string_view query) {
  while (!query.empty()) {
    const std::string_view part = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(part.size() + 1, query.size()));
    if (part.empty()) continue;
    const size_t equals = std::min(part.find('='), part.size());
    const std::string name = unescape(part.substr(0, equals));
    if (!values_.emplace(name, unescape(part.substr(std::min(equals + 1, part.size())))).second)
      throw_input("{} stands in the address twice", quote(name));
  }
}

std::string Params::text(const std::string& name) const {
  const auto found = values_.find(name);
  return found == values_.end() ? "" : found->second;
}

int64_t Params::integer(const std::string& name, int64_t lo, int64_t hi,
                        std::optional<int64_t> absent) const {
  const std::string value = text(name);
  if (value.empty() && absent) return *absent;
  int64_t out = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), out);
  if (error != std::errc{} || end != value.data() + value.size() || out < lo || out > hi)
    throw_input("{} {}: a whole number from {} to {} is expected", name, quote(value), lo, hi);
  return out;
}

void Params::expect(std::initializer_list<std::string_view> names) const {
  for (const auto& [name, value] : values_)
    if (std::find(names.begin(), names.end(), name) == names.end())
      throw_input("{} is not asked for here", quote(name));
}

std::optional<json> Api::get(std::string_view path, const Params& params, Readers& readers) {
  if (path == "runs") return params.expect({}), list_runs(readers);
  if (path == "changes") return params.expect({}), changes();
  if (path == "run") return run(params, readers);
  if (path == "metrics") return metrics(params, readers);
  if (path == "episodes") return episodes(params, readers);
  if (path == "count") return count(params, readers);
  if (path == "episode") return episode(params, readers);
  if (path == "tokens") return tokens(params, readers);
  if (path == "text") return text(params, readers);
  if (path == "siblings") return siblings(params, readers);
  if (path == "job") return params.expect({"job"}), jobs_.view(params.integer("job", 1, INT64_MAX));
  return std::nullopt;
}

// What the page begins with, and what `perigee inspect` without a run lists.
json Api::list_runs(Readers& readers) {
  json out = json::array();
  for (const OpenRun& run : runs_.list()) {
    json row = {{"key", run.key},
                {"directory", wire_text(run.place.directory.string())},
                {"id", wire_text(run.place.id)}};
    try {
      StoreReader& store = readers.of(run);
      const RunRecord record = store.run(run.place.id);
      row.update({{"state", record.state},
                  {"created_us", record.created_us},
                  {"parent", wire_text(record.parent)},
                  {"note", wire_text(store.note())},
                  {"phase", nullptr},
                  {"step", 0},
                  {"version", nullptr},
                  {"accuracy_first", nullptr},
                  {"accuracy", nullptr}});
      if (const auto versions = store.versions(run.place.id); !versions.empty()) {
        row["phase"] = versions.back().phase;
        row["step"] = versions.back().step;
        row["version"] = versions.back().version;
      }
      for (const Evaluation& e : store.evaluations(run.place.id)) {
        if (e.phase == "warmup" || row["accuracy_first"].is_null()) row["accuracy_first"] = e.accuracy;
        row["accuracy"] = e.accuracy;
      }
    } catch (const Error& e) {
      row["problem"] = wire_text(e.what());
    }
    out.push_back(std::move(row));
  }
  return {{"runs", std::move(out)}, {"of_directory", runs_.of_directory()}};
}

json Api::changes() {
  json marks = json::object();
  for (const OpenRun& run : runs_.list()) marks[run.key] = store_fingerprint(run.place.store());
  return {{"marks", std::move(marks)}};
}

json Api::run(const Params& params, Readers& readers) {
  params.expect({"run"});
  const OpenRun run = runs_.find(params.text("run"));
  StoreReader& store = readers.of(run);
  const RunRecord record = store.run(run.place.id);
  json config = json::parse(record.config, nullptr, false);
  std::string config_text =
      config.is_discarded() ? record.config : config.dump(2, ' ', false, json::error_handler_t::replace);
  json kept = json::array();
  for (const Checkpoint& c : store.checkpoints(run.place.id))
    kept.push_back({{"version", c.version}, {"phase", c.phase}, {"step", c.step}});
  const auto tokens = runs_.tokens(run);
  return {{"key", run.key},
          {"id", wire_text(record.id)},
          {"directory", wire_text(run.place.directory.string())},
          {"state", record.state},
          {"created_us", record.created_us},
          {"parent", wire_text(record.parent)},
          {"code_version", wire_text(record.code_version)},
          {"config", wire_part(config_text, 0, kConfigBytes)},
          {"checkpoints", std::move(kept)},
          {"no_tokenizer", wire_text(tokens->why)}};
}

json Api::metrics(const Params& params, Readers& readers) {
  params.expect({"run"});
  const OpenRun run = runs_.find(params.text("run"));
  StoreReader& store = readers.of(run);
  const std::vector<StepMetrics> rows = store.metrics(run.place.id);
  const bool reference = has_reference(store.run(run.place.id).config);
  json phases = json::array();
  for (size_t begin = 0; begin < rows.size();) {
    size_t end = begin;
    while (end < rows.size() && rows[end].phase == rows[begin].phase) ++end;
    phases.push_back(curves(rows, begin, end));
    if (!reference) phases.back()["series"].erase("kl");
    begin = end;
  }
  json evaluations = json::array();
  for (const Evaluation& e : store.evaluations(run.place.id))
    evaluations.push_back({{"phase", e.phase},
                           {"step", e.step},
                           {"name", wire_text(e.name)},
                           {"version", e.version},
                           {"n", e.n},
                           {"correct", e.correct},
                           {"accuracy", e.accuracy}});
  return {{"run", run.key}, {"phases", std::move(phases)}, {"evaluations", std::move(evaluations)}};
}

}  // namespace perigee::apps::inspect
