// perigee diff of two episodes.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/runs/diff.h"
#include "apps/runs/episode_json.h"
#include "base/text.h"
#include "rollout/replay/whole.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"

namespace perigee::apps {
namespace {

struct Side {
  RunPlace place;
  std::unique_ptr<policy::Tokenizer> tokenizer;
  rollout::WholeEpisode whole;
  std::string name;
};

Side open_side(const EpisodeName& name) {
  Side side;
  side.place = find_run({name.run, false});
  const int64_t id = parse_episode(name.episode);
  StoreReader store(side.place.store());
  side.whole = rollout::whole_episode(store, id);
  const rollout::RunConfig config = rollout::run_config_of(side.place.directory.string());
  side.tokenizer = rollout::make_tokenizer(config, rollout::make_layout(config)->config());
  side.name = fmt::format("{} {}", side.place.id, id);
  return side;
}

std::string text_from(const Side& side, size_t begin, size_t end) {
  const auto& t = side.whole.tokens;
  begin = std::min(begin, t.size());
  end = std::min(std::max(begin, end), t.size());
  return text_of(*side.tokenizer,
                 {t.begin() + static_cast<ptrdiff_t>(begin), t.begin() + static_cast<ptrdiff_t>(end)});
}

struct EpisodeDiff {
  bool same_prompt = false;
  size_t shared = 0;  // tokens after the prompt, from the first on, that are the same
  int64_t first_logprob =
      -1;  // of the shared ones, the first whose log-probabilities are not the same bits; -1: none
  int64_t other_logprobs = 0;
  double largest = 0;
  bool identical = false;  // tokens, log-probabilities, prompt and finish
};

EpisodeDiff compare(const rollout::WholeEpisode& a, const rollout::WholeEpisode& b) {
  EpisodeDiff d;
  d.same_prompt = a.prompt == b.prompt;
  const auto [x, y] = std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end());
  d.shared = static_cast<size_t>(x - a.tokens.begin());
  for (size_t i = 0; i < d.shared; ++i) {
    if (std::memcmp(&a.logprobs[i], &b.logprobs[i], sizeof(float)) == 0) continue;
    if (d.first_logprob < 0) d.first_logprob = static_cast<int64_t>(i);
    ++d.other_logprobs;
    d.largest = std::max(d.largest, std::fabs(static_cast<double>(a.logprobs[i]) - b.logprobs[i]));
  }
  d.identical = d.same_prompt && d.shared == a.tokens.size() && d.shared == b.tokens.size() &&
                d.other_logprobs == 0 && a.record.finish == b.record.finish;
  return d;
}

nlohmann::json token_json(const Side& s, size_t i) {
  if (i >= s.whole.tokens.size()) return nullptr;
  return {{"id", s.whole.tokens[i]},
          {"text", token_text(*s.tokenizer, s.whole.tokens[i])},
          {"logprob", s.whole.logprobs[i]},
          {"version", s.whole.versions[i]},
          {"sampled", s.whole.sampled[i] != 0}};
}

// Component by component, in the order of the first episode's, then those that only the second has.
struct ComponentPair {
  std::string name;
  const RewardComponent* a = nullptr;
  const RewardComponent* b = nullptr;
};
std::vector<ComponentPair> components(const EpisodeRecord& a, const EpisodeRecord& b) {
  std::vector<ComponentPair> pairs;
  if (a.reward)
    for (const RewardComponent& c : a.reward->components) pairs.push_back({c.name, &c, nullptr});
  if (b.reward)
    for (const RewardComponent& c : b.reward->components) {
      const auto it =
          std::find_if(pairs.begin(), pairs.end(), [&](const ComponentPair& p) { return p.name == c.name; });
      if (it != pairs.end())
        it->b = &c;
      else
        pairs.push_back({c.name, nullptr, &c});
    }
  return pairs;
}

std::string versions_text(const rollout::WholeEpisode& e) {
  if (e.versions.empty()) return "-";
  const auto [low, high] = std::minmax_element(e.versions.begin(), e.versions.end());
  return *low == *high ? std::to_string(*low) : fmt::format("{} to {}", *low, *high);
}

std::string reward_text(const EpisodeRecord& e) {
  return !e.reward ? "-" : e.reward->failed ? "failed" : fmt::format("{:.4f}", e.reward->total);
}

// Lines of both texts beside each other, as wide as a terminal of 120 columns.
void print_beside(const Side& a, const Side& b, size_t from) {
  constexpr size_t kWide = 56, kLines = 60;
  const auto wrap = [&](const std::string& text) {
    // By code points of text that is safe for a terminal.
    std::vector<std::string> lines(1);
    size_t columns = 0;
    for (const char c : printable(text)) {
      const bool begins = (static_cast<unsigned char>(c) & 0xC0) != 0x80;
      if (c == '\n' || (begins && columns == kWide)) {
        lines.emplace_back();
        columns = 0;
        if (c == '\n') continue;
      }
      lines.back() += c == '\t' ? ' ' : c;
      columns += begins;
    }
    return lines;
  };
  const std::vector<std::string> x = wrap(text_from(a, from, a.whole.tokens.size())),
                                 y = wrap(text_from(b, from, b.whole.tokens.size()));
  Table table({a.name, b.name});
  const size_t rows = std::max(x.size(), y.size());
  for (size_t i = 0; i < std::min(rows, kLines); ++i)
    table.row({i < x.size() ? x[i] : "", i < y.size() ? y[i] : ""});
  table.print();
  if (rows > kLines) fmt::print("and {} lines more\n", rows - kLines);
}

}  // namespace

