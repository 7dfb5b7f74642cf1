#include "rollout/run/resume_check.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/text.h"
#include "storage/store.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostShown = 4;

// By the numeric contract none of these changes a token, a reward or a weight.
constexpr std::array<std::string_view, 8> kFreeSections = {"workers.", "bus.",  "engine.", "checkpoint.",
                                                           "storage.", "eval.", "run.dir", "rollout.lease_seconds"};

bool may_change(const RunConfig& then, const std::string& key) {
  if (std::any_of(kFreeSections.begin(), kFreeSections.end(), [&](std::string_view s) { return key.starts_with(s); }))
    return true;
  // The CPU and the GPU compute the same bits in these.
  const auto same_everywhere = [&] {
    return then.effective["model"]["dtype"] == "float32" || then.effective["run"]["numerics"] == "portable";
  };
  if (key == "run.device") return same_everywhere();
  // A file is known by its hash: it may have moved.
  const auto pinned = [&](const char* hash) { return then.tasks.is_object() && then.tasks.value(hash, nlohmann::json("")) != ""; };
  if (key == "tasks.path") return pinned("hash");
  if (key == "tasks.held_out_path") return pinned("held_out_hash");
  // More steps, or fewer, of a rate that does not depend on how many there are.
  if (key == "learn.steps") return then.effective["learn"]["schedule"] == "constant";
  return false;
}

void flatten(const nlohmann::json& value, const std::string& prefix, std::map<std::string, std::string>& out) {
  if (!value.is_object() || value.empty()) {
    out[prefix] = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    return;
  }
  for (const auto& [key, inner] : value.items()) flatten(inner, prefix.empty() ? key : prefix + "." + key, out);
}

bool holds_checkpoints(const std::string& run_dir) {
  std::error_code ec;
  for (const auto& entry : fs::directory_iterator(fs::path(run_dir) / "checkpoints", ec))
    if (entry.path().filename().string().starts_with("v")) return true;
  return false;
}

}  // namespace

std::vector<std::string> changed_keys(const RunConfig& then, const RunConfig& now) {
  std::map<std::string, std::string> a, b;
  flatten(then.effective, "", a);
  flatten(now.effective, "", b);
  const auto shown = [](const std::string& text) { return text.size() <= 40 ? text : text.substr(0, 37) + "..."; };
  std::vector<std::string> changed;
  for (const auto& [key, value] : a) {
    const auto it = b.find(key);
    if (it != b.end() && it->second == value) continue;
    if (!may_change(then, key))
      changed.push_back(fmt::format("{} ({}, now {})", key, shown(value), it == b.end() ? "gone" : shown(it->second)));
  }
  for (const auto& [key, value] : b)
    if (!a.contains(key) && !may_change(then, key)) changed.push_back(fmt::format("{} (new: {})", key, shown(value)));
  return changed;
}

void check_resumable(const RunConfig& config, const std::string& run_dir) {
  const fs::path store = fs::path(run_dir) / "store.sqlite";
  std::error_code ec;
  if (!fs::exists(store, ec) || fs::file_size(store, ec) == 0) {
    if (holds_checkpoints(run_dir))
      throw_input("{} is not there, and there are checkpoints of the run: put it back; without it the run would begin anew",
                  store.string());
    return;  // killed before it began
  }
  std::vector<RunRecord> runs;
  try {
    runs = StoreReader(store).runs();
  } catch (const Error&) {
    // Likewise, perhaps in the transaction that made it, which a reader may not take back: whoever writes does, or says what is wrong.
    if (!holds_checkpoints(run_dir)) return;
    throw;
  }
  if (runs.empty()) return;
  const auto it = std::find_if(runs.begin(), runs.end(), [&](const RunRecord& r) { return r.id == config.run.name; });
  if (it == runs.end())
    throw_input("{}: it holds the run {}, and run.name of config.json is {}: put the name back", store.string(),
                quote(runs.front().id), quote(config.run.name));
  const nlohmann::json recorded = nlohmann::json::parse(it->config, nullptr, false);
  if (!recorded.is_object() || recorded.empty()) return;  // of a store that was put together by hand
  const auto changed = changed_keys(parse_run_config(recorded, store.string()), config);
  if (changed.empty()) return;
  std::vector<std::string> first(changed.begin(), changed.begin() + static_cast<int64_t>(std::min(changed.size(), kMostShown)));
  throw_input("{}: changed since the run began: {}{}. What it did could not be made again: put that back, or begin another run",
              (fs::path(run_dir) / "config.json").string(), join(first),
              changed.size() > first.size() ? fmt::format(" and {} more", changed.size() - first.size()) : "");
}

std::string config_file_hash(const std::string& run_dir) {
  return hash_hex(read_file((fs::path(run_dir) / "config.json").string()));
}

}  // namespace perigee::rollout
