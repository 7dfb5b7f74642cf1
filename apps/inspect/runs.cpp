#include "apps/inspect/runs.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>

#include "apps/runs/run_tokenizer.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps::inspect {
namespace {

constexpr int64_t kLookAgain_us = 1'000'000;
constexpr size_t kReaders = 8;  // open stores of a thread, each with a cache of its own

// What an address may hold without escapes.
std::string key_of(const std::filesystem::path& directory) {
  std::error_code ignored;
  std::string name = std::filesystem::weakly_canonical(directory, ignored).filename().string();
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '_' && c != '.') c = '_';
  return name.empty() ? "run" : name;
}

}  // namespace

RunSet::RunSet(const std::vector<RunPlace>& places) {
  for (const RunPlace& place : places) add(place);
}

RunSet::RunSet(std::filesystem::path root) : root_(std::move(root)) {}

void RunSet::add(const RunPlace& place) {
  const std::string name = key_of(place.directory);
  std::string key = name;
  const auto taken = [&] {
    return std::any_of(runs_.begin(), runs_.end(), [&](const OpenRun& r) { return r.key == key; });
  };
  for (int n = 2; taken(); ++n) key = fmt::format("{}~{}", name, n);
  runs_.push_back({key, place});
}

std::vector<OpenRun> RunSet::list() {
  const std::lock_guard lock(mutex_);
  const int64_t now = unix_time_us();
  if (!root_.empty() && now - looked_us_ > kLookAgain_us) {
    looked_us_ = now;
    runs_.clear();
    for (const ListedRun& run : list_runs(root_))
      if (run.problem.empty()) add({run.directory, run.record.id});
  }
  return runs_;
}

OpenRun RunSet::find(const std::string& key) {
  const std::vector<OpenRun> runs = list();
  for (const OpenRun& run : runs)
    if (key.empty() || run.key == key) return run;
  if (key.empty()) throw_input("no run under {} yet", root_.string());
  throw_input("no run {} here", quote(key));
}

std::shared_ptr<const RunTokens> RunSet::tokens(const OpenRun& run) {
  const std::lock_guard lock(mutex_);
  auto& kept = tokens_[run.place.directory.string()];
  if (!kept) {
    auto made = std::make_shared<RunTokens>();
    try {
      StoreReader store(run.place.store());
      made->tokenizer = tokenizer_of(run.place, store);
    } catch (const Error& e) {
      made->why = e.what();
    }
    kept = std::move(made);
  }
  return kept;
}

std::string store_fingerprint(const std::filesystem::path& store) {
  std::string out;
  for (const char* suffix : {"", "-wal"}) {
    struct stat s {};
    if (::stat((store.string() + suffix).c_str(), &s) == 0)
      out += fmt::format("{:x}.{:x}.{:x}.{:x}-", s.st_ino, s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
  }
  return out;
}

StoreReader& Readers::of(const OpenRun& run) {
  struct stat s {};
  const bool there = ::stat(run.place.store().c_str(), &s) == 0;
  const std::string path = run.place.store().string();
  const auto found = readers_.find(path);
  if (found != readers_.end() && there && found->second.device == s.st_dev && found->second.inode == s.st_ino)
    return *found->second.store;
  readers_.erase(path);
  if (readers_.size() >= kReaders) readers_.clear();
  auto store = std::make_unique<StoreReader>(run.place.store());
  return *readers_.emplace(path, Reader{s.st_dev, s.st_ino, std::move(store)}).first->second.store;
}

}  // namespace perigee::apps::inspect