int diff_episodes(const EpisodeName& name_a, const EpisodeName& name_b, bool json) {
  const Side a = open_side(name_a), b = open_side(name_b);
  const EpisodeDiff d = compare(a.whole, b.whole);
  const auto pairs = components(a.whole.record, b.whole.record);
  if (json) {
    const auto side = [](const Side& s) {
      return nlohmann::json{
          {"run", s.place.id},
          {"episode", s.whole.record.spec.episode_id},
          {"seed", s.whole.record.spec.seed},
          {"temperature", s.whole.record.spec.temperature},
          {"tokens", s.whole.tokens.size()},
          {"finish", finish_name(s.whole.record.finish)},
          {"reward", s.whole.record.reward ? nlohmann::json(s.whole.record.reward->total) : nlohmann::json()},
          {"text", text_from(s, 0, s.whole.tokens.size())}};
    };
    nlohmann::json rewards = nlohmann::json::array();
    for (const ComponentPair& p : pairs)
      rewards.push_back({{"name", p.name},
                         {"a", p.a != nullptr ? nlohmann::json(p.a->value) : nlohmann::json()},
                         {"b", p.b != nullptr ? nlohmann::json(p.b->value) : nlohmann::json()}});
    const bool parted = d.shared < a.whole.tokens.size() || d.shared < b.whole.tokens.size();
    print_json({{"a", side(a)},
                {"b", side(b)},
                {"same_prompt", d.same_prompt},
                {"shared_tokens", d.shared},
                {"first_token", parted ? nlohmann::json{{"token", d.shared},
                                                        {"a", token_json(a, d.shared)},
                                                        {"b", token_json(b, d.shared)}}
                                       : nlohmann::json()},
                {"logprobs_differ", d.other_logprobs},
                {"first_logprob", d.first_logprob < 0 ? nlohmann::json() : nlohmann::json(d.first_logprob)},
                {"largest_logprob_difference", d.largest},
                {"components", std::move(rewards)},
                {"identical", d.identical}});
    return d.identical ? 0 : 1;
  }
  Table head({"", a.name, b.name});
  const auto row = [&](const char* name, const std::string& x, const std::string& y) {
    head.row({name, x, y});
  };
  row("seed", std::to_string(a.whole.record.spec.seed), std::to_string(b.whole.record.spec.seed));
  row("temperature", fmt::format("{:g}", a.whole.record.spec.temperature),
      fmt::format("{:g}", b.whole.record.spec.temperature));
  row("versions", versions_text(a.whole), versions_text(b.whole));
  row("tokens", std::to_string(a.whole.tokens.size()), std::to_string(b.whole.tokens.size()));
  row("finish", std::string(finish_name(a.whole.record.finish)),
      std::string(finish_name(b.whole.record.finish)));
  row("reward", reward_text(a.whole.record), reward_text(b.whole.record));
  for (const ComponentPair& p : pairs)
    row(("  " + printable_line(p.name)).c_str(), p.a != nullptr ? fmt::format("{:.4f}", p.a->value) : "-",
        p.b != nullptr ? fmt::format("{:.4f}", p.b->value) : "-");
  head.print();
  fmt::print("\nprompt         {}\n", d.same_prompt ? "the same" : "another one");
  if (d.shared == a.whole.tokens.size() && d.shared == b.whole.tokens.size()) {
    fmt::print("tokens         all {} the same\n", d.shared);
  } else {
    fmt::print("tokens         the first {} are the same\n", d.shared);
    const auto first = [&](const Side& s) {
      if (d.shared >= s.whole.tokens.size()) return fmt::format("{} ends there", s.name);
      return fmt::format("{} has {} ({}), log-probability {:.5f}", s.name, s.whole.tokens[d.shared],
                         quote(token_text(*s.tokenizer, s.whole.tokens[d.shared])),
                         s.whole.logprobs[d.shared]);
    };
    fmt::print("token {:<8} {}\n               {}\n", d.shared, printable_line(first(a)),
               printable_line(first(b)));
  }
  if (d.other_logprobs > 0)
    fmt::print(
        "probabilities  {} of the shared tokens have other log-probabilities, from token {} on, by at most "
        "{:.3g}\n",
        d.other_logprobs, d.first_logprob, d.largest);
  else if (d.shared > 0)
    fmt::print("probabilities  of the shared tokens the same bits\n");
  if (d.shared > 0) fmt::print("\nshared\n{}\n", printable(text_from(a, 0, d.shared)));
  if (d.shared < a.whole.tokens.size() || d.shared < b.whole.tokens.size()) {
    fmt::print("\nfrom there on\n");
    print_beside(a, b, d.shared);
  }
  return d.identical ? 0 : 1;
}

}  // namespace perigee::apps
