// States of sessions between the engine's memory and the disk, on the engine's thread (but for what state_worker does).
#include <algorithm>
#include <chrono>
#include <filesystem>

#include "agents/host/impl.h"
#include "agents/session/snapshot_file.h"

namespace perigee::agents {

namespace fs = std::filesystem;

std::string Host::Impl::path_of(const std::string& session, int64_t position) const {
  return (config.state_folder / (session + "@" + std::to_string(position) + ".state")).string();
}

// For those who ask where a session's state is.
void Host::Impl::show_place(Session& s) {
  const std::lock_guard lock(mutex);
  const auto tell = [](bool& shown, bool now, int64_t& counter) {
    counter += (now ? 1 : 0) - (shown ? 1 : 0);
    shown = now;
  };
  tell(s.in_memory, s.id != 0, stats.sessions_in_memory);
  tell(s.on_disk, s.leaving != nullptr || !s.files.empty(), stats.sessions_on_disk);
}

void Host::Impl::now_idle(const std::shared_ptr<Session>& s) {
  PERIGEE_CHECK(s->id != 0 && !s->is_idle);
  s->place = idle.insert(idle.end(), s);
  s->is_idle = true;
  s->idle_bytes = engine->held_bytes(s->id);
  idle_bytes += s->idle_bytes;
  show_place(*s);
  const int64_t most = config.idle_bytes >= 0 ? config.idle_bytes : config.engine.memory_bytes / 2;
  while (idle_bytes > most && evict_one()) {
  }
  if (!s->is_idle || config.state_folder.empty() || config.snapshot_every_tokens <= 0 ||
      s->leaving != nullptr)
    return;
  const int64_t at = engine->computed(s->id);
  if (at - (s->files.empty() ? 0 : s->files.back()) < config.snapshot_every_tokens) return;
  if (leaving_bytes > 0 && leaving_bytes + engine->held_bytes(s->id) > config.snapshot_queue_bytes) return;
  save(s);
}

void Host::Impl::not_idle(Session& s) {
  if (!s.is_idle) return;
  idle.erase(s.place);
  s.is_idle = false;
  idle_bytes -= s.idle_bytes;
}

void Host::Impl::drop_state(Session& s) {
  not_idle(s);
  if (s.id != 0) engine->release(std::exchange(s.id, 0));
  show_place(s);
}

bool Host::Impl::evict_one() {
  return !idle.empty() && evict(std::shared_ptr<Session>(idle.front()));
}

// False: not now, too much is on its way to disk already.
bool Host::Impl::evict(const std::shared_ptr<Session>& s) {
  if (s->id == 0) return true;
  const int64_t at = engine->computed(s->id);
  const bool there = !s->files.empty() && s->files.back() == at;
  if (at > 0 && !there && s->leaving == nullptr && !config.state_folder.empty()) {
    if (leaving_bytes > 0 && leaving_bytes + engine->held_bytes(s->id) > config.snapshot_queue_bytes)
      return false;
    save(s);
  }
  if (s->leaving != nullptr && s->leaving->position != at) return false;  // an earlier state is being written
  drop_state(*s);
  count([](HostStats& st) { ++st.suspends; });
  return true;
}

// Writes the state of an idle session beside what it is.
void Host::Impl::save(const std::shared_ptr<Session>& s) {
  const auto snapshot = std::make_shared<const Snapshot>(engine->save(s->id));
  s->leaving = snapshot;
  leaving_bytes += static_cast<int64_t>(snapshot->bytes.size());
  ++writing;
  const auto known = engine->tokens(s->id);
  state_worker->post([this, s, snapshot, name = s->info.name, version = engine->version(),
                      tokens = std::vector<int32_t>(known.begin(), known.end())] {
    const auto start = std::chrono::steady_clock::now();
    std::string error;
    try {
      write_snapshot(path_of(name, snapshot->position), *snapshot, tokens, model, version);
    } catch (const std::exception& e) {
      error = e.what();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    post([this, s, snapshot, seconds, error] { written(s, *snapshot, seconds, error); });
  });
}

void Host::Impl::written(const std::shared_ptr<Session>& s, const Snapshot& snapshot, double seconds,
                         const std::string& error) {
  const auto bytes = static_cast<int64_t>(snapshot.bytes.size());
  --writing;
  leaving_bytes -= bytes;
  s->leaving.reset();
  s->write_error = error;
  if (error.empty()) {
    std::erase(s->files, snapshot.position);
    s->files.insert(std::ranges::upper_bound(s->files, snapshot.position), snapshot.position);
    while (static_cast<int>(s->files.size()) > std::max(config.snapshots_per_session, 1))
      remove_file(*s, s->files.front());
    if (s->gone) remove_files(*s);
  } else {
    warn("the state of session " + s->info.name + " was not written, it will be prefilled again: " + error);
  }
  count([&](HostStats& st) {
    st.suspend_seconds += seconds;
    if (!error.empty()) {
      ++st.snapshots_failed;
      return;
    }
    ++st.snapshots_written;
    st.snapshot_bytes_written += bytes;
  });
  show_place(*s);
}

void Host::Impl::remove_file(Session& s, int64_t position) {
  std::error_code ignored;
  fs::remove(path_of(s.info.name, position), ignored);
  std::erase(s.files, position);
}

void Host::Impl::remove_files(Session& s) {
  while (!s.files.empty()) remove_file(s, s.files.front());
  show_place(s);
}

// Reads the newest file that is a state of the session; then its turn goes on.
void Host::Impl::load_state(const std::shared_ptr<Request>& r) {
  r->stage = Request::Stage::kLoading;
  ++loading;
  std::vector<int32_t> tokens;
  {
    const std::lock_guard lock(mutex);
    tokens = r->session->tokens;
  }
  state_worker->post([this, r, tokens = std::move(tokens), name = r->session->info.name,
                      files = r->session->files] {
    const auto start = std::chrono::steady_clock::now();
    std::shared_ptr<const Snapshot> found;
    std::vector<int64_t> bad;
    for (size_t i = files.size(); i-- > 0 && found == nullptr;) {
      const std::string path = path_of(name, files[i]);
      SnapshotRead read;
      try {
        read = read_snapshot(path, tokens, model);
      } catch (const std::exception& e) {  // no memory for it
        read.refused = e.what();
      }
      if (read.snapshot) {
        found = std::make_shared<const Snapshot>(std::move(*read.snapshot));
      } else {
        warn(path + ": " + read.refused + "; the session is prefilled from what is known");
        bad.push_back(files[i]);
      }
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    post([this, r, found, bad, seconds] {
      --loading;
      for (int64_t position : bad) remove_file(*r->session, position);
      count([&](HostStats& st) {
        st.snapshots_refused += static_cast<int64_t>(bad.size());
        st.resume_seconds += seconds;
      });
      show_place(*r->session);
      if (r->cancelled) return;
      r->loaded = found;
      r->stage = Request::Stage::kLoaded;
      waiting.push_front(r);
    });
  });
}

// The new session starts from the parent's state where it is at its end, or else from a file of an earlier one.
void Host::Impl::fork_state(const std::shared_ptr<Session>& from, const std::shared_ptr<Session>& to) {
  if (down) return;
  const int64_t length = to->length();
  bool at_end;
  {
    const std::lock_guard lock(mutex);
    at_end = !from->busy && from->length() == length;
  }
  if (at_end && from->is_idle && from->id != 0 && engine->fork(from->id, next_id)) {
    to->id = next_id++;
    now_idle(to);
    return;
  }
  for (size_t i = from->files.size(); i-- > 0;) {
    const int64_t position = from->files[i];
    if (position >= length) continue;
    std::error_code error;
    const std::string path = path_of(from->info.name, position), copy = path_of(to->info.name, position);
    fs::create_hard_link(path, copy, error);
    if (error) fs::copy_file(path, copy, fs::copy_options::overwrite_existing, error);
    if (!error) to->files.push_back(position);
    break;
  }
  show_place(*to);
}

}  // namespace perigee::agents
