#include "rollout/replay/tools_again.h"

#include <algorithm>

#include "base/error.h"
#include "base/hash.h"
#include "base/text.h"

namespace perigee::rollout {
namespace {

// Episodes that wait for a thread, per thread: enough that none is idle, few enough that a run of any length fits.
constexpr int64_t kQueuedPerThread = 16;
// Of an answer, before and after the first byte that differs.
constexpr size_t kContextBytes = 40;

// The calls that the tokens of a turn make.
policy::ParsedMessage calls_of(const policy::Tokenizer& tokenizer, const WholeEpisode& e,
                               const WholeTurn& turn) {
  // A turn that asks for tools is followed by others, so the limit of turns does not matter here.
  const auto tokens = std::span(e.tokens).subspan(turn.begin, turn.end - turn.begin);
  return agents::end_turn(tokenizer, tokens, FinishReason::kStop, 0, {.max_turns = 2}).message;
}

}  // namespace

std::vector<ToolEvent> run_turns(const Environment& environment, const policy::Tokenizer& tokenizer,
                                 const WholeEpisode& e, size_t turns, const std::filesystem::path& folder,
                                 const std::vector<TaskFile>& files, std::stop_token stop) {
  if (environment.has_folder()) prepare_workspace(folder, files);
  agents::ToolContext context;
  if (environment.has_folder()) context.work = folder;
  context.stop = stop;
  std::vector<ToolEvent> events;
  const std::vector<WholeTurn> all = turns_of(e);
  for (size_t i = 0; i < std::min(turns, all.size()); ++i) {
    if (all[i].tools.empty()) continue;
    for (ToolEvent& event : agents::run_calls(environment.tools(), calls_of(tokenizer, e, all[i]),
                                              static_cast<int32_t>(i), context, environment.config().limits))
      events.push_back(std::move(event));
  }
  return events;
}

ToolReplayer::ToolReplayer(const Environment& environment, const policy::Tokenizer& tokenizer, bool execute)
    : environment_(environment),
      tokenizer_(tokenizer),
      execute_(execute),
      pool_(environment.config().tool_threads) {
  if (execute && environment.has_folder()) work_ = std::make_unique<TemporaryFolder>("replay");
}

ToolReplayer::~ToolReplayer() = default;

void ToolReplayer::add(WholeEpisode episode, std::vector<TaskFile> files) {
  if (!execute_ || episode.tools.empty()) {
    compare(episode, nullptr);
    return;
  }
  while (pool_.pending() >= kQueuedPerThread * environment_.config().tool_threads) {
    pool_.wait(100);
    take();
  }
  const auto id = static_cast<uint64_t>(episode.record.spec.episode_id);
  Waiting w{std::make_shared<const WholeEpisode>(std::move(episode)), {}};
  if (work_) w.folder = work_->path() / std::to_string(id);
  waiting_[id] = w;
  pool_.submit(id, [this, w, files = std::move(files)](std::stop_token stop) {
    auto events =
        run_turns(environment_, tokenizer_, *w.episode, turns_of(*w.episode).size(), w.folder, files, stop);
    if (!w.folder.empty()) remove_workspace(w.folder);
    return events;
  });
}

void ToolReplayer::take() {
  for (const ToolPool::Done& done : pool_.take()) {
    const auto it = waiting_.find(done.id);
    compare(*it->second.episode, &done.events);
    waiting_.erase(it);
  }
}

void ToolReplayer::finish() {
  while (pool_.pending() > 0) {
    pool_.wait(100);
    take();
  }
  std::stable_sort(tally_.differences.begin(), tally_.differences.end(), [](const auto& a, const auto& b) {
    return std::tie(a.episode, a.turn, a.call) < std::tie(b.episode, b.turn, b.call);
  });
}

void ToolReplayer::compare(const WholeEpisode& e, const std::vector<ToolEvent>* again) {
  const std::vector<WholeTurn> turns = turns_of(e);
  const auto place = [&](size_t turn, size_t call) {
    ToolDifference d;
    d.episode = e.record.spec.episode_id;
    d.turn = static_cast<int32_t>(turn);
    d.call = static_cast<int32_t>(call);
    d.position = static_cast<int64_t>(e.prompt.size() + turns[turn].end);
    return d;
  };
  const auto tell = [&](size_t turn, size_t call, ToolDifference::What what, std::string tool,
                        std::string detail) {
    ToolDifference d = place(turn, call);
    d.what = what;
    d.tool = std::move(tool);
    d.detail = std::move(detail);
    tally_.differences.push_back(std::move(d));
  };
  size_t next = 0;  // of `again`
  for (size_t i = 0; i < turns.size(); ++i) {
    const WholeTurn& turn = turns[i];
    if (turn.tools.empty() && turn.end == turn.fed_end) continue;
    const policy::ParsedMessage message = calls_of(tokenizer_, e, turn);
    // What a parent heard is its own to compare; here it only made the folder.
    const bool own = turn.fed_end > e.own || turn.end == turn.fed_end;
    const size_t told = tally_.differences.size();
    const size_t first = next;
    next += turn.tools.empty() ? 0 : message.calls.size();
    if (!own) continue;
    if (message.calls.size() != turn.tools.size()) {
      tell(i, 0, ToolDifference::What::kCall, "",
           fmt::format("the tokens make {} calls, {} are stored", message.calls.size(), turn.tools.size()));
      continue;
    }
    if (again != nullptr && again->size() < next) {
      tell(i, 0, ToolDifference::What::kFailed, turn.tools.front().name, "the tools could not be run");
      return;
    }
    for (size_t c = 0; c < turn.tools.size(); ++c) {
      const ToolEvent& then = turn.tools[c];
      ++tally_.calls;
      // The name of a tool that there is none of is kept as the toolbox writes it: what a run now says tells.
      const ToolEvent* now = again != nullptr ? &(*again)[first + c] : nullptr;
      const policy::ToolCall& call = message.calls[c].call;
      const bool known = environment_.tools().find(call.name) != nullptr;
      const std::string& name = now != nullptr ? now->name : known ? call.name : then.name;
      const std::string& input = now != nullptr ? now->input : known ? call.arguments : then.input;
      if (then.name != name || then.input != input)
        tell(i, c, ToolDifference::What::kCall, then.name,
             fmt::format("the tokens call {}({}), stored is {}({})", name, quote(input), then.name,
                         quote(then.input)));
      compare_call(place(i, c), then, now);
    }
    // The tokens that the policy heard, from what is stored.
    if (turn.fed_end > turn.end && tally_.differences.size() == told) {
      const std::vector<int32_t> answer = agents::answer_tokens(tokenizer_, message, turn.tools);
      const auto fed = std::span(e.tokens).subspan(turn.end, turn.fed_end - turn.end);
      const auto at = std::mismatch(answer.begin(), answer.end(), fed.begin(), fed.end());
      if (at.first != answer.end() || at.second != fed.end())
        tell(i, 0, ToolDifference::What::kTokens, turn.tools.empty() ? "" : turn.tools.front().name,
             fmt::format("position {}: the tokens fed there are not those of the stored answers",
                         e.prompt.size() + turn.end + static_cast<size_t>(at.first - answer.begin())));
    }
  }
}

void ToolReplayer::compare_call(ToolDifference d, const ToolEvent& then, const ToolEvent* again) {
  if (again != nullptr) ++tally_.run;
  const std::string stored = hash128(then.output).hex();
  const bool kept = stored == then.digest;
  const bool same = again == nullptr || (again->digest == then.digest && again->status == then.status);
  if (kept && same) return;
  // The tool answers as it did: what is stored was altered since.
  d.what = kept ? ToolDifference::What::kOutput : ToolDifference::What::kStored;
  d.tool = then.name;
  d.digest_then = then.digest;
  d.status_then = then.status;
  if (again != nullptr) {
    d.digest_again = again->digest;
    d.status_again = again->status;
    const auto [a, b] =
        std::mismatch(then.output.begin(), then.output.end(), again->output.begin(), again->output.end());
    if (a != then.output.end() || b != again->output.end()) {
      const auto at = static_cast<size_t>(a - then.output.begin());
      d.first_byte = static_cast<int64_t>(at);
      const size_t begin = at - std::min(at, kContextBytes);
      d.context_begin = static_cast<int64_t>(begin);
      d.then = then.output.substr(begin, at - begin + kContextBytes);
      d.again = again->output.substr(begin, at - begin + kContextBytes);
    }
  }
  if (!kept)
    d.detail = fmt::format("the stored answer was altered: its digest is {}, and {} was recorded", stored,
                           then.digest);
  tally_.differences.push_back(std::move(d));
}

}  // namespace perigee::rollout
